// Settings of a planner that cannot be.
#pragma once

#include "iqmpc/planner.hpp"

namespace iqmpc::detail {

// Throws std::invalid_argument that names the first of them.
void check(const PlannerSettings& settings);

}  // namespace iqmpc::detail
