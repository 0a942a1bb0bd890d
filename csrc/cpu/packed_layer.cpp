#include "cpu/packed_layer.hpp"

#include <algorithm>

namespace iqmpc::detail {

namespace {

std::size_t size(Index n) { return static_cast<std::size_t>(n); }

}  // namespace

void LayerPacker::pack(const KernelTable& kernels, const LinearView& view,
                       const PackOutputs* outputs, PackedLayer& layer) {
  all_.clear(round_up(view.in, kernels.step));
  for (Index i = 0; i < view.in; ++i) all_.plus[i] = i;
  pack(kernels, view, outputs, {{all_, layer}});
}

void LayerPacker::pack(const KernelTable& kernels, const LinearView& view,
                       const PackOutputs* outputs, std::initializer_list<PackProduct> products,
                       const PackInputs* ones) {
  const Index panel = kernels.panel;
  const Index padded = round_up(outputs ? outputs->columns : view.out, panel);
  const Index element = kernels.bf16_weights ? sizeof(std::uint16_t) : sizeof(float);
  const auto column = [&](Index o) { return outputs ? outputs->column[o] : o; };

  rows_.assign(size(padded), nullptr);
  for (Index o = 0; o < view.out; ++o) rows_[column(o)] = view.weight + o * view.in;
  mean_.assign(size(view.in), 0.0f);
  if (view.gamma) kernels.column_means(view.weight, view.out, view.in, mean_.data());
  bias_.assign(size(padded), 0.0f);
  const std::size_t room = size((1 + view.in) * panel);
  if (transposed_.size() < room) transposed_ = AlignedBuffer<float>(room);
  float* inputs = transposed_.data() + panel;  // from 0; input -1 is zero

  for (const PackProduct& product : products) {
    product.layer.in = static_cast<Index>(product.inputs.plus.size());
    product.layer.outputs = view.out;
    product.layer.padded = padded;
    product.layer.panels.fit(size(padded * product.layer.in * element));
  }
  for (Index first = 0; first < padded; first += panel) {
    kernels.transpose(rows_.data() + first, view.weight + view.out * view.in, mean_.data(), view.in,
                      inputs);
    for (const PackProduct& product : products) {
      kernels.pack_panel(inputs, product.inputs.plus.data(), product.inputs.minus.data(),
                         product.layer.in,
                         product.layer.panels.data() + first * product.layer.in * element);
    }
    if (!ones) continue;
    sum_.assign(size(panel), 0.0);
    for (const Index i : ones->plus) {
      if (i < 0) continue;
      for (Index c = 0; c < panel; ++c) sum_[c] += inputs[i * panel + c];
    }
    for (Index c = 0; c < panel; ++c) bias_[first + c] = static_cast<float>(sum_[c]);
  }

  double mean_bias = 0;
  if (view.gamma) {
    for (Index o = 0; o < view.out; ++o) mean_bias += view.bias[o] / double(view.out);
  }
  PackedLayer& layer = products.begin()->layer;
  layer.bias.fit(size(padded));
  for (Index o = 0; o < view.out; ++o) {
    bias_[column(o)] += static_cast<float>(view.bias[o] - mean_bias);
  }
  std::copy(bias_.begin(), bias_.end(), layer.bias.data());
  const auto scatter = [&](const float* values, AlignedBuffer<float>& to) {
    to.fit(values ? size(padded) : 0);
    if (!values) return;
    std::fill_n(to.data(), padded, 0.0f);
    for (Index o = 0; o < view.out; ++o) to.data()[column(o)] = values[o];
  };
  scatter(view.gamma, layer.gamma);
  scatter(view.beta, layer.beta);
}

}  // namespace iqmpc::detail
