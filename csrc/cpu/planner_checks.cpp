#include "cpu/planner_checks.hpp"

#include <cmath>
#include <cstddef>
#include <string>
#include <utility>

#include "common/setting_checks.hpp"

namespace iqmpc::detail {

void check(const PlannerSettings& s) {
  using Index = std::ptrdiff_t;
  const auto at_least = [](const char* name, Index value, Index least) {
    require(value >= least, name, "at least " + std::to_string(least), double(value));
  };
  at_least("problems", s.problems, 1);
  at_least("horizon", s.horizon, 1);
  at_least("samples", s.samples, 1);
  at_least("elites", s.elites, 1);
  at_least("policy_trajectories", s.policy_trajectories, 0);
  at_least("iterations", s.iterations, 1);
  // Beyond these a plan's sizes would not be numbers any more, long after they were no plan's.
  constexpr Index kMost = Index{1} << 20, kSteps = Index{1} << 32;
  for (const auto& [name, value] : {std::pair{"problems", s.problems},
                                    {"horizon", s.horizon},
                                    {"samples", s.samples},
                                    {"iterations", s.iterations}}) {
    require(value <= kMost, name, "at most " + std::to_string(kMost), double(value));
  }
  require(s.problems * s.horizon <= kSteps / s.samples, "problems * horizon * samples",
          "at most " + std::to_string(kSteps),
          double(s.problems) * double(s.horizon) * double(s.samples));
  const std::string all = "at most samples = " + std::to_string(s.samples);
  require(s.elites <= s.samples, "elites", all, double(s.elites));
  require(s.policy_trajectories <= s.samples, "policy_trajectories", all,
          double(s.policy_trajectories));
  const auto number = [](const char* name, double value, bool good, const char* expected) {
    require(good, name, expected, value);
  };
  number("temperature", s.temperature, s.temperature > 0, "positive");
  number("std_min", s.std_min, s.std_min > 0, "positive");
  number("std_max", s.std_max, s.std_max >= s.std_min && std::isfinite(s.std_max),
         "finite and at least std_min");
  number("discount", s.discount, s.discount >= 0 && s.discount <= 1, "in [0, 1]");
  number("budget_us", s.budget_us, s.budget_us >= 0, "0 or more microseconds");
}

}  // namespace iqmpc::detail
