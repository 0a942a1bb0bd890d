// Float vectors of the width of the level being compiled, and the functions the epilogues need.
//
// Included only by files that CMake compiles once per level, with IQMPC_LEVEL set to the level's
// name. Everything is inside a namespace of that name and nothing here uses the standard library's
// templates: a shared inline function compiled for AVX-512 could be the copy the linker keeps, and
// would then run on a machine without it.
#pragma once

#include <cstddef>

namespace iqmpc::detail::IQMPC_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef unsigned Bits __attribute__((vector_size(kWidth * sizeof(unsigned))));

static inline Vec splat(float value) { return value - Vec{}; }

static inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// The first `count` < kWidth lanes from p, the others `fill`.
static inline Vec load_partial(const float* p, std::ptrdiff_t count, float fill) {
  Vec v = splat(fill);
  __builtin_memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(float));
  return v;
}

static inline void store_partial(float* p, Vec v, std::ptrdiff_t count) {
  __builtin_memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(float));
}

// Pairwise, so the rounding error grows with the logarithm of the width.
static inline float sum_lanes(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// exp(x) for -87 <= x <= 88, within 3 units in the last place: x = n ln 2 + r with |r| <= ln(2)/2,
// a Taylor polynomial for exp(r), and 2^n put straight into the exponent bits.
static inline Vec exp_in_range(Vec x) {
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the lowest bits of the mantissa.
  const Vec shifter = splat(12582912.0f);
  const Vec shifted = x * splat(1.44269504f) + shifter;
  const Vec n = shifted - shifter;
  // ln 2 in two parts, the first short enough for n * part to be exact.
  const Vec r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  Vec p = splat(1.0f / 720.0f);
  p = p * r + splat(1.0f / 120.0f);
  p = p * r + splat(1.0f / 24.0f);
  p = p * r + splat(1.0f / 6.0f);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  // The shift drops all of the shifter's own bits; 127 is the exponent's bias.
  const Bits scale = ((Bits)shifted + 127u) << 23;
  return p * (Vec)scale;
}

// mish(x) = x tanh(log(1 + e^x)) = x (e² + 2e) / (e² + 2e + 2) with e = e^x. Finite for every
// finite x and NaN for NaN: beyond 20 the fraction is 1 in float32 and e² would overflow later;
// below -87, where e leaves the normal range, the result is 0 (in truth smaller than 1e-35).
static inline Vec mish(Vec x) {
  Vec clamped = x < splat(20.0f) ? x : splat(20.0f);
  clamped = clamped > splat(-87.0f) ? clamped : splat(-87.0f);
  const Vec e = exp_in_range(clamped);
  const Vec numerator = e * (e + splat(2.0f));
  // The division first: x * numerator overflows for x above 1e21.
  const Vec y = x * (numerator / (numerator + splat(2.0f)));
  return x < splat(-87.0f) ? Vec{} : y;
}

}  // namespace iqmpc::detail::IQMPC_LEVEL
