// Rolling out the latent dynamics and scoring the soft returns of MPPI samples (IQ-MPC, eq. 15).
#pragma once

#include <cstddef>

#include "iqmpc/export.hpp"
#include "iqmpc/thread_pool.hpp"
#include "iqmpc/world_model.hpp"

namespace iqmpc {

enum class Score { advantage, unrolled };

// E problems of H steps and S samples; all arrays row-major and dense.
struct RolloutView {
  std::ptrdiff_t problems = 0;
  std::ptrdiff_t horizon = 0;
  std::ptrdiff_t samples = 0;
  const float* z0 = nullptr;           // [E, Z]
  const float* actions = nullptr;      // [E, H, S, A] in [-1, 1]
  const float* score_noise = nullptr;  // [E, H-1, S, A] or, unrolled, [E, H+1, S, A]
  std::ptrdiff_t critic_pair[2] = {0, 1};
  float discount = 0.99f;
  Score score = Score::advantage;
  float entropy_coef = 0;    // of the unrolled score
  float* returns = nullptr;  // [E, S]
};

// advantage: G = Q(z_0,a_0) + Σ_{t=1}^{H-1} γ^t (Q(z_t,a_t) - Q(z_t,ã_t)), ã_t ~ π(·|z_t).
//
// unrolled, in the same draws, is G - β log π(ã_0|z_0) with ã_0 of the first sample's first row of
// noise, and is computed so: every other V(z_t) meets itself with the opposite sign, the one at the
// horizon too, which is therefore not evaluated (and neither is z_H).
//
// Where the model has a termination head, an imagined latent whose logit is above 0 has no future:
// with c_t = 1 while none of z_1..z_t is such and 0 from then on, term t of the sum is taken c_t
// times. The unrolled form, where V(z_{t+1}) goes with the end of the episode too, still differs by
// the same constant.
//
// Throws std::invalid_argument where the horizon is below 1 or a critic does not exist.
IQMPC_API void rollout(const WorldModel& model, ThreadPool& pool, const RolloutView& view);

}  // namespace iqmpc
