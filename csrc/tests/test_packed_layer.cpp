// Packed layers against their definition, element by element and bit by bit.
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.hpp"
#include "cpu/packed_layer.hpp"
#include "cpu/packed_model.hpp"
#include "models.hpp"

namespace {

using iqmpc::Isa;
using iqmpc::LinearView;
using iqmpc::Precision;
using iqmpc::detail::Index;
using iqmpc::detail::KernelTable;
using iqmpc::detail::LayerPacker;
using iqmpc::detail::PackedLayer;
using iqmpc::detail::PackInputs;
using iqmpc::detail::PackOutputs;

struct Layer {
  Layer(Index out, Index in, bool normed)
      : weight(normal_floats(out * in, 1)),
        bias(normal_floats(out, 2)),
        gamma(normal_floats(out, 3)),
        beta(normal_floats(out, 4)) {
    view.weight = weight.data();
    view.bias = bias.data();
    if (normed) view.gamma = gamma.data(), view.beta = beta.data();
    view.out = out;
    view.in = in;
  }

  // What is packed: less the mean over the outputs where there is a LayerNorm.
  float centred(Index o, Index i) const {
    const float w = weight[o * view.in + i];
    if (!view.gamma) return w;
    double sum = 0;
    for (Index r = 0; r < view.out; ++r) {
      sum += static_cast<double>(weight[r * view.in + i]);
    }
    return w - static_cast<float>(sum / static_cast<double>(view.out));
  }

  std::vector<float> weight, bias, gamma, beta;
  LinearView view;
};

std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Whether column `column` and input `k` of a packed layer hold `expected`.
bool holds(const KernelTable& kernels, const PackedLayer& layer, Index column, Index k,
           float expected) {
  const Index panel = kernels.panel, step = kernels.step;
  const Index place = column / panel * panel * layer.in + k / step * step * panel +
                      column % panel * step + k % step;
  if (kernels.bf16_weights) {
    std::uint16_t half;
    std::memcpy(&half, layer.panels.data() + 2 * place, sizeof half);
    return half == to_bf16(expected);
  }
  return std::memcmp(layer.panels.data() + 4 * place, &expected, sizeof expected) == 0;
}

void check_layer(const KernelTable& kernels, LayerPacker& packer, const Layer& layer,
                 const PackOutputs* outputs, PackedLayer& packed) {
  const Index out = layer.view.out, in = layer.view.in;
  packer.pack(kernels, layer.view, outputs, packed);
  const Index columns = outputs ? outputs->columns : out;
  CHECK(packed.outputs == out && packed.in >= in && packed.in < in + kernels.step);
  CHECK(packed.padded >= columns && packed.padded < columns + kernels.panel);
  std::vector<Index> source(static_cast<std::size_t>(packed.padded), -1);
  for (Index o = 0; o < out; ++o) source[outputs ? outputs->column[o] : o] = o;
  for (Index c = 0; c < packed.padded; ++c) {
    const Index o = source[c];
    for (Index k = 0; k < packed.in; ++k) {
      const float expected = o < 0 || k >= in ? 0.0f : layer.centred(o, k);
      CHECK(holds(kernels, packed, c, k, expected));
    }
    if (layer.view.gamma) {
      CHECK(packed.gamma.data()[c] == (o < 0 ? 0 : layer.gamma[o]));
      CHECK(packed.beta.data()[c] == (o < 0 ? 0 : layer.beta[o]));
    } else {
      CHECK(packed.gamma.size() == 0 && packed.beta.size() == 0);
      CHECK(packed.bias.data()[c] == (o < 0 ? 0 : layer.bias[o]));
    }
    if (o < 0) CHECK(packed.bias.data()[c] == 0);
  }
}

// Sizes that are no multiple of a vector, a panel or a step, and memory that other sizes have left.
void layers_of_all_sizes(const KernelTable& kernels) {
  LayerPacker packer;
  PackedLayer packed;
  for (const Index out : {1, 2, 5, 16, 31, 32, 33, 67}) {
    for (const Index in : {1, 2, 7, 16, 17, 64, 65, 131}) {
      for (const bool normed : {false, true}) {
        const Layer layer(out, in, normed);
        check_layer(kernels, packer, layer, nullptr, packed);
        PackOutputs apart;  // every third column, backwards
        apart.columns = 3 * out + 1;
        for (Index o = 0; o < out; ++o) apart.column.push_back(3 * (out - 1 - o));
        check_layer(kernels, packer, layer, &apart, packed);
      }
    }
  }
}

// What is subtracted, left out and added to the bias where inputs are groups that sum to one.
void inputs_that_sum_to_one(const KernelTable& kernels) {
  const Index out = 37, in = 11;  // inputs 0-3 and 4-7 are groups, 8-10 something else
  const Layer layer(out, in, true);
  PackInputs most, lasts, others;
  most.clear(8);
  lasts.clear(2);
  others.clear(4);
  const Index members[] = {0, 4, 1, 5, 2, 6};
  for (std::size_t k = 0; k < 6; ++k) {
    most.plus[k] = members[k];
    most.minus[k] = members[k] < 4 ? 3 : 7;
  }
  lasts.plus = {3, 7};
  others.plus = {8, 9, 10, -1};
  PackedLayer z, excess, rest, whole;
  LayerPacker packer;
  packer.pack(kernels, layer.view, nullptr, {{most, z}, {lasts, excess}, {others, rest}}, &lasts);
  packer.pack(kernels, layer.view, nullptr, whole);
  CHECK(z.in == 8 && excess.in == 2 && rest.in == 4 && excess.bias.size() == 0);
  for (Index o = 0; o < out; ++o) {
    for (Index k = 0; k < 8; ++k) {
      const float expected =
          k < 6 ? layer.centred(o, members[k]) - layer.centred(o, members[k] < 4 ? 3 : 7) : 0.0f;
      CHECK(holds(kernels, z, o, k, expected));
    }
    for (Index k = 0; k < 2; ++k) CHECK(holds(kernels, excess, o, k, layer.centred(o, 4 * k + 3)));
    for (Index k = 0; k < 4; ++k) {
      CHECK(holds(kernels, rest, o, k, k < 3 ? layer.centred(o, 8 + k) : 0.0f));
    }
    const float added = static_cast<float>(static_cast<double>(layer.centred(o, 3)) +
                                           static_cast<double>(layer.centred(o, 7)));
    CHECK(z.bias.data()[o] == added + whole.bias.data()[o]);
    CHECK(z.gamma.data()[o] == layer.gamma[o]);
  }
}

// A weight that is not finite spoils its input for every output, but nothing that is padding.
void weights_that_are_not_finite(const KernelTable& kernels) {
  Layer layer(19, 5, true);
  layer.weight[3 * 5 + 2] = std::numeric_limits<float>::infinity();
  PackedLayer packed;
  LayerPacker().pack(kernels, layer.view, nullptr, packed);
  for (Index k = 0; k < packed.in; ++k) {
    CHECK(holds(kernels, packed, 0, k, 0.0f) == (k >= 5));
    for (Index c = 19; c < packed.padded; ++c) CHECK(holds(kernels, packed, c, k, 0.0f));
  }
  CHECK(holds(kernels, packed, 0, 2, -std::numeric_limits<float>::infinity()));
}

// A model packed over another one is the model packed alone.
void models_in_used_memory() {
  Sizes sizes, other;
  other.latent = 48;
  other.hidden = 21;
  other.critics = 2;
  other.termination = true;
  const RandomModel first(other), second(sizes, 1);
  for (const Precision precision : {Precision::float32, Precision::bf16}) {
    iqmpc::detail::ModelPacker packer;
    iqmpc::detail::PackedModel used, fresh;
    packer.pack(first.view, precision, iqmpc::active_isa(), used);
    CHECK(used.termination.has_value());
    packer.pack(second.view, precision, iqmpc::active_isa(), used);
    iqmpc::detail::ModelPacker().pack(second.view, precision, iqmpc::active_isa(), fresh);
    CHECK(used.critics.size() == 3 && !used.termination && used.widest == fresh.widest);
    const auto same = [](const PackedLayer& a, const PackedLayer& b) {
      CHECK(a.panels.size() == b.panels.size());
      CHECK(std::memcmp(a.panels.data(), b.panels.data(), a.panels.size()) == 0);
      CHECK(std::memcmp(a.bias.data(), b.bias.data(), 4 * a.bias.size()) == 0);
    };
    same(used.dynamics.first.z, fresh.dynamics.first.z);
    same(used.dynamics.rest.back(), fresh.dynamics.rest.back());
    same(used.critics[2].rest[0], fresh.critics[2].rest[0]);
    same(used.policy.back(), fresh.policy.back());
  }
}

}  // namespace

int main() {
  for (const Isa isa : iqmpc::isa_levels()) {
    for (const Precision precision : {Precision::float32, Precision::bf16}) {
      const KernelTable& kernels = iqmpc::detail::kernel_table(isa, precision);
      layers_of_all_sizes(kernels);
      inputs_that_sum_to_one(kernels);
      weights_that_are_not_finite(kernels);
    }
  }
  models_in_used_memory();
  return 0;
}
