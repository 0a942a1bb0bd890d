// Linear layers in the layout the kernels read.
#pragma once

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
  Index dim;      // members of a group
  Index count;    // groups
  Index groups;   // groups, padded

  Index features() const { return dim * groups; }
  Index inputs() const { return (dim - 1) * groups; }
  Index feature(Index natural) const { return natural % dim * groups + natural / dim; }
};

// Which inputs of a layer to pack, and where its outputs go.
struct PackRequest {
  Index first = 0;                       // first input
  Index count = 0;                       // inputs
  const SimNormLayout* inputs = nullptr;  // where these inputs are SimNorm's features
  bool excess = false;                   // of those, the last members' weights instead
  bool addend = false;                   // only a product: no bias, gamma or beta
  std::vector<Index> outputs;            // column of each output; empty: in their own order
  Index columns = 0;                     // columns in all; 0: as many as outputs
};

// Where the layer has a LayerNorm, the mean over its outputs is taken out of weights and bias here:
// LayerNorm subtracts it anyway, and the mean of W x + b is (mean W) x + mean b.
PackedLayer pack_layer(const KernelTable& kernels, const LinearView& view,
                       const PackRequest& request);

}  // namespace iqmpc::detail
