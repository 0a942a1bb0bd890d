#include "cpu/packed_layer.hpp"

#include <cstring>

namespace iqmpc::detail {

namespace {

// To nearest, ties to even; NaN stays NaN.
std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

AlignedBuffer<float> scattered(const float* values, Index size, const std::vector<Index>& to,
                               Index padded) {
  AlignedBuffer<float> copy(static_cast<std::size_t>(padded));
  for (Index o = 0; o < size; ++o) copy.data()[to[o]] = values[o];
  return copy;
}

// The mean of each input's weights over the outputs; empty for a layer without LayerNorm.
std::vector<float> means(const LinearView& view) {
  std::vector<double> sum(view.gamma ? view.in : 0);
  std::vector<float> mean(sum.size());
  if (mean.empty()) return mean;
  for (Index o = 0; o < view.out; ++o) {
    for (Index i = 0; i < view.in; ++i) sum[i] += view.weight[o * view.in + i];
  }
  for (Index i = 0; i < view.in; ++i) mean[i] = static_cast<float>(sum[i] / double(view.out));
  return mean;
}

}  // namespace

PackedLayer pack_layer(const KernelTable& kernels, const LinearView& view,
                       const PackRequest& request) {
  const Index panel = kernels.panel, step = kernels.step;
  const SimNormLayout* simnorm = request.inputs;
  const Index count = !simnorm         ? request.count
                      : request.excess ? simnorm->groups
                                       : simnorm->inputs();

  std::vector<Index> column = request.outputs;
  for (Index o = static_cast<Index>(column.size()); o < view.out; ++o) column.push_back(o);
  PackedLayer layer;
  layer.in = round_up(count, step);
  layer.outputs = view.out;
  layer.padded = round_up(request.columns ? request.columns : view.out, panel);
  std::vector<Index> source(static_cast<std::size_t>(layer.padded), -1);
  for (Index o = 0; o < view.out; ++o) source[column[o]] = o;

  const std::vector<float> mean = means(view);
  // What SimNorm's last members add to every row's bias, since they are not packed.
  std::vector<float> rest(static_cast<std::size_t>(view.out));
  const std::size_t element = kernels.bf16_weights ? sizeof(std::uint16_t) : sizeof(float);
  layer.panels = AlignedBuffer<unsigned char>(
      static_cast<std::size_t>(layer.padded * layer.in) * element);

  std::vector<float> rows(static_cast<std::size_t>(panel * layer.in));
  std::vector<float> centred(static_cast<std::size_t>(request.count));
  for (Index first = 0; first < layer.padded; first += panel) {
    std::fill(rows.begin(), rows.end(), 0.0f);
    for (Index c = 0; c < panel; ++c) {
      const Index o = source[first + c];
      if (o < 0) continue;
      const float* weight = view.weight + o * view.in + request.first;
      for (Index i = 0; i < request.count; ++i) {
        centred[i] = mean.empty() ? weight[i] : weight[i] - mean[request.first + i];
      }
      float* row = rows.data() + c * layer.in;
      if (!simnorm) {
        std::copy(centred.begin(), centred.end(), row);
        continue;
      }
      double sum = 0;
      for (Index g = 0; g < simnorm->count; ++g) {
        const float* group = centred.data() + g * simnorm->dim;
        const float last = group[simnorm->dim - 1];
        if (request.excess) {
          row[g] = last;
          continue;
        }
        sum += last;
        for (Index v = 0; v + 1 < simnorm->dim; ++v) {
          row[v * simnorm->groups + g] = group[v] - last;
        }
      }
      rest[o] = static_cast<float>(sum);
    }
    // From here on the panel is written in order, one step of all its outputs after the other.
    unsigned char* target = layer.panels.data() + first * layer.in * element;
    for (Index k = 0; k < layer.in; k += step) {
      for (Index c = 0; c < panel; ++c) {
        for (Index s = 0; s < step; ++s, target += element) {
          const float value = rows[c * layer.in + k + s];
          if (kernels.bf16_weights) {
            const std::uint16_t half = to_bf16(value);
            std::memcpy(target, &half, sizeof half);
          } else {
            std::memcpy(target, &value, sizeof value);
          }
        }
      }
    }
  }
  if (request.addend) return layer;

  double mean_bias = 0;
  if (view.gamma) {
    for (Index o = 0; o < view.out; ++o) mean_bias += view.bias[o] / double(view.out);
  }
  for (Index o = 0; o < view.out; ++o) {
    rest[o] += static_cast<float>(view.bias[o] - mean_bias);
  }
  layer.bias = scattered(rest.data(), view.out, column, layer.padded);
  if (view.gamma) {
    layer.gamma = scattered(view.gamma, view.out, column, layer.padded);
    layer.beta = scattered(view.beta, view.out, column, layer.padded);
  }
  return layer;
}

}  // namespace iqmpc::detail
