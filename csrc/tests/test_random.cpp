// The counter-based generator against the known answers of its authors' library (Random123).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/threefry.hpp"

namespace {

void known_answers() {
  struct Case {
    std::uint32_t key[4], counter[4], expected[4];
  };
  const Case cases[] = {
      {{0, 0, 0, 0}, {0, 0, 0, 0}, {0x9c6ca96a, 0xe17eae66, 0xfc10ecd4, 0x5256a7d8}},
      {{~0u, ~0u, ~0u, ~0u},
       {~0u, ~0u, ~0u, ~0u},
       {0x2a881696, 0x57012287, 0xf6c7446e, 0xa16a6732}},
      {{0xa4093822, 0x299f31d0, 0x082efa98, 0xec4e6c89},
       {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0x59cd1dbb, 0xb8879579, 0x86b5d00c, 0xac8b6d84}},
  };
  for (const Case& c : cases) {
    std::uint32_t x[4];
    for (int i = 0; i < 4; ++i) x[i] = c.counter[i];
    iqmpc::detail::threefry(c.key, x);
    for (int i = 0; i < 4; ++i) CHECK(x[i] == c.expected[i]);
  }
}

// Draw `index` of a stream, by the definition and in double precision.
double normal(const std::uint32_t* key, std::uint32_t stream, std::uint32_t problem,
              std::ptrdiff_t index) {
  const auto chunk = static_cast<std::uint32_t>(index / 64);
  const int word = static_cast<int>(index % 64) / 16;
  std::uint32_t x[4] = {static_cast<std::uint32_t>(index % 16), chunk, stream, problem};
  iqmpc::detail::threefry(key, x);
  const double radius =
      std::sqrt(-2 * std::log(std::min(1.0, ((x[word / 2 * 2] >> 8) + 0.5) * 0x1p-24)));
  const double angle = 2 * 3.14159265358979323846 * ((x[word / 2 * 2 + 1] >> 8) * 0x1p-24);
  return radius * (word % 2 ? std::sin(angle) : std::cos(angle));
}

void normals_at_every_level() {
  const std::uint32_t key[4] = {1, 2, 3, 4};
  for (const iqmpc::Isa isa : iqmpc::isa_levels()) {
    const auto& kernels = iqmpc::detail::kernel_table(isa, iqmpc::Precision::float32);
    for (const std::ptrdiff_t first : {0, 16, 48, 64, 112}) {
      for (const std::ptrdiff_t count : {0, 16, 48, 64, 80, 256}) {
        std::vector<float> out(static_cast<std::size_t>(count) + 16, 42.0f);
        kernels.fill_normal(key, 7, 9, first, count, out.data());
        for (std::ptrdiff_t i = 0; i < count; ++i) {
          CHECK(std::abs(out[i] - normal(key, 7, 9, first + i)) < 2e-5);
        }
        for (std::size_t i = count; i < out.size(); ++i) CHECK(out[i] == 42.0f);
      }
    }
  }
}

}  // namespace

int main() {
  known_answers();
  normals_at_every_level();
  return 0;
}
