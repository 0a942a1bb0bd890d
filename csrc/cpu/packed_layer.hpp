// Linear layers in the layout the kernels read.
#pragma once

#include <initializer_list>
#include <vector>

#include "cpu/kernel_table.hpp"
#include "iqmpc/aligned_buffer.hpp"
#include "iqmpc/world_model.hpp"

namespace iqmpc::detail {

struct PackedLayer {
  Index in = 0;       // inputs as packed, a multiple of the table's step
  Index outputs = 0;  // of the layer itself: what LayerNorm divides by
  Index padded = 0;   // outputs as packed, whole panels
  // Panels of KernelTable::panel outputs; inside, `step` inputs of each output, then the next step.
  AlignedBuffer<unsigned char> panels;
  AlignedBuffer<float> bias, gamma, beta;  // [padded], zeros beyond the outputs
};

// SimNorm's features as the kernels order them: member v of group g is feature v * groups + g, with
// the groups padded to whole vectors, so that the softmax of a group works lane by lane.
//
// A group sums to one, so its last member is one minus the others and a layer that reads the
// features needs only the first dim - 1 members: W z = Σ (W_v - W_last) z_v + Σ_groups W_last, one
// product in `dim` less. For features that are no softmax, W_last (group's sum - 1) is missing from
// that: the excess.
struct SimNormLayout {
  Index dim;     // members of a group
  Index count;   // groups
  Index groups;  // groups, padded

  Index features() const { return dim * groups; }
  Index inputs() const { return (dim - 1) * groups; }
  Index feature(Index natural) const { return natural % dim * groups + natural / dim; }
};

// Which inputs a product has: its input k is the layer's input plus[k] less input minus[k], and -1
// stands for zero. As many as are packed, a multiple of the table's step.
struct PackInputs {
  std::vector<Index> plus, minus;

  void clear(Index count) {
    plus.assign(static_cast<std::size_t>(count), -1);
    minus.assign(static_cast<std::size_t>(count), -1);
  }
};

// Where a layer's outputs go, among `columns` in all.
struct PackOutputs {
  std::vector<Index> column;
  Index columns = 0;
};

struct PackProduct {
  const PackInputs& inputs;
  PackedLayer& layer;
};

// Packs one layer after the other, each into memory that an earlier one of its sizes may have left;
// keeps its own for the next. Where sizes repeat, nothing is allocated.
//
// Where the layer has a LayerNorm, the mean over its outputs is taken out of weights and bias here:
// LayerNorm subtracts it anyway, and the mean of W x + b is (mean W) x + mean b.
class LayerPacker {
 public:
  // All inputs in their order. `outputs` null: in their own order too.
  void pack(const KernelTable& kernels, const LinearView& view, const PackOutputs* outputs,
            PackedLayer& layer);

  // Several products with parts of one layer's inputs. The first has bias, gamma and beta, the
  // others are added to it. The weights of `ones.plus`, if given, are added to the bias.
  void pack(const KernelTable& kernels, const LinearView& view, const PackOutputs* outputs,
            std::initializer_list<PackProduct> products, const PackInputs* ones = nullptr);

 private:
  PackInputs all_;
  std::vector<const float*> rows_;   // of the weights, by column; null where a column is padding
  std::vector<float> mean_, bias_;   // by input; by column
  std::vector<double> sum_;          // by column of a panel
  AlignedBuffer<float> transposed_;  // [1 + in, panel], the first row zeros
};

}  // namespace iqmpc::detail
