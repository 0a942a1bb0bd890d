// Float vectors of the width of the level being compiled, and the functions the epilogues need.
//
// Included only by files that CMake compiles once per level, with IQMPC_LEVEL set to the level's
// name. Everything is inside a namespace of that name and nothing here uses the standard library's
// templates: a shared inline function compiled for AVX-512 could be the copy the linker keeps, and
// would then run on a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

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
typedef int Ints __attribute__((vector_size(kWidth * sizeof(int))));
typedef std::uint16_t Halves __attribute__((vector_size(kWidth * sizeof(std::uint16_t))));

// A float cut to its upper half. Not an arithmetic type: it is widened or multiplied in pairs.
struct Bf16 {
  std::uint16_t bits;
};

static inline Vec splat(float value) { return value - Vec{}; }

static inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline Vec load(const Bf16* p) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Bits) << 16);
}

static inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// As bf16 in the upper half of each lane, to nearest, ties to even; a NaN stays one. The lower
// halves are noise. As conversions by the machine, but for denormals, which some of those drop.
static inline Bits rounded_to_bf16(Vec x) {
  const Bits bits = (Bits)x;
  const Bits up = bits + 0x7fffu + (bits >> 16 & 1u);
  return x == x ? up : bits | 0x400000u;
}

#if defined(__AVX512BF16__)
// Rounds to nearest, ties to even.
static inline void store(Bf16* p, Vec v) {
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, sizeof h);
}
#endif

// The first `count` < kWidth lanes from p, the others `fill`.
static inline Vec load_partial(const float* p, std::ptrdiff_t count, float fill) {
  Vec v = splat(fill);
  __builtin_memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(float));
  return v;
}

static inline void store_partial(float* p, Vec v, std::ptrdiff_t count) {
  __builtin_memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(float));
}

// Pairwise, so the rounding error grows with the logarithm of the width; halves are added first, in
// registers where there are instructions for it and in the same order where not.
static inline float sum_lanes(Vec v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#else
  const __m256 eight = (__m256)v;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}

// Both keep a NaN in x: the second operand of the instructions, which compilers find in the general
// form for scalars but not for vectors.
static inline Vec at_most(Vec x, float high) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)splat(high), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)splat(high), (__m256)x);
#else
  return splat(high) < x ? splat(high) : x;
#endif
}

static inline Vec at_least(Vec x, float low) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)splat(low), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)splat(low), (__m256)x);
#else
  return splat(low) > x ? splat(low) : x;
#endif
}

static inline Vec sqrt_lanes(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int i = 0; i < kWidth; ++i) lanes[i] = __builtin_sqrtf(lanes[i]);
  return load(lanes);
}

// How exactly the functions below compute: `exact` to a few units in float32's last place, `fast`
// to about 1e-4, a twentieth of what rounding the result to bf16 costs.
enum class Accuracy { exact, fast };

// 1 / x for finite x that is normal and whose reciprocal is.
template <Accuracy accuracy>
static inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return accuracy == Accuracy::fast ? r : r * (splat(2.0f) - x * r);
#elif defined(__AVX2__)
  const Vec r = (Vec)_mm256_rcp_ps((__m256)x);
  return accuracy == Accuracy::fast ? r : r * (splat(2.0f) - x * r);
#else
  return splat(1.0f) / x;
#endif
}

// exp(x) for -87 <= x <= 88. Exact within 3 units in the last place: x = n ln 2 + r with
// |r| <= ln(2)/2, a polynomial for exp(r), and 2^n put straight into the exponent bits.
template <Accuracy accuracy>
static inline Vec exp_in_range(Vec x) {
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the lowest bits of the mantissa.
  const Vec shifter = splat(12582912.0f);
  const Vec shifted = x * splat(1.44269504f) + shifter;
  const Vec n = shifted - shifter;
  if (accuracy == Accuracy::fast) {
    // Minimax for 2^f on [-1/2, 1/2], relative error 7.5e-5.
    const Vec f = x * splat(1.44269504f) - n;
    Vec p = splat(0.05517167f);
    p = p * f + splat(0.24261113f);
    p = p * f + splat(0.69326099f);
    p = p * f + splat(0.99992807f);
    // p lies in [0.7, 1.42]; adding n to its exponent multiplies by 2^n.
    return (Vec)((Bits)p + ((Bits)shifted << 23));
  }
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
template <Accuracy accuracy>
static inline Vec mish(Vec x) {
  const Vec e = exp_in_range<accuracy>(at_least(at_most(x, 20.0f), -87.0f));
  const Vec numerator = e * (e + splat(2.0f));
  // The reciprocal first: x * numerator overflows for x above 1e21.
  const Vec y = x * (numerator * reciprocal<accuracy>(numerator + splat(2.0f)));
  if (accuracy == Accuracy::fast) return y;
  return x < splat(-87.0f) ? Vec{} : y;
}

// tanh(x) = 1 - 2 / (e^2x + 1), to 1e-7 absolute.
static inline Vec tanh(Vec x) {
  const Vec e = exp_in_range<Accuracy::exact>(at_least(at_most(x + x, 40.0f), -40.0f));
  return splat(1.0f) - splat(2.0f) * reciprocal<Accuracy::exact>(e + splat(1.0f));
}

// ln x for normal x > 0: x = 2^n m with m in [0.707, 1.414), and the series of
// ln m = 2 artanh((m - 1) / (m + 1)), whose argument is below 0.172.
static inline Vec log_positive(Vec x) {
  // Biased so that the exponent changes at sqrt(1/2).
  const Bits bits = (Bits)x - 0x3f3504f3u;
  const Vec n = __builtin_convertvector((Ints)bits >> 23, Vec);
  const Vec m = (Vec)((bits & 0x007fffffu) + 0x3f3504f3u);
  const Vec s = (m - splat(1.0f)) * reciprocal<Accuracy::exact>(m + splat(1.0f));
  const Vec q = s * s;
  Vec p = splat(2.0f / 9.0f);
  p = p * q + splat(2.0f / 7.0f);
  p = p * q + splat(2.0f / 5.0f);
  p = p * q + splat(2.0f / 3.0f);
  p = p * q + splat(2.0f);
  return n * splat(0.69314718f) + p * s;
}

// sin and cos of 2π u for 0 <= u < 1: reduced to an eighth of a turn around the nearest quarter.
static inline void sincos_turns(Vec u, Vec* sine, Vec* cosine) {
  const Vec shifter = splat(12582912.0f);
  const Vec shifted = u * splat(4.0f) + shifter;
  const Bits quarter = (Bits)shifted;
  const Vec x = (u * splat(4.0f) - (shifted - shifter)) * splat(1.57079633f);
  const Vec q = x * x;
  Vec s = splat(-1.0f / 5040.0f);
  s = s * q + splat(1.0f / 120.0f);
  s = s * q + splat(-1.0f / 6.0f);
  s = s * q * x + x;
  Vec c = splat(1.0f / 40320.0f);
  c = c * q + splat(-1.0f / 720.0f);
  c = c * q + splat(1.0f / 24.0f);
  c = c * q + splat(-0.5f);
  c = c * q + splat(1.0f);
  const Ints odd = (quarter & 1u) != 0;
  const Vec a = odd ? c : s;
  const Vec b = odd ? s : c;
  // The sign bits: sine's flips in the upper half turn, cosine's in the left one.
  *sine = (Vec)((Bits)a ^ ((quarter & 2u) << 30));
  *cosine = (Vec)((Bits)b ^ (((quarter + 1u) & 2u) << 30));
}

// Two vectors' lanes in turns, from their lower and from their upper halves.
#if defined(__AVX512F__)
static inline Vec zip_lower(Vec a, Vec b) {
  return Vec{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3],
             a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
}
static inline Vec zip_upper(Vec a, Vec b) {
  return Vec{a[8],  b[8],  a[9],  b[9],  a[10], b[10], a[11], b[11],
             a[12], b[12], a[13], b[13], a[14], b[14], a[15], b[15]};
}
#elif defined(__AVX2__)
static inline Vec zip_lower(Vec a, Vec b) {
  return Vec{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
}
static inline Vec zip_upper(Vec a, Vec b) {
  return Vec{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
}
#else
static inline Vec zip_lower(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
static inline Vec zip_upper(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
#endif

// A square of kWidth vectors, in place. Each pass takes the highest bit of an element's row number
// to the lowest of its lane and all others one place up: after log2(kWidth) passes rows are lanes.
static inline void transpose_square(Vec* x) {
#pragma GCC unroll 8
  for (int pass = 1; pass < kWidth; pass *= 2) {
    Vec y[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      y[2 * i] = zip_lower(x[i], x[i + kWidth / 2]);
      y[2 * i + 1] = zip_upper(x[i], x[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) x[i] = y[i];
  }
}

}  // namespace iqmpc::detail::IQMPC_LEVEL
