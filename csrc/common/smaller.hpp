#pragma once

#include <cmath>

#include "common/device.hpp"

namespace iqmpc {

// The smaller of two critics; NaN where either is.
IQMPC_BOTH inline float smaller(float a, float b) {
  if (a != a || b != b) return nanf("");
  return a < b ? a : b;
}

}  // namespace iqmpc
