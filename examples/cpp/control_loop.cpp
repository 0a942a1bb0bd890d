// A robot's control loop with an agent's file: `control_loop AGENT HZ TICKS`.
//
// The robot here is nobody's; replace Robot by yours. Ticks are kept in absolute time, so that a
// late one does not make the next ones late. docs/real-time.md says what else a loop needs.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

#include "iqmpc/agent.hpp"

namespace {

// Something that is seen by numbers and takes commands: its state drifts to what it is told.
struct Robot {
  void read(std::vector<float>& obs) const {
    for (std::size_t i = 0; i < obs.size(); ++i) obs[i] = state / static_cast<float>(i + 1);
  }
  void command(const std::vector<float>& action) { state += 0.1f * (action[0] - state); }

  float state = 1;
};

int run(const char* path, double hz, long ticks) {
  Robot robot;

  // ---- Yours from here: load, and act once a tick -----------------------------------------------
  iqmpc::AgentOptions options;
  options.budget_us = 0.8e6 / hz;  // of a tick; the rest is the robot's
  iqmpc::Agent agent = iqmpc::Agent::load(path, options);
  std::vector<float> obs(agent.obs_size()), action(agent.action_size());
  agent.reset();  // an episode begins
  const std::chrono::duration<double> period(1 / hz);
  const auto start = std::chrono::steady_clock::now();
  for (long tick = 0; tick < ticks; ++tick) {
    const auto due = std::chrono::duration_cast<std::chrono::nanoseconds>(tick * period);
    std::this_thread::sleep_until(start + due);
    robot.read(obs);
    agent.act(obs, action);
    robot.command(action);
  }
  // ---- to here ----------------------------------------------------------------------------------

  const iqmpc::PlanStatistics plans = agent.planner().statistics();
  std::printf(
      "%llu plans: p50 %.0f us, p99 %.0f us, p99.9 %.0f us, max %.0f us, %llu late, %llu missed\n",
      static_cast<unsigned long long>(plans.plans), plans.quantile_us(0.5), plans.quantile_us(0.99),
      plans.quantile_us(0.999), plans.max_us, static_cast<unsigned long long>(plans.late),
      static_cast<unsigned long long>(plans.missed));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 || std::atof(argv[2]) <= 0) {
    std::fprintf(stderr, "usage: control_loop AGENT HZ TICKS\n");
    return 2;
  }
  try {
    return run(argv[1], std::atof(argv[2]), std::atol(argv[3]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
