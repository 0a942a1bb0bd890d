// The world model of IQ-MPC, packed once for planning.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "iqmpc/export.hpp"
#include "iqmpc/isa.hpp"

namespace iqmpc {

namespace detail {
struct PackedModel;
}

// One linear layer, followed by a LayerNorm where gamma and beta are given. weight [out, in] is
// row-major, bias, gamma and beta [out]. Borrowed: read while a model is built and not after.
struct LinearView {
  const float* weight = nullptr;
  const float* bias = nullptr;
  const float* gamma = nullptr;
  const float* beta = nullptr;
  std::ptrdiff_t out = 0;
  std::ptrdiff_t in = 0;
};

// The parts of a model: the encoder h (O -> Z), the dynamics d (Z + A -> Z), the policy prior π
// (Z -> 2A: means, then the log-std before its tanh) and K critics (Z + A -> 1). Every layer has a
// LayerNorm but the policy's and the critics' last ones. The encoder may be empty: observations are
// then latents z_0 (O = Z) that were encoded elsewhere. Optionally a termination head (Z -> 1, as a
// critic without actions): the logit of a latent being terminal.
struct WorldModelView {
  std::vector<LinearView> encoder, dynamics, policy;
  std::vector<std::vector<LinearView>> critics;
  std::vector<LinearView> termination;  // empty: no latent is terminal
  std::ptrdiff_t simnorm_dim = 8;
  float log_std_min = -10.0f;
  float log_std_max = 2.0f;
};

// An immutable snapshot, shared freely between threads and planners; it owns all it needs. Weights
// that are not finite are taken: what they make non-finite is ranked last by a plan.
class IQMPC_API WorldModel {
 public:
  // Throws std::invalid_argument where the sizes do not fit together or the machine does not run
  // `isa`. The encoder is kept in float32, whatever the precision: it sees raw observations.
  WorldModel(const WorldModelView& view, Precision precision, Isa isa = active_isa());
  ~WorldModel();
  WorldModel(WorldModel&&) noexcept;
  WorldModel& operator=(WorldModel&&) noexcept;

  std::ptrdiff_t obs_dim() const noexcept;
  std::ptrdiff_t action_dim() const noexcept;
  std::ptrdiff_t latent_dim() const noexcept;
  std::ptrdiff_t num_critics() const noexcept;
  bool has_termination() const noexcept;
  Precision precision() const noexcept;
  Isa isa() const noexcept;

  const detail::PackedModel& packed() const noexcept { return *packed_; }

 private:
  std::unique_ptr<const detail::PackedModel> packed_;
};

}  // namespace iqmpc
