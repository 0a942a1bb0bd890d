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
#include "models.hpp"

namespace {

using iqmpc::Planner;
using iqmpc::PlannerSettings;
using Floats = std::vector<float>;

PlannerSettings settings(int threads = 2) {
  PlannerSettings s;
  s.num_envs = 2;
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
    planner.warm_up();
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
  s.num_envs = 1;
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
  without.warm_up();
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
  weights_that_are_not_finite();
  publishing_while_plans_run();
  a_running_plan_keeps_its_model();
  plans_for_latents();
  refuses_what_does_not_fit();
  return 0;
}
