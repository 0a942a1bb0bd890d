#include "cuda/packed_model.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/view_checks.hpp"
#include "cuda/fragments.hpp"
#include "cuda/math.hpp"
#include "cuda/tile_layout.hpp"

namespace iqmpc::gpu {

namespace {

using Index = std::ptrdiff_t;

// Memory handed out front to back.
class Arena {
 public:
  // The offset of `size` zero bytes. Starts on a boundary that every load is happy with.
  std::int64_t take(std::size_t size) {
    constexpr std::size_t kBoundary = 256;
    // Offset 0 is never handed out: it says "none".
    const std::size_t start =
        std::max(kBoundary, (bytes_.size() + kBoundary - 1) / kBoundary * kBoundary);
    bytes_.resize(start + size);
    return static_cast<std::int64_t>(start);
  }

  template <class T>
  std::int64_t put(const T* values, std::size_t count, std::size_t room) {
    const std::int64_t start = take(room * sizeof(T));
    if (count) std::memcpy(bytes_.data() + start, values, count * sizeof(T));
    return start;
  }

  unsigned char* at(std::int64_t offset) { return bytes_.data() + offset; }

  AlignedBuffer<unsigned char> copy() const {
    AlignedBuffer<unsigned char> aligned(bytes_.size());
    std::memcpy(aligned.data(), bytes_.data(), bytes_.size());
    return aligned;
  }

 private:
  std::vector<unsigned char> bytes_;
};

// The layer's weight of a padded output and input: zero in the padding.
class Padded {
 public:
  Padded(const LinearView& view, const LayerData& layer, Index latents)
      : view_(view), split_(layer.latents), latents_(latents) {}

  float operator()(int output, int input) const {
    // The latent's inputs, then padding, then the action's, then padding.
    const Index natural = input < split_ ? input : input - split_ + latents_;
    const Index end = input < split_ ? latents_ : view_.in;
    if (output >= view_.out || natural >= end) return 0.0f;
    return view_.weight[output * view_.in + natural];
  }

 private:
  const LinearView& view_;
  Index split_, latents_;
};

void put_fragments(const Padded& weight, const LayerData& layer, unsigned char* target) {
  for (int output = 0; output < layer.padded; output += kSide) {
    for (int input = 0; input < layer.inputs; input += kSide) {
      for (int lane = 0; lane < kLanes; ++lane, target += sizeof(Fragment)) {
        Fragment fragment;
        for (int reg = 0; reg < 4; ++reg) {
          const Place place = weight_place(lane, reg);
          const int o = output + place.column, i = input + place.row;
          fragment.x[reg] = std::uint32_t{to_bf16(weight(o, i)).bits} |
                            std::uint32_t{to_bf16(weight(o, i + 1)).bits} << 16;
        }
        std::memcpy(target, &fragment, sizeof fragment);
      }
    }
  }
}

class Packer {
 public:
  Packer(const WorldModelView& view, Precision precision) : precision_(precision) {
    ModelData& m = model_;
    m.latent_dim = static_cast<int>(view.dynamics.back().out);
    m.action_dim = static_cast<int>(view.policy.back().out / 2);
    m.num_critics = static_cast<int>(view.critics.size());
    m.simnorm_dim = static_cast<int>(view.simnorm_dim);
    m.log_std_min = view.log_std_min;
    m.log_std_max = view.log_std_max;
    m.dynamics = stack(view.dynamics);
    m.policy = stack(view.policy);
    std::vector<StackData> critics;
    for (const std::vector<LinearView>& critic : view.critics) critics.push_back(stack(critic));
    m.layers = arena_.put(layers_.data(), layers_.size(), layers_.size());
    m.critics = arena_.put(critics.data(), critics.size(), critics.size());
  }

  PackedModel finish() const { return {precision_, model_, arena_.copy()}; }

 private:
  StackData stack(const std::vector<LinearView>& views) {
    const StackData data{static_cast<int>(layers_.size()), static_cast<int>(views.size())};
    for (std::size_t i = 0; i < views.size(); ++i) {
      const Index latents = i == 0 ? model_.latent_dim : views[i].in;
      // One neuron at the end is a critic's, which no product computes.
      const bool neuron = i > 0 && i + 1 == views.size() && !views[i].gamma && views[i].out == 1;
      layers_.push_back(layer(views[i], latents, neuron));
      if (i > 0) model_.widest_input = std::max(model_.widest_input, layers_.back().inputs);
      model_.widest = std::max(model_.widest, layers_.back().padded);
    }
    return data;
  }

  LayerData layer(const LinearView& view, Index latents, bool neuron) {
    LayerData data{};
    data.outputs = static_cast<int>(view.out);
    data.padded = round_up(data.outputs, kSide);
    data.latents = round_up(static_cast<int>(latents), kSide);
    data.inputs = data.latents + round_up(static_cast<int>(view.in - latents), kSide);
    const auto rows = static_cast<std::size_t>(data.inputs);
    const auto columns = static_cast<std::size_t>(data.padded);
    const Padded weight(view, data, latents);
    if (neuron) {
      data.weights = arena_.put(view.weight, static_cast<std::size_t>(view.in), rows);
    } else if (precision_ == Precision::bf16) {
      data.weights = arena_.take(rows * columns * sizeof(Bf16));
      put_fragments(weight, data, arena_.at(data.weights));
    } else {
      data.weights = arena_.take(rows * columns * sizeof(float));
      unsigned char* target = arena_.at(data.weights);
      for (int i = 0; i < data.inputs; ++i) {
        for (int o = 0; o < data.padded; ++o, target += sizeof(float)) {
          const float value = weight(o, i);
          std::memcpy(target, &value, sizeof value);
        }
      }
    }
    const auto put = [&](const float* values) {
      return arena_.put(values, static_cast<std::size_t>(view.out), columns);
    };
    data.bias = put(view.bias);
    if (view.gamma) {
      data.gamma = put(view.gamma);
      data.beta = put(view.beta);
    }
    return data;
  }

  Precision precision_;
  ModelData model_{};
  Arena arena_;
  std::vector<LayerData> layers_;
};

}  // namespace

PackedModel pack(const WorldModelView& view, Precision precision) {
  detail::check_view(view);
  if (!view.termination.empty()) {
    throw std::invalid_argument("termination: the CUDA kernels take no model with such a head");
  }
  return Packer(view, precision).finish();
}

const std::vector<int>& tile_rows(Precision precision) {
  static const std::vector<int> bf16{32, 16}, float32{16, 8};
  return precision == Precision::bf16 ? bf16 : float32;
}

std::size_t shared_bytes(const ModelData& model, Precision precision, int rows) {
  return precision == Precision::bf16 ? tile_layout<Bf16>(model, rows).bytes
                                      : tile_layout<float>(model, rows).bytes;
}

std::vector<int> fitting_rows(const ModelData& model, Precision precision, std::size_t limit,
                              const std::string& device) {
  std::vector<int> fitting;
  for (const int rows : tile_rows(precision)) {
    if (shared_bytes(model, precision, rows) <= limit) fitting.push_back(rows);
  }
  if (fitting.empty()) {
    const int rows = tile_rows(precision).back();
    throw std::invalid_argument("the model is too wide for " + device + " in " +
                                precision_name(precision) + ": " + std::to_string(rows) +
                                " rows of it take " +
                                std::to_string(shared_bytes(model, precision, rows)) +
                                " bytes of shared memory, the device has " + std::to_string(limit));
  }
  return fitting;
}

int choose_rows(const std::vector<int>& fitting, std::ptrdiff_t problems, std::ptrdiff_t samples,
                int processors) {
  for (const int rows : fitting) {
    if (problems * ((samples + rows - 1) / rows) >= processors) return rows;
  }
  return fitting.back();
}

}  // namespace iqmpc::gpu
