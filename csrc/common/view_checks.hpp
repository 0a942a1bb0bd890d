// Whether the parts of a world model fit together.
#pragma once

#include "iqmpc/world_model.hpp"

namespace iqmpc::detail {

// Throws std::invalid_argument that names the layer, what it has and what was expected.
void check_view(const WorldModelView& view);

}  // namespace iqmpc::detail
