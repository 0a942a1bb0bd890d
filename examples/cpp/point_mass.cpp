// A guide to iqmpc in C++: imitation without rewards, learning and planning, in one program.
//
// A mass on a plane, starting somewhere on a circle, is to come to rest in its middle.
// Demonstrations show how; no reward is ever seen. `point_mass` learns for 1,200 steps and fails
// where the agent is then no good; `point_mass STEPS` only insists that something was learnt.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "iqmpc/episode_replay.hpp"
#include "iqmpc/learner.hpp"
#include "iqmpc/model_storage.hpp"
#include "iqmpc/planner.hpp"

namespace {

// ---- The task: replace it by yours --------------------------------------------------------------

constexpr int kObs = 4, kActions = 2;  // position and velocity; a force in [-1, 1] along each axis
constexpr int kSteps = 20;             // of an episode

struct PointMass {
  explicit PointMass(std::mt19937& random) {
    const float angle = std::uniform_real_distribution<float>(0, 6.2831853f)(random);
    state[0] = std::cos(angle);
    state[1] = std::sin(angle);
  }
  void step(const float* force) {
    for (int i = 0; i < 2; ++i) {
      state[2 + i] = 0.7f * state[2 + i] + 0.05f * std::clamp(force[i], -1.0f, 1.0f);
      state[i] = std::clamp(state[i] + state[2 + i], -1.5f, 1.5f);  // there are walls
    }
  }
  float distance() const { return std::hypot(state[0], state[1]); }

  float state[kObs] = {};
};

struct Episode {
  std::vector<float> obs, action;  // [T+1, O] and [T, A]
  double total = 0;                // Σ -distance: the return that the learner never sees
  double distance = 0;             // at the end
};

// `act(obs, action)` is the policy, `after()` runs behind every step.
template <class Act, class After>
Episode play(std::mt19937& random, Act act, After after) {
  PointMass mass(random);
  Episode episode;
  const auto observe = [&] {
    episode.obs.insert(episode.obs.end(), mass.state, mass.state + kObs);
  };
  observe();
  for (int t = 0; t < kSteps; ++t) {
    float action[kActions];
    act(mass.state, action);
    mass.step(action);
    episode.action.insert(episode.action.end(), action, action + kActions);
    observe();
    episode.total -= mass.distance();
    after();
  }
  episode.distance = mass.distance();
  return episode;
}

// A P-controller shows the task.
void demonstrator(const float* obs, float* action) {
  for (int i = 0; i < kActions; ++i) action[i] = std::clamp(-2 * obs[i], -1.0f, 1.0f);
}

}  // namespace

int main(int argc, char** argv) {
  const int learning_steps = argc > 1 ? std::atoi(argv[1]) : 1200;
  std::mt19937 random(1);
  const auto random_policy = [&](const float*, float* action) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int i = 0; i < kActions; ++i) action[i] = uniform(random);
  };
  const auto nothing = [] {};

  // ---- Set up -----------------------------------------------------------------------------------

  // The model's memory: parameters, Adam's moments, target critics, the average of the weights.
  // Small, as the task is.
  iqmpc::ModelSizes sizes;
  sizes.obs = kObs;
  sizes.action = kActions;
  sizes.latent = 32;
  sizes.hidden = 64;
  sizes.encoder = 32;
  iqmpc::ModelStorage model(sizes, /*seed=*/1);

  // Give learner and planner different seeds: of the same one they would draw the same numbers.
  iqmpc::LearnerSettings learning;
  learning.discount = 0.95f;
  learning.lr = 1e-3f;
  iqmpc::Learner learner(model.learner_view(), learning, /*seed=*/2);

  iqmpc::PlannerSettings planning;
  planning.discount = learning.discount;
  planning.samples = 128;
  planning.elites = 16;
  planning.policy_trajectories = 8;
  planning.iterations = 3;
  iqmpc::Planner planner(
      std::make_shared<iqmpc::WorldModel>(model.weights(), iqmpc::Precision::float32), planning,
      /*seed=*/3);

  iqmpc::EpisodeReplay demonstrations(kObs, kActions, learning.horizon, /*capacity=*/10000);
  iqmpc::EpisodeReplay experience(kObs, kActions, learning.horizon, /*capacity=*/10000);
  const auto keep = [](iqmpc::EpisodeReplay& replay, const Episode& e) {
    replay.add(e.obs.data(), e.action.data(), /*reward=*/nullptr, kSteps, /*terminated=*/false);
  };
  const auto act = [&](bool explore) {
    return [&planner, explore](const float* obs, float* action) {
      planner.plan(obs, explore, action);
    };
  };

  // ---- Learn ------------------------------------------------------------------------------------

  // What is shown, and what happens by chance.
  for (int i = 0; i < 200; ++i) keep(demonstrations, play(random, demonstrator, nothing));
  for (int i = 0; i < 100; ++i) keep(experience, play(random, random_policy, nothing));

  const iqmpc::ReplayView shown = demonstrations.view();
  double first = 0, consistency = 0;  // the loss of the first update, and of late
  const auto update = [&] {
    // 32 slices of each; a replay's view is taken anew after an episode was added.
    const iqmpc::UpdateMetrics m = model.learn(learner, &shown, experience.view(), 32);
    if (model.counts.updates == 1) first = consistency = m.consistency;
    consistency += 0.05 * (m.consistency - consistency);
  };
  for (int i = 0; i < std::min(400, learning_steps); ++i) update();
  planner.publish(model.weights());

  // One update a step, and the planner acts with what it made of the model.
  for (int step = 0; step < learning_steps; step += kSteps) {
    planner.reset();  // an episode begins
    keep(experience, play(random, act(/*explore=*/true), [&] {
           update();
           planner.publish(model.weights());
         }));
    if (step % 200 == 0) std::printf("%4d steps: consistency %.2g\n", step, consistency);
  }

  // ---- Compare ----------------------------------------------------------------------------------

  planner.publish(model.average());  // steadier than the newest weights
  const auto mean_of_ten = [&](const char* name, auto policy) {
    double total = 0, distance = 0;
    for (int i = 0; i < 10; ++i) {
      planner.reset();
      const Episode e = play(random, policy, nothing);
      total += e.total / 10;
      distance += e.distance / 10;
    }
    std::printf("%-12s return %6.1f, distance at the end %.3f\n", name, total, distance);
    return distance;
  };
  mean_of_ten("demonstrator", demonstrator);
  const double by_chance = mean_of_ten("random", random_policy);
  const double learnt = mean_of_ten("agent", act(/*explore=*/false));

  if (!std::isfinite(learnt) || !(consistency < 0.5 * first)) {
    std::printf("nothing was learnt: consistency %.3g at first, %.3g now\n", first, consistency);
    return 1;
  }
  if (argc == 1 && !(learnt < 0.2 * by_chance)) {
    std::printf("the agent ends %.3f away, not a fifth of chance's %.3f\n", learnt, by_chance);
    return 1;
  }
  return 0;
}
