// MPPI over the latents of a world model (IQ-MPC, Algorithm 1): a whole plan in one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "iqmpc/world_model.hpp"

namespace iqmpc {

// Symbols as in the paper; E problems are planned for at once.
struct PlannerSettings {
  std::ptrdiff_t num_envs = 1;   // E
  std::ptrdiff_t horizon = 3;    // H
  std::ptrdiff_t samples = 512;  // S
  std::ptrdiff_t elites = 64;
  std::ptrdiff_t policy_trajectories = 24;  // P, of the S samples
  std::ptrdiff_t iterations = 6;            // I
  float temperature = 0.5f;                 // η
  float std_min = 0.05f;
  float std_max = 2.0f;
  float discount = 0.99f;  // γ
  bool enabled = true;     // false: act with the policy prior
  int threads = 1;
  double budget_us = 0;  // microseconds a plan may take; 0: as long as it takes
};

struct PlanResult {
  std::ptrdiff_t iterations;  // done
  std::ptrdiff_t nonfinite;   // problems without a finite score, given the policy's mean action
  bool missed;                // the budget had no room for one iteration: see Planner::plan
  double elapsed_us;
};

// The draws of one plan, for comparison with another implementation; all standard normal but where
// said otherwise.
struct PlanDraws {
  float* prior;            // [E, H, P, A] of the policy's trajectories
  float* samples;          // [I, E, H, S-P, A]
  float* prior_score;      // [E, H-1, P, A] of ã_t along the policy's trajectories
  float* score;            // [I, E, H-1, S-P, A] of ã_t along the samples
  float* explore;          // [E, A]
  float* gumbel;           // [E, elites], standard Gumbel
  std::ptrdiff_t pair[2];  // critics
};

// Owns its threads and every buffer: after construction a plan allocates nothing. Calls on one
// planner from several threads wait for each other, except publish, which a running plan does not
// notice. The same seed, step and state give the same plan on any number of threads.
class Planner {
 public:
  // Throws std::invalid_argument for settings that cannot be.
  Planner(std::shared_ptr<const WorldModel> model, const PlannerSettings& settings,
          std::uint64_t seed);
  ~Planner();

  // Plans from now on with `model`; the one before lives until a plan that uses it has ended.
  // Throws std::invalid_argument where its sizes, precision or level differ from the first one's.
  void publish(std::shared_ptr<const WorldModel> model);

  // The same with the model that `view` shows now, packed in the planner's precision and level into
  // memory that earlier such models have left: after the third time nothing is allocated. Throws
  // what packing and publishing a WorldModel would.
  void publish(const WorldModelView& view);

  // obs [E, O] -> action [E, A] in [-1, 1]; `explore` adds std_0 ε. Never non-finite.
  //
  // With a budget, another iteration starts only if it is expected to end in time; the plan is the
  // best so far. Without time for even one, the action is the shifted previous plan's or, where
  // there is none (its mean is all zeros), the policy's mean, and the plan is `missed`.
  PlanResult plan(const float* obs, bool explore, float* action) noexcept;

  // Times iterations on zeros, so that the first plan with a budget knows what one takes.
  // Changes neither step nor mean.
  void warm_up() noexcept;

  // Whether this process was forked in the middle of a call, which will never end here: nothing but
  // the destructor may then be called.
  bool forked_while_busy() const noexcept;

  // Forget the previous plan: of one problem, or of all. Throws std::out_of_range.
  void reset(std::ptrdiff_t problem);
  void reset() noexcept;

  // The mean of the last plan [E, H, A], and the number of plans: with the seed, all the state
  // there is. Not to be touched while a plan runs.
  float* mean() noexcept;
  std::uint64_t step() const noexcept;
  void set_step(std::uint64_t step) noexcept;

  // What plan number `step` draws.
  void draws(std::uint64_t step, PlanDraws& draws) const;

  const PlannerSettings& settings() const noexcept;
  std::ptrdiff_t obs_dim() const noexcept;     // O
  std::ptrdiff_t action_dim() const noexcept;  // A

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace iqmpc
