// A world model in the layout the kernels read.
#pragma once

#include <optional>
#include <vector>

#include "cpu/packed_layer.hpp"

namespace iqmpc::detail {

// The first layer of a function of z or (z, a): one product for each, z's with the bias.
struct FirstLayer {
  PackedLayer z, a;
  PackedLayer excess;  // z's, for a z_0 from outside, which may be no softmax
};

struct Dynamics {
  FirstLayer first;
  std::vector<PackedLayer> rest;  // the last one gives SimNorm's logits
};

// A function with one output: a critic of (z, a), or the termination head of z.
struct Scalar {
  FirstLayer first;
  std::vector<PackedLayer> rest;  // hidden layers
  AlignedBuffer<float> w;         // the last layer, one neuron
  float bias = 0;
};

struct PackedModel {
  Precision precision;
  Isa isa;
  const KernelTable* kernels;  // of `precision`
  const KernelTable* exact;    // float32, for the encoder
  Index obs_dim, action_dim, latent_dim;
  Index action_pad;  // columns of a row of actions
  SimNormLayout simnorm;
  float log_std_min, log_std_max;
  Index widest = 0;  // columns of the widest layer, padded

  std::vector<PackedLayer> encoder;
  Dynamics dynamics;
  FirstLayer policy_first;          // without a
  std::vector<PackedLayer> policy;  // the others; the last gives μ in [0, action_pad), then s
  std::vector<Scalar> critics;
  std::optional<Scalar> termination;
};

// Packs models one after the other; not from two threads at once.
class ModelPacker {
 public:
  // Packs `view` for a level that isa_levels() lists into `model`, whose memory is used again where
  // the sizes are those of what it held before: nothing is allocated then. Throws
  // std::invalid_argument where the sizes do not fit together, and leaves `model` to be packed
  // again.
  void pack(const WorldModelView& view, Precision precision, Isa isa, PackedModel& model);

 private:
  LayerPacker layers_;
  PackOutputs features_, gaussian_;
  PackInputs latent_, excess_, action_;
};

}  // namespace iqmpc::detail
