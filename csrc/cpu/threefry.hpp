// Counter-based random bits: Threefry-4x32 with 20 rounds (Salmon et al., SC 2011), so that a draw
// depends on what it is for and never on which thread made it, or when.
#pragma once

#include <cstdint>

namespace iqmpc::detail {

// The four words of counter x under `key`, in place. `Word` is a 32-bit unsigned or a vector of
// them, one counter a lane. Static: levels must not share one compiled copy (cpu/simd.hpp).
template <class Word>
static inline void threefry(const std::uint32_t* key, Word* x) {
  constexpr int kRotations[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5},
                                    {6, 20},  {17, 11}, {25, 10}, {18, 20}};
  const std::uint32_t schedule[5] = {key[0], key[1], key[2], key[3],
                                     0x1BD11BDAu ^ key[0] ^ key[1] ^ key[2] ^ key[3]};
  const auto rotate = [](Word word, int by) { return (word << by) | (word >> (32 - by)); };
  for (int i = 0; i < 4; ++i) x[i] += schedule[i];
#pragma GCC unroll 20
  for (int round = 0; round < 20; ++round) {
    const int partner = round % 2 ? 3 : 1;
    const int other = 4 - partner;
    x[0] += x[partner];
    x[partner] = rotate(x[partner], kRotations[round % 8][0]) ^ x[0];
    x[2] += x[other];
    x[other] = rotate(x[other], kRotations[round % 8][1]) ^ x[2];
    if (round % 4 == 3) {
      const int s = round / 4 + 1;
      for (int i = 0; i < 4; ++i) x[i] += schedule[(s + i) % 5];
      x[3] += static_cast<std::uint32_t>(s);
    }
  }
}

}  // namespace iqmpc::detail
