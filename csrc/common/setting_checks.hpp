// One wording for settings that cannot be.
#pragma once

#include <stdexcept>
#include <string>

namespace iqmpc::detail {

// Throws std::invalid_argument "NAME must be EXPECTED, got VALUE" unless `good`.
inline void require(bool good, const std::string& name, const std::string& expected, double value) {
  if (good) return;
  std::string text = std::to_string(value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  throw std::invalid_argument(name + " must be " + expected + ", got " + text);
}

}  // namespace iqmpc::detail
