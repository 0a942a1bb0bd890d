// A rollout's arguments as the kernels take them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/packed_model.hpp"
#include "iqmpc/cuda_rollout.hpp"

namespace iqmpc::gpu {

// On the device; arrays as in CudaRolloutView.
struct RolloutArgs {
  std::int64_t problems, horizon, samples;
  const float* z0;
  const float* actions;
  const float* noise;
  std::int64_t noise_steps;  // T of noise [E, T, S, A]
  std::int64_t noise_first;  // the step that draws ã_1
  const std::int64_t* pair;
  float discount;
  bool unrolled;
  float entropy_coef;
  // Work memory. [E, 3, widest]: what z_0 contributes to the first layers of d and the critics,
  // with the bias; [E]: β log π(ã_0|z_0).
  float* root;
  float* constant;
  float* returns;
};

// Work memory of so many problems.
std::size_t work_floats(const ModelData& model, std::ptrdiff_t problems);

// Throws std::invalid_argument for what cannot be.
RolloutArgs rollout_args(const ModelData& model, const CudaRolloutView& view);

}  // namespace iqmpc::gpu
