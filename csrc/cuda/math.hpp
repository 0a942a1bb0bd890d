// The element-wise functions of the rollout. NaN stays NaN in all of them.
#pragma once

#include <cmath>

#include "common/smaller.hpp"
#include "cuda/portable.hpp"

namespace iqmpc::gpu {

struct Bf16 {
  std::uint16_t bits;
};

// To nearest, ties to even.
IQMPC_DEVICE inline Bf16 to_bf16(float value) {
#ifdef __CUDA_ARCH__
  Bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

inline float from_bf16(Bf16 value) {
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float widened;
  std::memcpy(&widened, &bits, sizeof widened);
  return widened;
}

// A float as an operand of a product.
template <class Operand>
IQMPC_DEVICE inline Operand to_operand(float value);
template <>
IQMPC_DEVICE inline float to_operand<float>(float value) {
  return value;
}
template <>
IQMPC_DEVICE inline Bf16 to_operand<Bf16>(float value) {
  return to_bf16(value);
}

// exp and division in activations that become an `Operand`: what is rounded to bf16 next takes the
// fast ones (2 ulp).
template <class Operand>
IQMPC_DEVICE inline float exponential(float x) {
#ifdef __CUDA_ARCH__
  if (sizeof(Operand) < sizeof(float)) return __expf(x);
#endif
  return expf(x);
}

template <class Operand>
IQMPC_DEVICE inline float quotient(float x, float y) {
#ifdef __CUDA_ARCH__
  if (sizeof(Operand) < sizeof(float)) return __fdividef(x, y);
#endif
  return x / y;
}

// mish(x) = x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2). Beyond 20 the quotient is
// 1 in float32, and the exponential must not overflow.
template <class Operand>
IQMPC_DEVICE inline float mish(float x) {
  const float e = exponential<Operand>(x < 20.0f ? x : 20.0f);
  const float n = e * (e + 2.0f);
  return x * quotient<Operand>(n, n + 2.0f);
}

// What LayerNorm multiplies by: 1 / sqrt(variance + ε), or NaN where the variance is not finite: an
// overflow would otherwise turn the row into plausible zeros.
IQMPC_DEVICE inline float norm_scale(float variance) {
  constexpr float kEps = 1e-5f;
  constexpr float kMax = 3.402823466e38f;
  return variance <= kMax ? 1.0f / sqrtf(variance + kEps) : nanf("");
}

// log σ from the policy's second head.
IQMPC_DEVICE inline float log_deviation(float s, float low, float high) {
  return low + 0.5f * (high - low) * (tanhf(s) + 1.0f);
}

// u, of the action tanh(u).
IQMPC_DEVICE inline float before_squashing(float mean, float log_std, float noise) {
  return mean + expf(log_std) * noise;
}

// One dimension's share of log π(tanh(u)).
IQMPC_DEVICE inline float log_density(float mean, float log_std, float noise) {
  constexpr float kLogTwo = 0.69314718f, kHalfLogTwoPi = 0.91893853f;
  const float u = before_squashing(mean, log_std, noise);
  // log(1 - tanh(u)²), in a form that does not cancel for large |u|
  const float softplus = (u < 0.0f ? -2.0f * u : 0.0f) + log1pf(expf(-fabsf(2.0f * u)));
  return -0.5f * noise * noise - log_std - kHalfLogTwoPi - 2.0f * (kLogTwo - u - softplus);
}

}  // namespace iqmpc::gpu
