// The rollout of iqmpc/rollout.hpp on a CUDA device. In builds with CUDA only: link iqmpc_cuda.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "iqmpc/rollout.hpp"
#include "iqmpc/world_model.hpp"

namespace iqmpc {

// Why no CUDA device can be used here, in words; empty where one can. Looks for a driver when
// called, and never before: a program that links this library starts without one.
std::string cuda_unavailable_reason();
bool cuda_available();

// Devices that the driver shows; 0 without a driver.
int cuda_device_count() noexcept;

// Throws std::runtime_error where there is no such device.
std::string cuda_device_name(int device);

struct CudaRolloutView;

// A snapshot of the parts of a model that a rollout reads, in the memory of one device. Immutable:
// any number of threads and streams may use it at once. Freeing it waits for the device.
class CudaWorldModel {
 public:
  // Packs and copies; returns when the copy is complete. Weights that are not finite are taken.
  // Throws std::invalid_argument where the sizes do not fit together or a tile of the model is
  // wider than the device's shared memory, and std::runtime_error, with CUDA's own words, where the
  // device cannot be used.
  CudaWorldModel(const WorldModelView& view, Precision precision, int device = 0);
  ~CudaWorldModel();
  CudaWorldModel(CudaWorldModel&&) noexcept;
  CudaWorldModel& operator=(CudaWorldModel&&) noexcept;

  std::ptrdiff_t action_dim() const noexcept;
  std::ptrdiff_t latent_dim() const noexcept;
  std::ptrdiff_t num_critics() const noexcept;
  Precision precision() const noexcept;
  int device() const noexcept;

  // Bytes of work memory that a rollout of so many problems takes.
  std::size_t work_bytes(std::ptrdiff_t problems) const noexcept;

 private:
  friend void cuda_rollout(const CudaWorldModel&, const CudaRolloutView&);
  struct State;
  std::unique_ptr<const State> state_;
};

// RolloutView in device memory. Everything lies on the model's device and stays untouched until the
// stream has passed the rollout.
struct CudaRolloutView {
  std::ptrdiff_t problems = 0;
  std::ptrdiff_t horizon = 0;
  std::ptrdiff_t samples = 0;
  const float* z0 = nullptr;           // [E, Z]
  const float* actions = nullptr;      // [E, H, S, A] in [-1, 1]
  const float* score_noise = nullptr;  // [E, H-1, S, A] or, unrolled, [E, H+1, S, A]
  // [2]. Drawn on the device, so not checked here: a critic that does not exist gives returns of
  // NaN, which a plan ranks last.
  const std::int64_t* critic_pair = nullptr;
  float discount = 0.99f;
  Score score = Score::advantage;
  float entropy_coef = 0;    // of the unrolled score
  float* returns = nullptr;  // [E, S]
  // work_bytes(problems), aligned to 16. The caller's, so that a call allocates nothing, rollouts
  // on several streams do not meet in it, and a CUDA graph can capture the call.
  void* work = nullptr;
  void* stream = nullptr;  // a cudaStream_t; null: the default stream
};

// As `rollout`, with the same meaning of both scores. Enqueues two kernels and returns; nothing
// waits for the device. What a row comes out as does not depend on the other rows.
//
// Throws std::invalid_argument where the horizon is below 1, a size is negative or a pointer is
// missing, and std::runtime_error where CUDA does not take the launch.
void cuda_rollout(const CudaWorldModel& model, const CudaRolloutView& view);

}  // namespace iqmpc
