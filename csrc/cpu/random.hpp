// Standard normal draws from the counter-based generator of cpu/threefry.hpp.
//
// Included by per-level sources only (cpu/simd.hpp says why).
#pragma once

#include "cpu/simd.hpp"
#include "cpu/threefry.hpp"

namespace iqmpc::detail::IQMPC_LEVEL {

// A stream is cut into chunks of 64 draws, 16 counters of four words each whatever the vector's
// width: word w of counter c is draw 16 w + c of its chunk.
constexpr Index kChunk = 64;

// Box-Muller on the words (0, 1) and (2, 3).
static inline void normal_chunk(const std::uint32_t* key, std::uint32_t stream,
                                std::uint32_t problem, std::uint32_t chunk, float* out) {
  for (int lane = 0; lane < 16; lane += kWidth) {
    Bits x[4] = {Bits{}, Bits{} + chunk, Bits{} + stream, Bits{} + problem};
    for (int i = 0; i < kWidth; ++i) x[0][i] = static_cast<unsigned>(lane + i);
    threefry(key, x);
    for (int pair = 0; pair < 4; pair += 2) {
      // 24 bits, in the middle of their interval: never 0, and at most 1 after rounding.
      const auto unit = [](Bits word, float offset) {
        return (__builtin_convertvector((Ints)(word >> 8), Vec) + splat(offset)) *
               splat(0x1p-24f);
      };
      const Vec radius = sqrt_lanes(splat(-2.0f) * log_positive(unit(x[pair], 0.5f)));
      Vec sine, cosine;
      sincos_turns(unit(x[pair + 1], 0.0f), &sine, &cosine);
      store(out + 16 * pair + lane, radius * cosine);
      store(out + 16 * (pair + 1) + lane, radius * sine);
    }
  }
}

static void fill_normal(const std::uint32_t* key, std::uint32_t stream, std::uint32_t problem,
                        Index first, Index count, float* out) {
  const Index end = first + count;
  for (Index chunk = first / kChunk; chunk * kChunk < end; ++chunk) {
    const Index start = chunk * kChunk;
    const auto number = static_cast<std::uint32_t>(chunk);
    if (start >= first && start + kChunk <= end) {
      normal_chunk(key, stream, problem, number, out + (start - first));
      continue;
    }
    float whole[kChunk];
    normal_chunk(key, stream, problem, number, whole);
    for (Index i = start < first ? first : start; i < start + kChunk && i < end; ++i) {
      out[i - first] = whole[i - start];
    }
  }
}

}  // namespace iqmpc::detail::IQMPC_LEVEL
