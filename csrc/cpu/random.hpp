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
        return (__builtin_convertvector((Ints)(word >> 8), Vec) + splat(offset)) * splat(0x1p-24f);
      };
      const Vec radius = sqrt_lanes(splat(-2.0f) * log_positive(unit(x[pair], 0.5f)));
      Vec sine, cosine;
      sincos_turns(unit(x[pair + 1], 0.0f), &sine, &cosine);
      store(out + 16 * pair + lane, radius * cosine);
      store(out + 16 * (pair + 1) + lane, radius * sine);
    }
  }
}

// Elements [first, first + count) of what `fill` writes chunk by chunk.
template <Index size, class Fill>
static inline void in_chunks(Index first, Index count, float* out, Fill&& fill) {
  const Index end = first + count;
  for (Index chunk = first / size; chunk * size < end; ++chunk) {
    const Index start = chunk * size;
    const auto number = static_cast<std::uint32_t>(chunk);
    if (start >= first && start + size <= end) {
      fill(number, out + (start - first));
      continue;
    }
    float whole[size];
    fill(number, whole);
    for (Index i = start < first ? first : start; i < start + size && i < end; ++i) {
      out[i - first] = whole[i - start];
    }
  }
}

static inline void fill_normal(const std::uint32_t* key, std::uint32_t stream,
                               std::uint32_t problem, Index first, Index count, float* out) {
  in_chunks<kChunk>(first, count, out, [&](std::uint32_t number, float* chunk) {
    normal_chunk(key, stream, problem, number, chunk);
  });
}

// Dropout multipliers from halves of words: chunks of 128, whose upper 64 take the words' upper
// halves.
static inline void dropout_chunk(const std::uint32_t* key, std::uint32_t stream,
                                 std::uint32_t problem, std::uint32_t chunk,
                                 std::uint32_t threshold, float scale, float* out) {
  for (int lane = 0; lane < 16; lane += kWidth) {
    Bits lanes{};
    for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<unsigned>(lane + i);
    Bits x[4] = {lanes, Bits{} + chunk, Bits{} + stream, Bits{} + problem};
    threefry(key, x);
    for (int w = 0; w < 4; ++w) {
      store(out + 16 * w + lane, (x[w] & 0xffffu) < threshold ? Vec{} : splat(scale));
      store(out + 64 + 16 * w + lane, (x[w] >> 16) < threshold ? Vec{} : splat(scale));
    }
  }
}

static inline void fill_dropout(const std::uint32_t* key, std::uint32_t stream,
                                std::uint32_t problem, Index first, Index count,
                                std::uint32_t threshold, float scale, float* out) {
  in_chunks<2 * kChunk>(first, count, out, [&](std::uint32_t number, float* chunk) {
    dropout_chunk(key, stream, problem, number, threshold, scale, chunk);
  });
}

}  // namespace iqmpc::detail::IQMPC_LEVEL
