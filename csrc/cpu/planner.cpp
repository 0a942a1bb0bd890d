#include "iqmpc/planner.hpp"

#include <time.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/budget.hpp"
#include "cpu/calls.hpp"
#include "cpu/planner_checks.hpp"
#include "cpu/rollout.hpp"
#include "cpu/threefry.hpp"
#include "iqmpc/thread_pool.hpp"

namespace iqmpc {

namespace {

using detail::Index;

class MachineClock final : public PlanClock {
 public:
  double now() noexcept override {
    return std::chrono::duration<double, std::micro>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  // A thread's own time: that it was off its core for a moment says nothing about the work.
  double used() noexcept override {
#ifdef CLOCK_THREAD_CPUTIME_ID
    timespec time;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) {
      return 1e6 * static_cast<double>(time.tv_sec) + 1e-3 * static_cast<double>(time.tv_nsec);
    }
#endif
    return now();
  }
};

// What a draw is for; with the iteration, the number of its stream.
enum Stream : std::uint32_t { kPolicy, kSamples, kPolicyScore, kScore, kExplore, kGumbel, kPair };

struct Key {
  Key(std::uint64_t seed, std::uint64_t step)
      : words{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
              static_cast<std::uint32_t>(step), static_cast<std::uint32_t>(step >> 32)} {}

  static std::uint32_t stream(Stream kind, Index iteration) {
    return kind << 24 | static_cast<std::uint32_t>(iteration);
  }

  // One word; for the few draws that are not standard normal.
  std::uint32_t word(Stream kind, Index problem, Index element) const {
    std::uint32_t x[4] = {0, static_cast<std::uint32_t>(element), stream(kind, 0),
                          static_cast<std::uint32_t>(problem)};
    detail::threefry(words, x);
    return x[0];
  }

  float gumbel(Index problem, Index element) const {
    const double uniform = (word(kGumbel, problem, element) + 0.5) * 0x1p-32;
    return static_cast<float>(-std::log(-std::log(uniform)));
  }

  // Two different critics out of `count`.
  void pair(Index count, Index* pair) const {
    const auto below = [&](Index element, Index n) {
      return static_cast<Index>(
          std::uint64_t{word(kPair, 0, element)} * static_cast<std::uint64_t>(n) >> 32);
    };
    pair[0] = below(0, count);
    pair[1] = below(1, count - 1);
    if (pair[1] >= pair[0]) ++pair[1];
  }

  std::uint32_t words[4];
};

// The model that plans are computed on, and the memory of those before it.
class Models {
 public:
  using Model = std::shared_ptr<const detail::PackedModel>;

  explicit Models(Model first)
      : precision_(first->precision), isa_(first->isa), current_(std::move(first)) {}

  // The current model, until the end of the block. It is taken and given back under the lock, so
  // that one which nobody has any more is free to be packed anew.
  class Held {
   public:
    explicit Held(const Models& models) : mutex_(models.mutex_) {
      std::lock_guard<std::mutex> lock(mutex_);
      model_ = models.current_;
    }
    ~Held() {
      std::lock_guard<std::mutex> lock(mutex_);
      model_.reset();
    }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;
    const detail::PackedModel& operator*() const noexcept { return *model_; }

   private:
    std::mutex& mutex_;
    Model model_;
  };

  // Throws std::invalid_argument where `next` is not like the current one.
  void publish(Model next) {
    check_alike(*Held(*this), *next);
    std::lock_guard<std::mutex> lock(mutex_);
    current_.swap(next);  // what it was, is let go of after the lock
  }

  void publish(const WorldModelView& view) {
    std::lock_guard<std::mutex> packing(packing_);
    std::shared_ptr<detail::PackedModel> spare = unused();
    packer_.pack(view, precision_, isa_, *spare);
    publish(std::move(spare));
  }

 private:
  // A planner's buffers are made for its first model's sizes.
  static void check_alike(const detail::PackedModel& first, const detail::PackedModel& next);

  // One of our own that neither a plan nor the next one needs.
  std::shared_ptr<detail::PackedModel> unused() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (std::shared_ptr<detail::PackedModel>& model : own_) {
      if (!model) model = std::make_shared<detail::PackedModel>();
      if (model.use_count() == 1) return model;
    }
    return std::make_shared<detail::PackedModel>();
  }

  const Precision precision_;
  const Isa isa_;
  Model current_;
  // The current one, one that a plan has, one to pack.
  std::array<std::shared_ptr<detail::PackedModel>, 3> own_;
  mutable std::mutex mutex_;  // of the pointers and their counts
  std::mutex packing_;
  detail::ModelPacker packer_;
};

void Models::check_alike(const detail::PackedModel& first, const detail::PackedModel& next) {
  const auto same = [](const char* name, Index expected, Index got) {
    if (expected == got) return;
    throw std::invalid_argument("the published model's " + std::string(name) + " must be " +
                                std::to_string(expected) + " as the planner's, got " +
                                std::to_string(got));
  };
  same("obs_dim", first.obs_dim, next.obs_dim);
  same("action_dim", first.action_dim, next.action_dim);
  same("latent_dim", first.latent_dim, next.latent_dim);
  same("simnorm_dim", first.simnorm.dim, next.simnorm.dim);
  same("termination head (1 for one)", first.termination.has_value(), next.termination.has_value());
  same("widest layer (padded)", first.widest, next.widest);
  if (first.kernels != next.kernels) {
    throw std::invalid_argument("the published model must be " +
                                std::string(precision_name(first.precision)) + " for " +
                                isa_name(first.isa) + " as the planner's, got " +
                                precision_name(next.precision) + " for " + isa_name(next.isa));
  }
}

// The model without what else a WorldModel is.
Models::Model packed_of(std::shared_ptr<const WorldModel> model) {
  if (!model) throw std::invalid_argument("model must not be null");
  const detail::PackedModel* packed = &model->packed();
  return {std::move(model), packed};
}

}  // namespace

struct Planner::State {
  // One of the E problems.
  struct Problem {
    Problem(const detail::PackedModel& model, const PlannerSettings& s)
        : root(model),
          mean(size(s.horizon * model.action_pad)),
          std(size(s.horizon * model.action_pad)),
          actions(size(s.horizon * s.samples * model.action_pad)),
          returns(size(s.samples)),
          order(size(s.samples)),
          weight(size(s.elites)) {}

    static std::size_t size(Index n) { return static_cast<std::size_t>(n); }

    detail::Root root;
    AlignedBuffer<float> mean, std;  // [H, pad]
    AlignedBuffer<float> actions;    // [H, S, pad], the policy's trajectories first
    AlignedBuffer<float> returns;    // [S]
    std::vector<Index> order;        // samples; the elites first, best first
    std::vector<float> weight;       // of the elites, summing to 1, or all 0
    Index held = 0;                  // samples that have a score, of this or an earlier iteration
    Index elites = 0;                // as many of those
    bool finite = false;             // some score was
  };

  State(Models::Model first, const PlannerSettings& s, std::uint64_t seed)
      : settings(s),
        seed(seed),
        obs_dim(first->obs_dim),
        action_dim(first->action_dim),
        models(first),
        pool(s.threads),
        policy_blocks(s.problems, s.policy_trajectories, pool.threads()),
        sample_blocks(s.problems, s.samples - s.policy_trajectories, pool.threads()),
        clock(s.clock ? s.clock : std::make_shared<MachineClock>()),
        paces(static_cast<std::size_t>(pool.threads())),
        scored(static_cast<std::size_t>(policy_blocks.total() + sample_blocks.total())),
        mean(static_cast<std::size_t>(s.problems * s.horizon * action_dim)) {
    const detail::PackedModel& packed = *first;
    for (Index e = 0; e < s.problems; ++e) problems.emplace_back(packed, s);
    for (int t = 0; t < pool.threads(); ++t) workspaces.emplace_back(packed, s.horizon);
    const auto pad = static_cast<std::size_t>(packed.action_pad);
    command = AlignedBuffer<float>(pad);
    noise = AlignedBuffer<float>(pad);
    zeros = AlignedBuffer<float>(pad);
    if (s.enabled && s.budget_us > 0) warm_up(packed);
  }

  // How a plan runs, given what it runs on.
  struct Plan {
    const detail::PackedModel& model;
    const Key key;
    Index pair[2];
    double deadline;
  };

  void warm_up(const detail::PackedModel& model);
  PlanResult run(const float* obs, bool explore, double spent_us, float* action) noexcept;
  double used() const noexcept;
  bool room(const Plan& plan) noexcept;
  void shift(const Plan& plan, Index e) noexcept;
  bool planned(const Plan& plan, Index e) const noexcept;
  void begin(const Plan& plan, Index e, const float* obs, int thread) noexcept;
  void stand_in(const Plan& plan, Index e, const float* obs, int thread) noexcept;
  Index improve(const Plan& plan, Index iteration) noexcept;
  Index score_all(const Plan& plan, Index iteration) noexcept;
  Index to_score(Index iteration) const noexcept;
  template <class Score>
  Index score_in_time(const Plan& plan, Index rows, int thread, Score score) noexcept;
  void score_policy(const Plan& plan, Index e, Index first, Index rows, int thread) noexcept;
  void score_samples(const Plan& plan, Index iteration, Index e, Index first, Index rows,
                     int thread) noexcept;
  void refit(const Plan& plan, Index e) noexcept;
  void choose(const Plan& plan, Index e, bool explore, float* action) noexcept;

  const PlannerSettings settings;
  const std::uint64_t seed;
  const Index obs_dim, action_dim;
  std::uint64_t step = 0;
  Models models;
  std::mutex plan_mutex;
  std::atomic<int> calls{0};  // under way: those that take a mutex
  ThreadPool pool;
  const detail::Blocks policy_blocks, sample_blocks;
  const std::shared_ptr<PlanClock> clock;
  detail::Estimate beginning, ending;  // until the first sample; from the last one to the command
  double refit_began = 0;              // the last one, in used()
  std::vector<detail::Pace> paces;     // of each thread
  std::vector<Index> scored;           // rows of each block, in this iteration
  std::vector<Problem> problems;
  std::vector<detail::Workspace> workspaces;
  std::vector<float> mean;                     // [E, H, A]
  AlignedBuffer<float> command, noise, zeros;  // [pad], of one problem after the other
  PlanStatistics statistics;
};

// The previous plan, one step later.
void Planner::State::shift(const Plan& plan, Index e) noexcept {
  Problem& p = problems[e];
  const Index a = plan.model.action_dim, pad = plan.model.action_pad, horizon = settings.horizon;
  const float* previous = mean.data() + e * horizon * a;
  for (Index t = 0; t < horizon; ++t) {
    float* row = p.mean.data() + t * pad;
    if (t + 1 < horizon) {
      std::copy_n(previous + (t + 1) * a, a, row);
    } else {
      std::fill_n(row, a, 0.0f);
    }
  }
  p.held = 0;
  p.finite = true;
}

// Whether the shifted previous plan says anything.
bool Planner::State::planned(const Plan& plan, Index e) const noexcept {
  const float* first = problems[e].mean.data();
  return std::any_of(first, first + plan.model.action_dim, [](float x) { return x != 0; });
}

// Encodes and computes what all samples share; of a policy that acts alone, what that needs.
void Planner::State::begin(const Plan& plan, Index e, const float* obs, int thread) noexcept {
  Problem& p = problems[e];
  shift(plan, e);
  encode(plan.model, obs + e * plan.model.obs_dim, workspaces[thread], p.root);
  if (!settings.enabled) {
    head(plan.model, nullptr, workspaces[thread], p.root);
    return;
  }
  grow(plan.model, plan.pair, nullptr, workspaces[thread], p.root);
  std::fill_n(p.std.data(), p.std.size(), settings.std_max);
  if (settings.budget_us > 0) {
    std::fill_n(p.returns.data(), p.returns.size(), -std::numeric_limits<float>::infinity());
  }
}

// What a plan without time for a sample acts on.
void Planner::State::stand_in(const Plan& plan, Index e, const float* obs, int thread) noexcept {
  shift(plan, e);
  if (planned(plan, e)) return;
  encode(plan.model, obs + e * plan.model.obs_dim, workspaces[thread], problems[e].root);
  head(plan.model, nullptr, workspaces[thread], problems[e].root);
}

void Planner::State::score_policy(const Plan& plan, Index e, Index first, Index rows,
                                  int thread) noexcept {
  const Index total = settings.policy_trajectories, pad = plan.model.action_pad;
  Problem& p = problems[e];
  detail::Workspace& w = workspaces[thread];
  const auto draw = [&](Stream kind, Index t, float* out) {
    plan.model.kernels->fill_normal(plan.key.words, Key::stream(kind, 0),
                                    static_cast<std::uint32_t>(e), (t * total + first) * pad,
                                    rows * pad, out + t * rows * pad);
  };
  for (Index t = 0; t < settings.horizon; ++t) draw(kPolicy, t, w.policy_noise.data());
  for (Index t = 0; t + 1 < settings.horizon; ++t) draw(kPolicyScore, t, w.score_noise.data());
  const detail::Block task{settings.horizon,
                           rows,
                           p.actions.data() + first * pad,
                           settings.samples * pad,
                           w.score_noise.data(),
                           w.policy_noise.data(),
                           settings.discount,
                           p.returns.data() + first};
  score(plan.model, plan.pair, p.root, task, w);
}

void Planner::State::score_samples(const Plan& plan, Index iteration, Index e, Index first,
                                   Index rows, int thread) noexcept {
  const Index total = sample_blocks.count, pad = plan.model.action_pad;
  const Index place = settings.policy_trajectories + first;
  const detail::KernelTable& k = *plan.model.kernels;
  Problem& p = problems[e];
  detail::Workspace& w = workspaces[thread];
  const auto draw = [&](Stream kind, Index t, float* out) {
    k.fill_normal(plan.key.words, Key::stream(kind, iteration), static_cast<std::uint32_t>(e),
                  (t * total + first) * pad, rows * pad, out);
  };
  for (Index t = 0; t < settings.horizon; ++t) {
    float* actions = p.actions.data() + (t * settings.samples + place) * pad;
    draw(kSamples, t, actions);
    for (Index r = 0; r < rows; ++r) {
      k.affine_clamp(actions + r * pad, p.mean.data() + t * pad, p.std.data() + t * pad, pad);
    }
    if (t > 0) draw(kScore, t - 1, w.score_noise.data() + (t - 1) * rows * pad);
  }
  const detail::Block task{settings.horizon,
                           rows,
                           p.actions.data() + place * pad,
                           settings.samples * pad,
                           w.score_noise.data(),
                           nullptr,
                           settings.discount,
                           p.returns.data() + place};
  score(plan.model, plan.pair, p.root, task, w);
}

// `score(first, rows)` for a block's rows, or for as many of them as there is time for; how many.
template <class Score>
Index Planner::State::score_in_time(const Plan& plan, Index rows, int thread,
                                    Score score) noexcept {
  if (settings.budget_us == 0) {
    score(Index{0}, rows);
    return rows;
  }
  detail::Pace& pace = paces[thread];
  Index done = 0;
  while (done < rows) {
    const double left = plan.deadline - clock->now() - ending.upper();
    const Index piece = pace.fitting(rows - done, left);
    if (piece == 0) break;
    const double before = clock->used();
    score(done, piece);
    pace.observe(piece, clock->used() - before);
    done += piece;
  }
  return done;
}

// An iteration: its samples, or those that there is time for, are scored and refitted on; how many.
Index Planner::State::improve(const Plan& plan, Index iteration) noexcept {
  const Index scored = score_all(plan, iteration);
  if (scored > 0 || to_score(iteration) == 0) {
    refit_began = used();
    pool.run(settings.problems, [&](Index e, int) { refit(plan, e); });
  }
  return scored;
}

// The policy's trajectories are the same in every iteration, and so are their scores.
Index Planner::State::to_score(Index iteration) const noexcept {
  return settings.samples - (iteration > 0) * settings.policy_trajectories;
}

Index Planner::State::score_all(const Plan& plan, Index iteration) noexcept {
  const Index of_policies = iteration == 0 ? policy_blocks.total() : 0;
  const Index blocks = of_policies + sample_blocks.total();
  const auto problem_of = [&](Index block) {
    return block < of_policies ? policy_blocks.problem(block)
                               : sample_blocks.problem(block - of_policies);
  };
  pool.run(blocks, [&](Index block, int thread) {
    const bool of_policy = block < of_policies;
    const detail::Blocks& kind = of_policy ? policy_blocks : sample_blocks;
    const Index b = of_policy ? block : block - of_policies;
    const Index e = kind.problem(b), first = kind.first(b);
    scored[block] = score_in_time(plan, kind.rows(b), thread, [&](Index from, Index rows) {
      if (of_policy) {
        score_policy(plan, e, first + from, rows, thread);
      } else {
        score_samples(plan, iteration, e, first + from, rows, thread);
      }
    });
  });
  Index samples = 0;
  for (Index block = 0; block < blocks; ++block) {
    samples += scored[block];
    if (iteration == 0) problems[problem_of(block)].held += scored[block];
  }
  return samples;
}

// Mean and std of the best samples under the weights exp(η (G - max G)).
void Planner::State::refit(const Plan& plan, Index e) noexcept {
  Problem& p = problems[e];
  if (p.held == 0) return;
  // The same share of fewer samples.
  p.elites = (settings.elites * p.held + settings.samples - 1) / settings.samples;
  const Index elites = p.elites, horizon = settings.horizon;
  const Index pad = plan.model.action_pad, a = plan.model.action_dim;
  const float* returns = p.returns.data();
  std::iota(p.order.begin(), p.order.end(), Index{0});
  // A score that is not finite ranks last, whatever its sign.
  const auto rank = [returns](Index s) {
    return std::isfinite(returns[s]) ? returns[s] : -std::numeric_limits<float>::infinity();
  };
  // The sample's number breaks ties, so that the order is one.
  std::partial_sort(p.order.begin(), p.order.begin() + elites, p.order.end(),
                    [&](Index x, Index y) {
                      const float gx = rank(x), gy = rank(y);
                      return gx != gy ? gx > gy : x < y;
                    });
  const float best = rank(p.order[0]);
  p.finite = std::isfinite(best);
  double total = 0;
  for (Index i = 0; i < elites; ++i) {
    const float g = rank(p.order[i]);
    p.weight[i] = std::isfinite(g) ? std::exp(settings.temperature * (g - best)) : 0.0f;
    total += p.weight[i];
  }
  if (!p.finite) return;
  for (Index i = 0; i < elites; ++i) p.weight[i] = static_cast<float>(p.weight[i] / total);
  for (Index t = 0; t < horizon; ++t) {
    float* mean = p.mean.data() + t * pad;
    float* std = p.std.data() + t * pad;
    const auto each = [&](auto f) {
      for (Index i = 0; i < elites; ++i) {
        if (p.weight[i] == 0) continue;  // a weight of 0 does not silence a NaN
        const float* row = p.actions.data() + (t * settings.samples + p.order[i]) * pad;
        for (Index j = 0; j < a; ++j) f(j, p.weight[i], row[j]);
      }
    };
    std::fill_n(mean, a, 0.0f);
    each([&](Index j, float weight, float action) { mean[j] += weight * action; });
    std::fill_n(std, a, 0.0f);
    each([&](Index j, float weight, float action) {
      std[j] += weight * (action - mean[j]) * (action - mean[j]);
    });
    for (Index j = 0; j < a; ++j) {
      std[j] = std::clamp(std::sqrt(std[j]), settings.std_min, settings.std_max);
    }
  }
}

// The command: one elite's first action, drawn with the elites' weights, or what stands in for it.
void Planner::State::choose(const Plan& plan, Index e, bool explore, float* action) noexcept {
  Problem& p = problems[e];
  const Index a = plan.model.action_dim, pad = plan.model.action_pad;
  if (explore) {
    plan.model.kernels->fill_normal(plan.key.words, Key::stream(kExplore, 0),
                                    static_cast<std::uint32_t>(e), 0, pad, noise.data());
  }
  const float* epsilon = explore ? noise.data() : zeros.data();
  float* command = this->command.data();
  const auto from_policy = [&](const float* draw) {
    policy_at_root(plan.model, p.root, draw, command);
    return std::all_of(command, command + a, [](float x) { return std::isfinite(x); });
  };
  if (!settings.enabled) {
    p.finite = from_policy(epsilon);
  } else if (p.held == 0) {
    if (planned(plan, e)) {
      std::copy_n(p.mean.data(), a, command);
    } else {
      p.finite = from_policy(zeros.data());
    }
  } else if (p.finite) {
    // The largest log-weight plus Gumbel noise is a draw from the weights.
    Index pick = 0;
    float highest = -std::numeric_limits<float>::infinity();
    for (Index i = 0; i < p.elites; ++i) {
      const float value = std::log(p.weight[i]) + plan.key.gumbel(e, i);
      if (value > highest) highest = value, pick = i;
    }
    const float* chosen = p.actions.data() + p.order[pick] * pad;
    for (Index j = 0; j < a; ++j) command[j] = chosen[j] + p.std.data()[j] * epsilon[j];
  } else {
    from_policy(zeros.data());
  }
  for (Index j = 0; j < a; ++j) {
    action[e * a + j] = std::isfinite(command[j]) ? std::clamp(command[j], -1.0f, 1.0f) : 0.0f;
  }
  if (!settings.enabled) return;
  float* next = mean.data() + e * settings.horizon * a;
  for (Index t = 0; t < settings.horizon; ++t) {
    for (Index j = 0; j < a; ++j) next[t * a + j] = p.finite ? p.mean.data()[t * pad + j] : 0.0f;
  }
}

// Whether a sample of each problem is expected to be scored in time.
bool Planner::State::room(const Plan& plan) noexcept {
  if (settings.budget_us == 0 || !settings.enabled) return true;
  const Index first = (policy_blocks.total() > 0 ? policy_blocks : sample_blocks).rows(0);
  const double least = paces[0].upper(detail::Pace::least(first));
  return clock->now() + beginning.upper() + least + ending.upper() <= plan.deadline;
}

// The calling thread's time, of which estimates are made; without a budget there are none.
double Planner::State::used() const noexcept {
  return settings.budget_us > 0 ? clock->used() : 0.0;
}

PlanResult Planner::State::run(const float* obs, bool explore, double spent_us,
                               float* action) noexcept {
  const double start = clock->now() - spent_us;
  pool.wake();
  const Models::Held model(models);
  const Index problem_count = settings.problems;
  Plan plan{*model, Key(seed, step), {0, 1}, start + settings.budget_us};
  plan.key.pair(static_cast<Index>(plan.model.critics.size()), plan.pair);
  const bool timed = settings.budget_us > 0;

  PlanResult result{};
  const double began = used();
  if (room(plan)) {
    pool.run(problem_count, [&](Index e, int thread) { begin(plan, e, obs, thread); });
    if (timed) beginning.observe(used() - began);
    for (; settings.enabled && result.iterations < settings.iterations; ++result.iterations) {
      const Index samples = improve(plan, result.iterations);
      result.samples += samples;
      if (samples < problem_count * to_score(result.iterations)) break;
    }
  } else {
    pool.run(problem_count, [&](Index e, int thread) { stand_in(plan, e, obs, thread); });
  }

  for (Index e = 0; e < problem_count; ++e) {
    choose(plan, e, explore, action);
    result.nonfinite += !problems[e].finite;
    result.missed |= settings.enabled && problems[e].held == 0;
  }
  if (timed && result.samples > 0) ending.observe(used() - refit_began);
  if (timed && result.missed) {
    beginning.pass();
    ending.pass();
    for (detail::Pace& pace : paces) pace.pass();
  }
  result.elapsed_us = clock->now() - start;
  result.late = timed && result.elapsed_us > settings.budget_us;
  return result;
}

// Learns what everything takes, so that the first plan keeps to its budget as well.
void Planner::State::warm_up(const detail::PackedModel& model) {
  constexpr int kTimes = 3;
  const std::vector<float> obs(static_cast<std::size_t>(settings.problems * obs_dim));
  std::vector<float> action(static_cast<std::size_t>(settings.problems * action_dim));
  Plan plan{model, Key(seed, 0), {0, 1}, std::numeric_limits<double>::infinity()};
  const auto timed = [&](auto work, auto observe) {
    for (int i = 0; i <= kTimes; ++i) {
      const double before = clock->used();
      work();
      if (i > 0) observe(clock->used() - before);  // the first one finds cold memory
    }
  };
  timed(
      [&] { pool.run(settings.problems, [&](Index e, int t) { begin(plan, e, obs.data(), t); }); },
      [&](double time) { beginning.observe(time); });
  const bool of_policy = sample_blocks.total() == 0;
  const detail::Blocks& blocks = of_policy ? policy_blocks : sample_blocks;
  for (Index rows = blocks.rows(0); rows > 0; rows = detail::Pace::fewer(rows)) {
    timed(
        [&] {
          if (of_policy) {
            score_policy(plan, 0, 0, rows, 0);
          } else {
            score_samples(plan, 0, 0, 0, rows, 0);
          }
        },
        [&](double time) { paces[0].observe(rows, time); });
  }
  std::fill(paces.begin() + 1, paces.end(), paces[0]);
  for (Problem& p : problems) p.held = settings.samples;
  timed(
      [&] {
        pool.run(settings.problems, [&](Index e, int) { refit(plan, e); });
        for (Index e = 0; e < settings.problems; ++e) choose(plan, e, false, action.data());
      },
      [&](double time) { ending.observe(time); });
  std::fill(mean.begin(), mean.end(), 0.0f);
}

Planner::Planner(std::shared_ptr<const WorldModel> model, const PlannerSettings& settings,
                 std::uint64_t seed) {
  Models::Model packed = packed_of(std::move(model));
  detail::check(settings);
  state_ = std::make_unique<State>(std::move(packed), settings, seed);
}

Planner::~Planner() = default;

bool Planner::forked_while_busy() const noexcept {
  return state_->pool.forked() && state_->calls != 0;
}

void Planner::publish(std::shared_ptr<const WorldModel> model) {
  const detail::Call call(state_->calls);
  state_->models.publish(packed_of(std::move(model)));
}

void Planner::publish(const WorldModelView& view) {
  const detail::Call call(state_->calls);
  state_->models.publish(view);
}

PlanResult Planner::plan(const float* obs, bool explore, float* action, double spent_us) noexcept {
  const double called = state_->clock->now();
  const detail::ExclusiveCall call(state_->calls, state_->plan_mutex);
  const double waited = state_->clock->now() - called;
  const PlanResult result = state_->run(obs, explore, spent_us + waited, action);
  ++state_->step;
  state_->statistics.add(result);
  return result;
}

PlanStatistics Planner::statistics() const {
  const detail::ExclusiveCall call(state_->calls, state_->plan_mutex);
  return state_->statistics;
}

void Planner::clear_statistics() noexcept {
  const detail::ExclusiveCall call(state_->calls, state_->plan_mutex);
  state_->statistics = {};
}

double PlanStatistics::edge(int bucket) noexcept { return std::exp2(bucket / 8.0); }

void PlanStatistics::add(const PlanResult& result) noexcept {
  ++plans;
  missed += result.missed;
  late += result.late;
  nonfinite += static_cast<std::uint64_t>(result.nonfinite);
  iterations += static_cast<std::uint64_t>(result.iterations);
  samples += static_cast<std::uint64_t>(result.samples);
  total_us += result.elapsed_us;
  max_us = std::max(max_us, result.elapsed_us);
  const double octaves = std::log2(std::max(result.elapsed_us, 1.0));
  ++histogram[static_cast<std::size_t>(std::min(8 * octaves, kBuckets - 1.0))];
}

double PlanStatistics::quantile_us(double q) const noexcept {
  std::uint64_t below = 0;
  for (int b = 0; b < kBuckets; ++b) {
    below += histogram[static_cast<std::size_t>(b)];
    if (below > 0 && static_cast<double>(below) >= q * static_cast<double>(plans)) {
      return std::min(edge(b + 1), max_us);
    }
  }
  return max_us;
}

void Planner::reset(std::ptrdiff_t problem) {
  const Index envs = state_->settings.problems;
  if (problem < 0 || problem >= envs) {
    throw std::out_of_range("problem must lie in [0, " + std::to_string(envs) + "), got " +
                            std::to_string(problem));
  }
  const detail::ExclusiveCall call(state_->calls, state_->plan_mutex);
  const Index each = static_cast<Index>(state_->mean.size()) / envs;
  std::fill_n(state_->mean.begin() + problem * each, each, 0.0f);
}

void Planner::reset() noexcept {
  const detail::ExclusiveCall call(state_->calls, state_->plan_mutex);
  std::fill(state_->mean.begin(), state_->mean.end(), 0.0f);
}

float* Planner::mean() noexcept { return state_->mean.data(); }
std::uint64_t Planner::step() const noexcept { return state_->step; }
void Planner::set_step(std::uint64_t step) noexcept { state_->step = step; }
const PlannerSettings& Planner::settings() const noexcept { return state_->settings; }
std::ptrdiff_t Planner::obs_dim() const noexcept { return state_->obs_dim; }
std::ptrdiff_t Planner::action_dim() const noexcept { return state_->action_dim; }

void Planner::draws(std::uint64_t step, PlanDraws& draws) const {
  const PlannerSettings& s = state_->settings;
  const detail::Call call(state_->calls);
  const Models::Held model(state_->models);
  const detail::PackedModel& packed = *model;
  const Index pad = packed.action_pad, a = packed.action_dim;
  const Key key(state_->seed, step);
  std::vector<float> row(static_cast<std::size_t>(pad));
  // [steps, rows, A] of one problem's stream
  const auto fill = [&](Stream kind, Index iteration, Index e, Index rows, float*& out) {
    for (Index r = 0; r < rows; ++r, out += a) {
      packed.kernels->fill_normal(key.words, Key::stream(kind, iteration),
                                  static_cast<std::uint32_t>(e), r * pad, pad, row.data());
      std::copy_n(row.data(), a, out);
    }
  };
  const Index rest = s.samples - s.policy_trajectories;
  float *policy = draws.policy_noise, *policy_score = draws.policy_score_noise;
  float* explore = draws.explore;
  for (Index e = 0; e < s.problems; ++e) {
    fill(kPolicy, 0, e, s.horizon * s.policy_trajectories, policy);
    fill(kPolicyScore, 0, e, (s.horizon - 1) * s.policy_trajectories, policy_score);
    fill(kExplore, 0, e, 1, explore);
    for (Index i = 0; i < s.elites; ++i) draws.gumbel[e * s.elites + i] = key.gumbel(e, i);
  }
  float *samples = draws.sample_noise, *score = draws.score_noise;
  for (Index i = 0; i < s.iterations; ++i) {
    for (Index e = 0; e < s.problems; ++e) {
      fill(kSamples, i, e, s.horizon * rest, samples);
      fill(kScore, i, e, (s.horizon - 1) * rest, score);
    }
  }
  key.pair(static_cast<Index>(packed.critics.size()), draws.pair);
}

}  // namespace iqmpc
