// MPPI over the latents of a world model (IQ-MPC, Algorithm 1): a whole plan in one call.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "iqmpc/export.hpp"
#include "iqmpc/world_model.hpp"

namespace iqmpc {

// What a plan with a budget reads the time from: microseconds, since whenever. Called from all of
// the planner's threads.
class IQMPC_API PlanClock {
 public:
  virtual ~PlanClock() = default;
  virtual double now() noexcept = 0;   // what deadlines are kept in
  virtual double used() noexcept = 0;  // by the calling thread: what estimates are made of
};

// Symbols as in the paper; E problems are planned for at once.
struct PlannerSettings {
  std::ptrdiff_t problems = 1;   // E
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
  std::shared_ptr<PlanClock> clock = nullptr;  // null: the machine's
};

struct PlanResult {
  std::ptrdiff_t iterations;  // whole ones
  std::ptrdiff_t samples;     // scored, in all iterations and problems
  std::ptrdiff_t nonfinite;   // problems without a finite score, given the policy's mean action
  bool missed;                // the budget had no room for any sample: see Planner::plan
  bool late;                  // it took longer than the budget
  double elapsed_us;          // what was spent before the call included
};

// Counts over a planner's plans.
struct IQMPC_API PlanStatistics {
  // Eight to an octave, from 1 µs: to some two minutes.
  static constexpr int kBuckets = 216;

  std::uint64_t plans = 0;
  std::uint64_t missed = 0;
  std::uint64_t late = 0;
  std::uint64_t nonfinite = 0;  // problems
  std::uint64_t iterations = 0;
  std::uint64_t samples = 0;
  double total_us = 0;
  double max_us = 0;
  // Plans whose time lay in [edge(b), edge(b + 1)) microseconds; the first and the last one also
  // count what lies below and above.
  std::array<std::uint64_t, kBuckets> histogram{};

  static double edge(int bucket) noexcept;

  void add(const PlanResult& result) noexcept;

  // A time that the share `q` in [0, 1] of the plans did not exceed, up to a bucket's width (9 %);
  // 0 without plans.
  double quantile_us(double q) const noexcept;
};

// The draws of one plan, for comparison with another implementation; all standard normal but where
// said otherwise.
struct PlanDraws {
  float* policy_noise;        // [E, H, P, A] of the policy's trajectories
  float* sample_noise;        // [I, E, H, S-P, A]
  float* policy_score_noise;  // [E, H-1, P, A] of ã_t along the policy's trajectories
  float* score_noise;         // [I, E, H-1, S-P, A] of ã_t along the samples
  float* explore;             // [E, A]
  float* gumbel;              // [E, elites], standard Gumbel
  std::ptrdiff_t pair[2];     // critics
};

// Owns its threads and every buffer: after construction, which with a budget includes some plans to
// learn what they take, a plan allocates nothing. Calls on one
// planner from several threads wait for each other, except publish, which a running plan does not
// notice. The same seed, step and state give the same plan on any number of threads.
class IQMPC_API Planner {
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
  // With a budget, the plan ends at its deadline: the call, less the `spent_us` microseconds that
  // the caller has used of the budget, plus the budget. Samples are scored in pieces of a block, as
  // many as are expected to leave time for the refit and the command. An iteration that is cut
  // short refits on the samples that it scored and, for the others, on those of the iteration
  // before; the first one on what it scored, with the same share of elites.
  // Without time for any sample, the action is the shifted previous plan's or, where there is none
  // (its mean is all zeros), the policy's mean, and the plan is `missed`. A budget that has no room
  // for encoder and policy is overrun by those, and the plan is `late`.
  PlanResult plan(const float* obs, bool explore, float* action, double spent_us = 0) noexcept;

  // Over all plans since the planner was made, or since they were cleared.
  PlanStatistics statistics() const;
  void clear_statistics() noexcept;

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
