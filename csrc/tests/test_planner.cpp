#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "allocations.hpp"
#include "check.hpp"
#include "iqmpc/planner.hpp"
#include "iqmpc/rollout.hpp"
#include "models.hpp"

namespace {

using iqmpc::Planner;
using iqmpc::PlannerSettings;
using Floats = std::vector<float>;

PlannerSettings settings(int threads = 2) {
  PlannerSettings s;
  s.problems = 2;
  s.samples = 70;
  s.elites = 9;
  s.policy_trajectories = 11;
  s.iterations = 3;
  s.threads = threads;
  return s;
}

Floats run(Planner& planner, int plans) {
  Floats actions, action(2 * 3);
  for (int i = 0; i < plans; ++i) {
    const Floats obs = normal_floats(2 * 5, 100 + static_cast<unsigned>(i));
    const iqmpc::PlanResult result = planner.plan(obs.data(), i % 2 == 1, action.data());
    CHECK(result.iterations == 3 && result.nonfinite == 0 && !result.missed);
    actions.insert(actions.end(), action.begin(), action.end());
  }
  return actions;
}

void same_plan_on_any_thread_count() {
  const RandomModel model({});
  for (const iqmpc::Precision precision : {iqmpc::Precision::float32, iqmpc::Precision::bf16}) {
    Floats first;
    for (const int threads : {1, 2, 5}) {
      Planner planner(model.pack(precision), settings(threads), 3);
      const Floats actions = run(planner, 4);
      CHECK(std::all_of(actions.begin(), actions.end(), [](float a) { return std::abs(a) <= 1; }));
      if (first.empty()) first = actions;
      CHECK(actions == first);
    }
  }
}

void no_allocation_after_construction() {
  const RandomModel model({});
  for (const double budget : {0.0, 1e9, 1e-3}) {
    PlannerSettings s = settings();
    s.budget_us = budget;
    Planner planner(model.pack(), s, 3);
    const Floats obs = normal_floats(2 * 5, 1);
    Floats action(2 * 3);
    const long before = allocations;
    for (int i = 0; i < 50; ++i) {
      if (i % 10 == 0) planner.reset(i % 20 / 10);
      const iqmpc::PlanResult result = planner.plan(obs.data(), i % 2 == 1, action.data());
      CHECK(result.missed == (budget == 1e-3));
    }
    CHECK(allocations == before);
  }
  const long before = allocations;
  ::operator delete(::operator new(1));
  CHECK(allocations > before);  // the count counts
}

// A view is packed into memory that published models have left, once there are enough of those.
void publishing_a_view() {
  RandomModel model({}), other({}, 1);
  for (const iqmpc::Precision precision : {iqmpc::Precision::float32, iqmpc::Precision::bf16}) {
    Planner planner(model.pack(precision), settings(), 3);
    Planner expected(other.pack(precision), settings(), 3);
    for (int i = 0; i < 3; ++i) planner.publish(i % 2 ? model.view : other.view);
    const long before = allocations;
    for (int i = 0; i < 10; ++i) planner.publish(i % 2 ? other.view : model.view);
    CHECK(allocations == before);
    CHECK(run(planner, 4) == run(expected, 4));
  }
  Sizes wider;
  wider.action = 4;
  const RandomModel unlike(wider);
  Planner planner(model.pack(), settings(), 3), expected(model.pack(), settings(), 3);
  CHECK(message_of<std::invalid_argument>([&] { planner.publish(unlike.view); }) ==
        "the published model's action_dim must be 3 as the planner's, got 4");
  other.view.policy.pop_back();
  CHECK(message_of<std::invalid_argument>([&] { planner.publish(other.view); }) ==
        "policy layer 1: needs weight and bias, and has no LayerNorm");
  CHECK(run(planner, 4) == run(expected, 4));  // nothing of either was published
}

// Time that passes by being measured: whatever work is, it takes `tick` microseconds, and `stall`
// more where the deadline is looked at for the `until_stall`th time from now.
struct Ticking final : iqmpc::PlanClock {
  double now() noexcept override {
    if (until_stall > 0 && --until_stall == 0) time += stall;
    return time;
  }
  double used() noexcept override { return work += tick, time += tick, work; }

  double tick = 1, stall = 0, time = 0, work = 0;
  int until_stall = 0;
};

// One problem whose observations are latents, on one thread with a clock of its own.
struct Timed {
  explicit Timed(double budget, Sizes sizes = {}) : model(sizes) {
    model.view.encoder.clear();
    s = settings(1);
    s.problems = 1;
    s.policy_trajectories = 0;
    s.budget_us = budget;
    s.clock = clock;
    z = normal_floats(24, 1);
    for (std::size_t g = 0; g < z.size(); g += 8) {
      float sum = 0;
      for (std::size_t i = g; i < g + 8; ++i) sum += z[i] = std::exp(z[i]);
      for (std::size_t i = g; i < g + 8; ++i) z[i] /= sum;
    }
  }
  Planner planner() const { return Planner(model.pack(), s, 3); }

  RandomModel model;
  std::shared_ptr<Ticking> clock = std::make_shared<Ticking>();
  PlannerSettings s;
  Floats z;
  Floats action = Floats(3);
};

void a_budget_is_kept_to_and_used() {
  std::ptrdiff_t before = 0;
  int cut = 0;
  for (double budget = 6; budget < 60; ++budget) {
    Timed t(budget);
    Planner planner = t.planner();
    iqmpc::PlanResult result{};
    for (int i = 0; i < 40; ++i) {
      result = planner.plan(t.z.data(), false, t.action.data());
      // The first reading of a piece of work and that of the refit are in no estimate.
      CHECK(result.elapsed_us <= budget + 2 * t.clock->tick);
      CHECK(result.late == (result.elapsed_us > budget));
      CHECK(result.missed == (result.samples == 0));
      CHECK(result.iterations == result.samples / t.s.samples);
    }
    CHECK(result.samples >= before);
    before = result.samples;
    cut += result.samples % t.s.samples != 0;
  }
  CHECK(before == 3 * 70 && cut > 0);

  // What the caller has spent counts.
  Timed t(60);
  Planner planner = t.planner();
  const iqmpc::PlanResult cut_short = planner.plan(t.z.data(), false, t.action.data(), 50);
  CHECK(cut_short.samples < 3 * 70 && cut_short.elapsed_us > 50);
  const iqmpc::PlanResult late = planner.plan(t.z.data(), false, t.action.data(), 61);
  CHECK(late.missed && late.late && late.elapsed_us > 61);
  const iqmpc::PlanStatistics found = planner.statistics();
  CHECK(found.plans == 2 && found.missed == 1 && found.late == 1u + cut_short.late);
  CHECK(found.max_us == late.elapsed_us && found.quantile_us(1) == late.elapsed_us);
  CHECK(found.quantile_us(0.5) >= cut_short.elapsed_us);
  CHECK(found.quantile_us(0.5) <= 1.1 * cut_short.elapsed_us);
  planner.clear_statistics();
  CHECK(planner.statistics().plans == 0 && planner.statistics().quantile_us(0.5) == 0);
}

// mean and std [H, A] refitted on the `elites` best of actions [H, S, A] with `returns` [S].
void refit(const Floats& actions, const Floats& returns, std::size_t elites, Floats& mean,
           Floats& std) {
  const std::size_t samples = returns.size();
  std::vector<std::size_t> order(samples);
  for (std::size_t i = 0; i < samples; ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](std::size_t x, std::size_t y) { return returns[x] > returns[y]; });
  for (std::size_t t = 0; t < 3; ++t) {
    for (std::size_t j = 0; j < 3; ++j) {
      double total = 0, first = 0, second = 0;
      for (std::size_t i = 0; i < elites; ++i) {
        const double w = std::exp(0.5 * (returns[order[i]] - returns[order[0]]));
        const double a = actions[(t * samples + order[i]) * 3 + j];
        total += w, first += w * a, second += w * a * a;
      }
      first /= total;
      mean[t * 3 + j] = static_cast<float>(first);
      const double variance = std::max(second / total - first * first, 0.0);
      std[t * 3 + j] = static_cast<float>(std::clamp(std::sqrt(variance), 0.05, 2.0));
    }
  }
}

// Where an iteration was cut short, its plan is what its samples and, for the others, those of the
// iteration before it give.
void a_cut_iteration_refits_on_what_was_scored() {
  int cut_in[3] = {};
  for (double budget = 6; budget < 60; ++budget) {
    Timed t(budget);
    Planner planner = t.planner();
    planner.plan(t.z.data(), false, t.action.data());
    planner.reset();
    const std::uint64_t step = planner.step();
    const iqmpc::PlanResult result = planner.plan(t.z.data(), false, t.action.data());
    if (result.missed) continue;

    const std::size_t all = 70, n = static_cast<std::size_t>(result.samples);
    Floats samples(3 * 3 * all * 3), score(3 * 2 * all * 3), explore(3), gumbel(9);
    iqmpc::PlanDraws draws{nullptr,        samples.data(), nullptr, score.data(),
                           explore.data(), gumbel.data(),  {0, 0}};
    planner.draws(step, draws);
    const auto model = t.model.pack();
    iqmpc::ThreadPool pool(1);
    Floats mean(9), std(9, 2.0f), actions(3 * all * 3), returns(all);
    for (std::size_t i = 0, left = n; left > 0; ++i) {
      const std::size_t now = std::min(left, all), held = i == 0 ? now : all;
      left -= now;
      for (std::size_t k = 0; k < 3; ++k) {
        for (std::size_t r = 0; r < now; ++r) {
          for (std::size_t j = 0; j < 3; ++j) {
            const float noise = samples[((i * 3 + k) * all + r) * 3 + j];
            actions[(k * all + r) * 3 + j] =
                std::clamp(mean[k * 3 + j] + std[k * 3 + j] * noise, -1.0f, 1.0f);
          }
        }
      }
      Floats rescored(all);
      iqmpc::RolloutView view;
      view.problems = 1;
      view.horizon = 3;
      view.samples = static_cast<std::ptrdiff_t>(all);
      view.z0 = t.z.data();
      view.actions = actions.data();
      view.score_noise = score.data() + i * 2 * all * 3;
      view.critic_pair[0] = draws.pair[0];
      view.critic_pair[1] = draws.pair[1];
      view.discount = t.s.discount;
      view.returns = rescored.data();
      iqmpc::rollout(*model, pool, view);
      std::copy_n(rescored.begin(), now, returns.begin());
      if (i == 0) std::fill(returns.begin() + static_cast<long>(now), returns.end(), -1e9f);
      refit(actions, returns, (9 * held + all - 1) / all, mean, std);
      if (now < all) ++cut_in[i];
    }
    for (std::size_t k = 0; k < 9; ++k) CHECK(std::abs(planner.mean()[k] - mean[k]) < 1e-3f);
  }
  CHECK(cut_in[0] > 0 && cut_in[1] > 0 && cut_in[2] > 0);
}

// With several problems and threads too, every problem gets its share, and the action is a number.
void a_cut_plan_for_several_problems() {
  const RandomModel model({});
  for (const int threads : {1, 3}) {
    for (const double budget : {8.0, 12.0, 16.0, 24.0, 1e9}) {
      PlannerSettings s = settings(threads);
      s.problems = 4;
      s.budget_us = budget;
      const auto clock = std::make_shared<Ticking>();
      if (threads == 1) s.clock = clock;
      Planner planner(model.pack(), s, 3);
      const Floats obs = normal_floats(4 * 5, 1);
      for (int i = 0; i < 20; ++i) {
        Floats action(4 * 3, 42.0f);
        const iqmpc::PlanResult result = planner.plan(obs.data(), true, action.data());
        CHECK(result.nonfinite == 0 && result.samples <= 4 * (11 + 3 * 59));
        CHECK(std::all_of(action.begin(), action.end(), [](float a) { return std::abs(a) <= 1; }));
      }
    }
  }
}

void a_stall_is_late_and_teaches_nothing() {
  Timed t(60);
  Planner planner = t.planner();
  for (int i = 0; i < 40; ++i) planner.plan(t.z.data(), false, t.action.data());
  const std::ptrdiff_t before = planner.plan(t.z.data(), false, t.action.data()).samples;
  t.clock->stall = 1e6;
  t.clock->until_stall = 6;  // in the middle
  const iqmpc::PlanResult result = planner.plan(t.z.data(), false, t.action.data());
  CHECK(result.late && result.samples < before);
  CHECK(planner.plan(t.z.data(), false, t.action.data()).samples == before);
  CHECK(planner.statistics().late == 1);
}

// Where no sample fits, one plan in 2,000 is spent on finding out whether that is still so.
void a_slow_machine_is_asked_seldom() {
  Timed t(60);
  t.clock->tick = 25;  // time to encode, and for nothing more
  Planner planner = t.planner();
  int tried = 0;
  for (int i = 0; i < 10000; ++i) {
    const iqmpc::PlanResult result = planner.plan(t.z.data(), false, t.action.data());
    tried += result.samples > 0;
    CHECK(result.late == (result.samples > 0));
  }
  CHECK(tried > 0 && tried <= 5);
  t.clock->tick = 1;
  int until = 0;
  while (planner.plan(t.z.data(), false, t.action.data()).samples == 0) ++until;
  CHECK(until <= 2000);
  for (int i = 0; i < 10; ++i) {
    CHECK(planner.plan(t.z.data(), false, t.action.data()).samples == 3 * 70);
  }
}

void weights_that_are_not_finite() {
  RandomModel model({});
  model.fill(std::numeric_limits<float>::quiet_NaN());
  Planner planner(model.pack(), settings(), 3);
  const Floats obs = normal_floats(2 * 5, 1);
  Floats action(2 * 3, 42.0f);
  CHECK(planner.plan(obs.data(), true, action.data()).nonfinite == 2);
  CHECK(std::all_of(action.begin(), action.end(), [](float a) { return a == 0; }));
}

void publishing_while_plans_run() {
  const RandomModel model({}), other({}, 1);
  Planner planner(model.pack(), settings(), 3);
  std::atomic<bool> stop{false};
  std::thread publisher([&] {
    while (!stop) {
      planner.publish(other.pack());
      planner.publish(model.view);
      planner.publish(other.view);
      planner.publish(model.pack());
    }
  });
  run(planner, 60);
  stop = true;
  publisher.join();
}

// Every plan is one of the two models' whole, whichever it found.
void a_running_plan_keeps_its_model() {
  const RandomModel model({}), other({}, 1);
  PlannerSettings s = settings();
  s.problems = 1;
  const Floats obs = normal_floats(5, 1);
  const auto plan = [&](Planner& planner) {
    Floats action(3);
    planner.set_step(0);
    planner.reset();
    planner.plan(obs.data(), false, action.data());
    return action;
  };
  Planner one(model.pack(), s, 3), two(other.pack(), s, 3), planner(model.pack(), s, 3);
  const Floats possible[] = {plan(one), plan(two)};
  std::atomic<bool> stop{false};
  std::vector<std::thread> publishers;
  for (int p = 0; p < 2; ++p) {
    publishers.emplace_back([&, p] {
      for (int i = p; !stop; ++i) planner.publish(i % 2 ? other.view : model.view);
    });
  }
  for (int i = 0; i < 60; ++i) {
    const Floats action = plan(planner);
    CHECK(action == possible[0] || action == possible[1]);
  }
  stop = true;
  for (std::thread& publisher : publishers) publisher.join();
}

// A model without an encoder is given what one with it would have encoded.
void plans_for_latents() {
  RandomModel model({});
  const Floats zeros(24);
  model.view.encoder[1].gamma = zeros.data();  // h(obs) = softmax(beta), whatever obs
  Floats z(2 * 24);
  for (std::size_t g = 0; g < z.size(); g += 8) {
    float sum = 0;
    for (std::size_t i = g; i < g + 8; ++i) {
      sum += z[i] = std::exp(model.view.encoder[1].beta[i % 24]);
    }
    for (std::size_t i = g; i < g + 8; ++i) z[i] /= sum;
  }
  Planner with(model.pack(), settings(), 3);
  model.view.encoder.clear();
  CHECK(model.pack()->obs_dim() == 24);
  Planner without(model.pack(), settings(), 3);
  Floats expected(2 * 3), action(2 * 3);
  const Floats obs = normal_floats(2 * 5, 1);
  for (int i = 0; i < 3; ++i) {
    with.plan(obs.data(), false, expected.data());
    CHECK(without.plan(z.data(), false, action.data()).nonfinite == 0);
    for (std::size_t k = 0; k < action.size(); ++k) {
      CHECK(std::abs(action[k] - expected[k]) < 1e-4f);
    }
  }
  model.view.dynamics.clear();
  CHECK(message_of<std::invalid_argument>([&] { model.pack(); }) ==
        "dynamics: expected at least 2 layers, got 0");
}

void refuses_what_does_not_fit() {
  const RandomModel model({});
  PlannerSettings s = settings();
  s.elites = 71;
  CHECK(message_of<std::invalid_argument>([&] { Planner(model.pack(), s, 0); }) ==
        "elites must be at most samples = 70, got 71");
  CHECK(message_of<std::invalid_argument>([&] { Planner(nullptr, settings(), 0); }) ==
        "model must not be null");
  Planner planner(model.pack(), settings(), 0);
  Sizes wider;
  wider.action = 4;
  CHECK(message_of<std::invalid_argument>([&] { planner.publish(RandomModel(wider).pack()); }) ==
        "the published model's action_dim must be 3 as the planner's, got 4");
  CHECK(message_of<std::out_of_range>([&] { planner.reset(2); }) ==
        "problem must lie in [0, 2), got 2");
}

}  // namespace

int main() {
  same_plan_on_any_thread_count();
  no_allocation_after_construction();
  publishing_a_view();
  a_budget_is_kept_to_and_used();
  a_cut_iteration_refits_on_what_was_scored();
  a_cut_plan_for_several_problems();
  a_stall_is_late_and_teaches_nothing();
  a_slow_machine_is_asked_seldom();
  weights_that_are_not_finite();
  publishing_while_plans_run();
  a_running_plan_keeps_its_model();
  plans_for_latents();
  refuses_what_does_not_fit();
  return 0;
}
