// The kernels of cpu/learn_table.hpp. CMake compiles this file once per instruction-set level, with
// that level's flags and IQMPC_LEVEL set to its name; cpu/simd.hpp says what such a file must not
// do.
#include "cpu/learn_table.hpp"
#include "cpu/random.hpp"
#include "cpu/simd.hpp"

namespace iqmpc::detail::IQMPC_LEVEL {

namespace {

// As in cpu/kernels.cpp: the accumulators of a tile and one step's operands fill the registers.
#if defined(__AVX512F__)
constexpr int kRows = 14;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 6;
#endif
constexpr int kVecs = 2;
constexpr int kPanel = kVecs * kWidth;

Bits load_units(const Unit* p) {
  Bits v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

void store_units(Unit* p, Bits v) { __builtin_memcpy(p, &v, sizeof v); }

// The first `count` numbers from p, if there are so many, and zeros.
Vec load_up_to(const float* p, Index count) {
  if (count >= kWidth) return load(p);
  float lanes[kWidth] = {};
  for (Index i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

// Operands of a product: how numbers are stored, and one unit of it on a vector of outputs.
struct Floats {
  static constexpr int kStep = 1;
  static constexpr Accuracy kAccuracy = Accuracy::exact;
  using Loaded = Vec;
  static Loaded weight(const Unit* p) { return (Vec)load_units(p); }
  static Loaded input(const Unit* p) {
    float x;
    __builtin_memcpy(&x, p, sizeof x);
    return splat(x);
  }
  static Vec multiply_add(Vec acc, Loaded x, Loaded w) { return acc + x * w; }

  // kWidth units of a row of `count` numbers, zeros beyond its end.
  static Bits units(const float* row, Index count) { return (Bits)load_up_to(row, count); }
  // kWidth numbers at column i of a row.
  static void store_numbers(Unit* row, Index i, Vec x) { store_units(row + i, (Bits)x); }
};

struct Pairs {
  static constexpr int kStep = 2;
  static constexpr Accuracy kAccuracy = Accuracy::fast;
#if defined(__AVX512BF16__)
  using Loaded = __m512bh;
  static Loaded weight(const Unit* p) {
    Loaded pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }
  static Loaded input(const Unit* p) { return (Loaded)_mm512_set1_epi32(static_cast<int>(*p)); }
  static Vec multiply_add(Vec acc, Loaded x, Loaded w) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, w, x);
  }
#else
  struct Loaded {
    Vec low, high;
  };
  static Loaded widened(Bits pairs) { return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)}; }
  static Loaded weight(const Unit* p) { return widened(load_units(p)); }
  static Loaded input(const Unit* p) { return widened(Bits{} + *p); }
  static Vec multiply_add(Vec acc, Loaded x, Loaded w) {
    return acc + x.low * w.low + x.high * w.high;
  }
#endif

  static Bits units(const float* row, Index count) {
    typedef std::uint64_t Both __attribute__((vector_size(kWidth * sizeof(Unit))));
    typedef Unit HalfOfUnits __attribute__((vector_size(kWidth * sizeof(Unit) / 2)));
    HalfOfUnits units[2];
    for (int i = 0; i < 2; ++i) {
      const Both both = (Both)rounded_to_bf16(load_up_to(row + i * kWidth, count - i * kWidth));
      units[i] =
          __builtin_convertvector((both >> 16 & 0xffffu) | (both >> 32 & 0xffff0000u), HalfOfUnits);
    }
    Bits result;
    __builtin_memcpy(&result, units, sizeof result);
    return result;
  }
  static void store_numbers(Unit* row, Index i, Vec x) {
    const Halves halves = __builtin_convertvector(rounded_to_bf16(x) >> 16, Halves);
    __builtin_memcpy(reinterpret_cast<std::uint16_t*>(row) + i, &halves, sizeof halves);
  }
};

template <class Ops, int Rows>
void tile(const Unit* a, Index am, Index ak, const Unit* b, Index ldb, const float* init,
          Index ld_init, Index depth, float* c, Index ldc) {
  Vec acc[Rows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      acc[r][v] = init ? load(init + r * ld_init + v * kWidth) : Vec{};
    }
  }
  for (Index k = 0; k < depth; ++k) {
    typename Ops::Loaded weight[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) weight[v] = Ops::weight(b + k * ldb + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const auto input = Ops::input(a + r * am + k * ak);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Ops::multiply_add(acc[r][v], input, weight[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kWidth, acc[r][v]);
  }
}

using Tile = void (*)(const Unit*, Index, Index, const Unit*, Index, const float*, Index, Index,
                      float*, Index);

// tiles[r - 1] handles r rows.
template <class Ops, int N, int... Count>
struct UpTo : UpTo<Ops, N - 1, N - 1, Count...> {};
template <class Ops, int... Count>
struct UpTo<Ops, 0, Count...> {
  static constexpr Tile tiles[] = {tile<Ops, Count + 1>...};
};

template <class Ops>
void product(const Unit* a, Index am, Index ak, const Unit* b, Index ldb, Index b_panel,
             const float* init, Index ld_init, Index rows, Index columns, Index depth, float* c,
             Index ldc) {
  const Index tiles = (rows + kRows - 1) / kRows;
  for (Index column = 0; column < columns; column += kPanel, b += b_panel) {
    for (Index t = 0; t < tiles; ++t) {
      const Index first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
      UpTo<Ops, kRows>::tiles[count - 1](a + first * am, am, ak, b, ldb,
                                         init ? init + first * ld_init + column : nullptr, ld_init,
                                         depth, c + first * ldc + column, ldc);
    }
  }
}

// Panels are columns of outputs: squares of the weight, transposed in registers.
template <class Ops>
void pack_forward(const float* weight, Index outputs, Index inputs, Index first, Index last,
                  Unit* panels) {
  const Index depth = (inputs + Ops::kStep - 1) / Ops::kStep;
  for (Index output = first; output < last; output += kWidth) {
    // A panel's two vectors one after the other; beyond the outputs there are zeros.
    Unit* target = panels + output / kPanel * kPanel * depth + output % kPanel;
    for (Index k = 0; k < depth; k += kWidth) {
      Vec x[kWidth];
      for (int r = 0; r < kWidth; ++r) {
        x[r] = output + r < outputs
                   ? (Vec)Ops::units(weight + (output + r) * inputs + k * Ops::kStep,
                                     inputs - k * Ops::kStep)
                   : Vec{};
      }
      transpose_square(x);
      const Index count = depth - k < kWidth ? depth - k : kWidth;
      for (Index i = 0; i < count; ++i) store_units(target + (k + i) * kPanel, (Bits)x[i]);
    }
  }
}

// `count` floats, the rest of a panel zero.
void load_panel(const float* p, Index count, Vec* v) {
  for (int i = 0; i < kVecs; ++i, p += kWidth, count -= kWidth) {
    v[i] = load_up_to(p, count);
  }
}

template <class Ops>
void pack_backward(const float* weight, Index outputs, Index inputs, Index from, Index to,
                   Index first, Index last, Unit* panels) {
  const Index depth = (outputs + Ops::kStep - 1) / Ops::kStep;
  for (Index i = from; i < to; i += kPanel, panels += depth * kPanel) {
    const Index count = to - i < kPanel ? to - i : kPanel;
    for (Index o = first; o < last; o += Ops::kStep) {
      Vec rows[2][kVecs] = {};
      load_panel(weight + o * inputs + i, count, rows[0]);
      // Only of a pair: otherwise it may be the next strip's, which another thread is changing.
      if (Ops::kStep == 2 && o + 1 < outputs) {
        load_panel(weight + (o + 1) * inputs + i, count, rows[1]);
      }
      Unit* target = panels + o / Ops::kStep * kPanel;
      for (int v = 0; v < kVecs; ++v) {
        const Bits units = Ops::kStep == 1 ? (Bits)rows[0][v]
                                           : (rounded_to_bf16(rows[0][v]) >> 16) |
                                                 (rounded_to_bf16(rows[1][v]) & 0xffff0000u);
        store_units(target + v * kWidth, units);
      }
    }
  }
}

template <class Ops>
void to_operand(const float* x, Index ldx, Index rows, Index count, Unit* out, Index ld_out) {
  for (Index r = 0; r < rows; ++r) {
    for (Index i = 0; i < count; i += kPanel) {
      Vec v[kVecs];
      load_panel(x + r * ldx + i, count - i, v);
      for (int j = 0; j < kVecs; ++j) Ops::store_numbers(out + r * ld_out, i + j * kWidth, v[j]);
    }
  }
}

void interleave(const Unit* x, Index ldx, Index rows, Index columns, Unit* out, Index ld_out) {
  for (Index r = 0; r < rows; r += 2) {
    const auto* low = reinterpret_cast<const std::uint16_t*>(x + r * ldx);
    const auto* high = reinterpret_cast<const std::uint16_t*>(x + (r + 1) * ldx);
    for (Index i = 0; i < columns; i += kWidth) {
      Halves a, b;
      __builtin_memcpy(&a, low + i, sizeof a);
      __builtin_memcpy(&b, high + i, sizeof b);
      store_units(out + r / 2 * ld_out + i,
                  __builtin_convertvector(a, Bits) | __builtin_convertvector(b, Bits) << 16);
    }
  }
}

// Two sums over a row at once, each in two accumulators.
struct RowSums {
  Vec a[2] = {}, b[2] = {};
  float first() const { return sum_lanes(a[0] + a[1]); }
  float second() const { return sum_lanes(b[0] + b[1]); }
};

constexpr float kEps = 1e-5f;
constexpr float kMax = 3.402823466e38f;

struct Moments {
  float mean, scale;
};

// Rows whose sums are taken together, so that none waits for another's last addition.
constexpr Index kTogether = 4;

// Of `Rows` rows, which are multiplied by the mask first; a scale is NaN where the variance
// overflows.
template <int Rows>
void moments(float* y, Index ld, const float* mask, const NormParameters& norm, Moments* result) {
  const Index padded = norm.padded;
  const float inverse = 1.0f / static_cast<float>(norm.features);
  Vec sum[Rows] = {};
  for (Index i = 0; i < padded; i += kWidth) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      Vec x = load(y + r * ld + i);
      if (mask) {
        x *= load(mask + r * ld + i);
        store(y + r * ld + i, x);
      }
      sum[r] += x;
    }
  }
  Vec mean[Rows], square[Rows] = {};
  for (int r = 0; r < Rows; ++r) mean[r] = splat(sum_lanes(sum[r]) * inverse);
  for (Index i = 0; i < padded; i += kWidth) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vec x = load(y + r * ld + i) - mean[r];
      square[r] += x * x;
    }
  }
  for (int r = 0; r < Rows; ++r) {
    const float m = mean[r][0];
    // Padding is zero before the mean is taken off.
    const float beyond = static_cast<float>(padded - norm.features) * m * m;
    const float variance = (sum_lanes(square[r]) - beyond) * inverse;
    const float scale = 1.0f / __builtin_sqrtf((variance > 0 ? variance : 0) + kEps);
    result[r] = {m, variance <= kMax ? scale : __builtin_nanf("")};
  }
}

// Calls row(r, moments) for every row.
template <class Row>
void each_normed(float* y, Index ld, Index rows, const float* mask, const NormParameters& norm,
                 Row&& row) {
  Moments m[kTogether];
  Index r = 0;
  for (; r + kTogether <= rows; r += kTogether) {
    moments<kTogether>(y + r * ld, ld, mask ? mask + r * ld : nullptr, norm, m);
    for (Index j = 0; j < kTogether; ++j) row(r + j, m[j]);
  }
  for (; r < rows; ++r) {
    moments<1>(y + r * ld, ld, mask ? mask + r * ld : nullptr, norm, m);
    row(r, m[0]);
  }
}

// mish(u) and its derivative share their exponential: with e = e^u, n = e (e + 2), t = n / (n + 2),
// mish = u t and mish' = t + u 4 e (e + 1) / (n + 2)².
template <Accuracy accuracy>
Vec mish_and_slope(Vec u, Vec* slope) {
  const Vec e = exp_in_range<accuracy>(at_least(at_most(u, 20.0f), -87.0f));
  const Vec n = e * (e + splat(2.0f));
  const Vec r = reciprocal<accuracy>(n + splat(2.0f));
  const Vec t = n * r;
  // (4 e r) ((e + 1) r): neither factor overflows.
  *slope = t + u * ((splat(4.0f) * e * r) * ((e + splat(1.0f)) * r));
  return u * t;
}

// mish''(u) = 2 t' + u t'', t' = (1 - t²) σ(u), t'' = t' (1 - σ - 2 t σ).
Vec mish_curvature(Vec u) {
  const Vec e = exp_in_range<Accuracy::exact>(at_least(at_most(u, 20.0f), -87.0f));
  const Vec n = e * (e + splat(2.0f));
  const Vec r = reciprocal<Accuracy::exact>(n + splat(2.0f));
  const Vec t = n * r;
  const Vec sigma = e * reciprocal<Accuracy::exact>(e + splat(1.0f));
  const Vec first = (splat(4.0f) * e * r) * ((e + splat(1.0f)) * r);
  return first * (splat(2.0f) + u * (splat(1.0f) - sigma - splat(2.0f) * t * sigma));
}

template <class Ops>
void norm_mish(float* y, Index rows, const float* mask, const NormTrace& trace,
               const NormParameters& norm, Unit* out, Index ld_out) {
  const Index ld = trace.ld;
  each_normed(y, ld, rows, mask, norm, [&](Index r, Moments m) {
    float* row = y + r * ld;
    trace.scale[r] = m.scale;
    for (Index i = 0; i < norm.padded; i += kWidth) {
      const Vec normed = (load(row + i) - splat(m.mean)) * splat(m.scale);
      store(row + i, normed);
      const Vec u = normed * load(norm.gamma + i) + load(norm.beta + i);
      Vec slope;
      const Vec h = mish_and_slope<Ops::kAccuracy>(u, &slope);
      store(trace.slope + r * ld + i, slope);
      Ops::store_numbers(out + r * ld_out, i, h);
    }
  });
}

template <class Ops>
void norm_mish_only(float* y, Index ld, Index rows, const float* mask, const NormParameters& norm,
                    Unit* out, Index ld_out) {
  each_normed(y, ld, rows, mask, norm, [&](Index r, Moments m) {
    const float* row = y + r * ld;
    for (Index i = 0; i < norm.padded; i += kWidth) {
      const Vec normed = (load(row + i) - splat(m.mean)) * splat(m.scale);
      const Vec u = normed * load(norm.gamma + i) + load(norm.beta + i);
      Ops::store_numbers(out + r * ld_out, i, mish<Ops::kAccuracy>(u));
    }
  });
}

// The end of every backward pass through a LayerNorm. On entry `x_bar` holds dL/dx̂ of one row, m
// and mx its mean and its mean with x̂; leaves dL/d(x W^T + b).
template <class Ops>
void finish_row(const float* x_bar, float m, float mx, float scale, float through_scale,
                const float* normed, const float* mask, const NormParameters& norm, Unit* out,
                float* bias_sum) {
  // through_scale: what dL/d(scale) adds, a multiple of x̂.
  const Vec along = splat(scale * mx + through_scale);
  for (Index i = 0; i < norm.padded; i += kWidth) {
    Vec dy = (load(x_bar + i) - splat(m)) * splat(scale) - load(normed + i) * along;
    if (mask) dy *= load(mask + i);
    Ops::store_numbers(out, i, dy);
    if (bias_sum) store(bias_sum + i, load(bias_sum + i) + dy);
  }
}

template <class Ops>
void norm_mish_backward(const float* g, Index ldg, Index rows, const std::int32_t* rows_of,
                        const float* mask, const NormTrace& trace, const NormParameters& norm,
                        Unit* out, Index ld_out, const ColumnSums& sums) {
  alignas(64) float x_bar[kWidestLayer];
  const Index ld = trace.ld;
  const float inverse = 1.0f / static_cast<float>(norm.features);
  for (Index r = 0; r < rows; ++r) {
    const Index at = rows_of ? rows_of[r] : r;
    const float* normed = trace.normed + at * ld;
    const float* slope = trace.slope + at * ld;
    const float* row = g + r * ldg;
    RowSums s;
    for (Index i = 0; i < norm.padded; i += kPanel) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        const Index j = i + v * kWidth;
        const Vec u_bar = load(row + j) * load(slope + j), x = load(normed + j);
        if (sums.gamma) {
          store(sums.gamma + j, load(sums.gamma + j) + u_bar * x);
          store(sums.beta + j, load(sums.beta + j) + u_bar);
        }
        const Vec t = u_bar * load(norm.gamma + j);
        store(x_bar + j, t);
        s.a[v] += t;
        s.b[v] += t * x;
      }
    }
    finish_row<Ops>(x_bar, s.first() * inverse, s.second() * inverse, trace.scale[at], 0, normed,
                    mask ? mask + at * ld : nullptr, norm, out + r * ld_out, sums.bias);
  }
}

// Member v of every group of a row in the v-th stretch of `out`, each padded to whole vectors: then
// a group's numbers lie one below the other and no lane meets another. And back.
void by_member(const float* row, Index group, Index groups, Index ld, float* out) {
  for (Index g = 0; g < groups; ++g) {
    for (Index v = 0; v < group; ++v) out[v * ld + g] = row[g * group + v];
  }
}

void by_group(const float* row, Index group, Index groups, Index ld, float* out) {
  for (Index g = 0; g < groups; ++g) {
    for (Index v = 0; v < group; ++v) out[g * group + v] = row[v * ld + g];
  }
}

void norm_simnorm(float* y, Index ld, Index rows, const NormParameters& norm, Index group,
                  float* scale, float* z, Index ldz) {
  alignas(64) float members[kWidestLayer];
  const Index groups = norm.features / group, stretch = (groups + kWidth - 1) / kWidth * kWidth;
  for (Index i = 0; i < group * stretch; ++i) members[i] = 0;
  each_normed(y, ld, rows, nullptr, norm, [&](Index r, Moments m) {
    float *row = y + r * ld, *target = z + r * ldz;
    scale[r] = m.scale;
    for (Index i = 0; i < norm.padded; i += kWidth) {
      const Vec normed = (load(row + i) - splat(m.mean)) * splat(m.scale);
      store(row + i, normed);
      store(target + i, normed * load(norm.gamma + i) + load(norm.beta + i));
    }
    by_member(target, group, groups, stretch, members);
    for (Index g = 0; g < stretch; g += kWidth) {
      Vec highest = load(members + g);
      for (Index v = 1; v < group; ++v) {
        const Vec x = load(members + v * stretch + g);
        highest = highest > x ? highest : x;
      }
      Vec sum{};
      for (Index v = 0; v < group; ++v) {
        float* at = members + v * stretch + g;
        const Vec e =
            exp_in_range<Accuracy::exact>(at_least(at_most(load(at) - highest, 0.0f), -87.0f));
        store(at, e);
        sum += e;
      }
      const Vec share = reciprocal<Accuracy::exact>(sum);
      for (Index v = 0; v < group; ++v) {
        float* at = members + v * stretch + g;
        store(at, load(at) * share);
      }
    }
    by_group(members, group, groups, stretch, target);
    for (Index i = norm.features; i < norm.padded; ++i) target[i] = 0;
  });
}

template <class Ops>
void norm_simnorm_backward(const float* g, Index ldg, Index rows, const float* z, Index ldz,
                           const NormTrace& trace, const NormParameters& norm, Index group,
                           Unit* out, Index ld_out, const ColumnSums& sums) {
  alignas(64) float x_bar[kWidestLayer];
  const float inverse = 1.0f / static_cast<float>(norm.features);
  for (Index i = 0; i < norm.padded; ++i) x_bar[i] = 0;
  for (Index r = 0; r < rows; ++r) {
    const float *gr = g + r * ldg, *zr = z + r * ldz, *normed = trace.normed + r * trace.ld;
    for (Index i = 0; i < norm.features; i += group) {
      float mean = 0;
      for (Index j = i; j < i + group; ++j) mean += gr[j] * zr[j];
      for (Index j = i; j < i + group; ++j) x_bar[j] = zr[j] * (gr[j] - mean);
    }
    RowSums s;
    for (Index i = 0; i < norm.padded; i += kWidth) {
      const Vec u_bar = load(x_bar + i), x = load(normed + i);
      store(sums.gamma + i, load(sums.gamma + i) + u_bar * x);
      store(sums.beta + i, load(sums.beta + i) + u_bar);
      const Vec t = u_bar * load(norm.gamma + i);
      store(x_bar + i, t);
      s.a[0] += t;
      s.b[0] += t * x;
    }
    finish_row<Ops>(x_bar, s.first() * inverse, s.second() * inverse, trace.scale[r], 0, normed,
                    nullptr, norm, out + r * ld_out, sums.bias);
    for (Index i = norm.features; i < norm.padded; ++i) x_bar[i] = 0;
  }
}

// Forwards, r = s (v - mean(v) - x̂ mean(v x̂)) with v = γ c mish' and s the scale, is how the first
// gradient passes a layer; here it is differentiated by c, γ, u = γ x̂ + β, x̂ and s.
template <class Ops>
void penalty_backward(float* r_bar, const float* c, Index rows, const float* mask,
                      const NormTrace& trace, const NormParameters& norm, Unit* out, Index ld_out,
                      float* out_sum, float* u_bar, float* x_bar, float* scale_bar,
                      const ColumnSums& sums) {
  const Index ld = trace.ld, padded = norm.padded;
  const float inverse = 1.0f / static_cast<float>(norm.features);
  for (Index row = 0; row < rows; ++row) {
    const Index at = row * ld;
    float* rb = r_bar + at;
    const float *cr = c + at, *x = trace.normed + at, *slope = trace.slope + at;
    if (mask) {
      for (Index i = 0; i < padded; i += kWidth) store(rb + i, load(rb + i) * load(mask + at + i));
    }
    RowSums sv, sr;
    Vec both{};
    for (Index i = 0; i < padded; i += kWidth) {
      const Vec v = load(norm.gamma + i) * load(cr + i) * load(slope + i), xi = load(x + i);
      const Vec ri = load(rb + i);
      sv.a[0] += v;
      sv.b[0] += v * xi;
      sr.a[0] += ri;
      sr.b[0] += ri * xi;
      both += ri * v;
    }
    const float mv = sv.first() * inverse, mvx = sv.second() * inverse;
    const float mr = sr.first() * inverse, mrx = sr.second() * inverse;
    const float scale = trace.scale[row];
    const auto n = static_cast<float>(norm.features);
    scale_bar[row] = sum_lanes(both) - n * mr * mv - n * mrx * mvx;
    for (Index i = 0; i < padded; i += kWidth) {
      const Vec gamma = load(norm.gamma + i), ci = load(cr + i), si = load(slope + i);
      const Vec xi = load(x + i), ri = load(rb + i);
      const Vec v_bar = (ri - splat(mr) - xi * splat(mrx)) * splat(scale);
      store(x_bar + at + i, -splat(scale) * (ri * splat(mvx) + gamma * ci * si * splat(mrx)));
      const Vec p_bar = gamma * v_bar;
      store(sums.gamma + i, load(sums.gamma + i) + v_bar * ci * si);
      const Vec c_bar = p_bar * si;
      Ops::store_numbers(out + row * ld_out, i, c_bar);
      if (out_sum) store(out_sum + i, load(out_sum + i) + c_bar);
      const Vec u = gamma * xi + load(norm.beta + i);
      store(u_bar + at + i, p_bar * ci * mish_curvature(u));
    }
  }
}

template <class Ops>
void penalty_finish(const float* h_bar, const float* u_bar, const float* x_bar,
                    const float* scale_bar, Index rows, const float* mask, const NormTrace& trace,
                    const NormParameters& norm, Unit* out, Index ld_out, const ColumnSums& sums) {
  alignas(64) float whole[kWidestLayer];
  const Index ld = trace.ld;
  const float inverse = 1.0f / static_cast<float>(norm.features);
  for (Index r = 0; r < rows; ++r) {
    const Index at = r * ld;
    const float* x = trace.normed + at;
    RowSums s;
    for (Index i = 0; i < norm.padded; i += kWidth) {
      Vec u = load(u_bar + at + i);
      const Vec xi = load(x + i);
      if (h_bar) u += load(h_bar + at + i) * load(trace.slope + at + i);
      store(sums.gamma + i, load(sums.gamma + i) + u * xi);
      store(sums.beta + i, load(sums.beta + i) + u);
      const Vec t = load(x_bar + at + i) + u * load(norm.gamma + i);
      store(whole + i, t);
      s.a[0] += t;
      s.b[0] += t * xi;
    }
    const float scale = trace.scale[r];
    finish_row<Ops>(whole, s.first() * inverse, s.second() * inverse, scale,
                    scale_bar[r] * scale * scale * inverse, x, mask ? mask + at : nullptr, norm,
                    out + r * ld_out, sums.bias);
  }
}

void dot_rows(const float* h, Index ld, Index rows, const float* w, float bias, Index count,
              float* out) {
  for (Index r = 0; r < rows; ++r) {
    Vec sum[2] = {};
    for (Index i = 0; i < count; i += kPanel) {
      for (int v = 0; v < kVecs; ++v) {
        sum[v] += load(h + r * ld + i + v * kWidth) * load(w + i + v * kWidth);
      }
    }
    out[r] = sum_lanes(sum[0] + sum[1]) + bias;
  }
}

void weighted_sum(const float* h, Index ld, Index rows, const float* weight, Index count,
                  float* sum) {
  for (Index i = 0; i < count; i += kPanel) {
    Vec total[kVecs] = {load(sum + i), load(sum + i + kWidth)};
    for (Index r = 0; r < rows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        total[v] += splat(weight[r]) * load(h + r * ld + i + v * kWidth);
      }
    }
    for (int v = 0; v < kVecs; ++v) store(sum + i + v * kWidth, total[v]);
  }
}

void outer(const float* weight, const std::int32_t* rows_of, Index rows, const float* w,
           Index count, float* out, Index ld) {
  for (Index r = 0; r < rows; ++r) {
    const Vec scale = splat(weight[rows_of ? rows_of[r] : r]);
    for (Index i = 0; i < count; i += kWidth) store(out + r * ld + i, scale * load(w + i));
  }
}

void add_rows(const float* x, Index ldx, Index rows, Index count, float* y, Index ldy) {
  for (Index r = 0; r < rows; ++r) {
    for (Index i = 0; i < count; i += kWidth) {
      store(y + r * ldy + i, load(y + r * ldy + i) + load(x + r * ldx + i));
    }
  }
}

constexpr float kClamp = 1e-6f;  // inside presquash's logarithm

void policy_sample(const float* head, Index ld_head, Index rows, const float* noise, Index actions,
                   float low, float high, bool presquash, float* action, Index ld_action,
                   float* log_prob, float* kept) {
  const Vec half = splat(0.5f * (high - low));
  const Vec part = splat(presquash ? 1.0f / static_cast<float>(actions) : 1.0f);
  for (Index r = 0; r < rows; ++r) {
    const float *mean = head + r * ld_head, *s = mean + actions, *eps = noise + r * actions;
    Vec total{};
    for (Index i = 0; i < actions; i += kWidth) {
      const Index count = actions - i < kWidth ? actions - i : kWidth;
      const auto get = [&](const float* p) {
        return count == kWidth ? load(p + i) : load_partial(p + i, count, 0.0f);
      };
      const auto put = [&](float* p, Vec v) {
        if (count == kWidth) {
          store(p + i, v);
        } else {
          store_partial(p + i, v, count);
        }
      };
      const Vec squashed = tanh(get(s));
      const Vec log_std = splat(low) + half * (squashed + splat(1.0f));
      const Vec epsilon = get(eps);
      const Vec spread =
          exp_in_range<Accuracy::exact>(at_least(at_most(log_std, 88.0f), -87.0f)) * epsilon;
      const Vec u = get(mean) + spread;
      // tanh and 1 - tanh² from e^(-2|u|): 1 - a * a would be rounding alone where a is near ±1.
      const Bits sign = (Bits)u & 0x80000000u;
      const Vec absolute = (Vec)((Bits)u ^ sign);
      const Vec e = exp_in_range<Accuracy::exact>(at_least(splat(-2.0f) * absolute, -87.0f));
      const Vec one_more = splat(1.0f) + e;
      const Vec share = reciprocal<Accuracy::exact>(one_more);
      const Vec a = (Vec)((Bits)((splat(1.0f) - e) * share) | sign);
      const Vec open = splat(4.0f) * e * share * share;
      put(action + r * ld_action, a);
      if (kept) {
        float* row = kept + r * 3 * ld_action;
        put(row, spread);
        put(row + ld_action, half * (splat(1.0f) - squashed * squashed));
        put(row + 2 * ld_action, open);
      }
      // ln(1 - a²) = 2 (ln 2 - |u| - ln(1 + e))
      const Vec squash =
          presquash ? log_positive(open + splat(kClamp))
                    : splat(2.0f) * (splat(0.69314718f) - absolute - log_positive(one_more));
      Vec density = splat(-0.5f) * epsilon * epsilon - log_std - splat(0.91893853f) - part * squash;
      if (count < kWidth) {  // lanes beyond the actions
        float lanes[kWidth];
        store(lanes, density);
        for (Index j = count; j < kWidth; ++j) lanes[j] = 0;
        density = load(lanes);
      }
      total += density;
    }
    log_prob[r] = sum_lanes(total);
  }
}

void policy_backward(const float* da, Index ld_da, Index rows, const float* action, Index ld_action,
                     const float* kept, Index actions, bool presquash, const float* entropy_weight,
                     float* g, Index ldg) {
  const float part = presquash ? 1.0f / static_cast<float>(actions) : 1.0f;
  for (Index r = 0; r < rows; ++r) {
    const float *a = action + r * ld_action, *spread = kept + r * 3 * ld_action;
    const float *slope = spread + ld_action, *open = slope + ld_action;
    float *mean = g + r * ldg, *s = mean + actions;
    for (Index i = 0; i < actions; ++i) {
      // d(-part ln(1 - a²))/du is part 2 a, and with the clamp part 2 a (1 - a²) / (1 - a² + 1e-6).
      const float squash = presquash ? 2 * a[i] * open[i] / (open[i] + kClamp) : 2 * a[i];
      const float du = da[r * ld_da + i] * open[i] + entropy_weight[r] * part * squash;
      mean[i] = du;
      s[i] = (du * spread[i] - entropy_weight[r]) * slope[i];
    }
  }
}

double squared_error(const float* z, const float* target, Index ld, Index rows, Index count,
                     float factor, float* g) {
  double total = 0;
  for (Index r = 0; r < rows; ++r) {
    Vec sum{};
    for (Index i = 0; i < count; i += kWidth) {  // padding is zero on both sides
      const Vec error = load(z + r * ld + i) - load(target + r * ld + i);
      sum += error * error;
      store(g + r * ld + i, load(g + r * ld + i) + splat(factor) * error);
    }
    total += sum_lanes(sum);
  }
  return total;
}

double sum_squares(const float* x, Index count) {
  Vec sum[2] = {};
  Index i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    const Vec a = load(x + i), b = load(x + i + kWidth);
    sum[0] += a * a;
    sum[1] += b * b;
  }
  double total = 0;
  for (; i < count; ++i) total += static_cast<double>(x[i]) * x[i];
  return total + sum_lanes(sum[0] + sum[1]);
}

void adam(const AdamStep& step, const float* gradient, Index count, float* value, float* m,
          float* v) {
  const auto one = [&](Vec g, Vec* x, Vec* m1, Vec* v1) {
    g *= splat(step.clip);
    *m1 += splat(1.0f - step.beta1) * (g - *m1);
    *v1 = splat(step.beta2) * *v1 + splat(1.0f - step.beta2) * g * g;
#if defined(__AVX512F__)
    const Vec root = (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)*v1);
#elif defined(__AVX2__)
    const Vec root = (Vec)_mm256_sqrt_ps((__m256)*v1);
#else
    const Vec root = sqrt_lanes(*v1);
#endif
    *x -= splat(step.rate) * *m1 / (root * splat(step.correction) + splat(step.epsilon));
  };
  Index i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    Vec x = load(value + i), m1 = load(m + i), v1 = load(v + i);
    one(load(gradient + i), &x, &m1, &v1);
    store(value + i, x);
    store(m + i, m1);
    store(v + i, v1);
  }
  if (i == count) return;
  const Index rest = count - i;
  Vec x = load_partial(value + i, rest, 0), m1 = load_partial(m + i, rest, 0);
  Vec v1 = load_partial(v + i, rest, 0);
  one(load_partial(gradient + i, rest, 0), &x, &m1, &v1);
  store_partial(value + i, x, rest);
  store_partial(m + i, m1, rest);
  store_partial(v + i, v1, rest);
}

void move(float rate, const float* x, Index count, float* y) {
  Index i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec old = load(y + i);
    store(y + i, old + splat(rate) * (load(x + i) - old));
  }
  for (; i < count; ++i) y[i] += rate * (x[i] - y[i]);
}

template <class Ops>
constexpr LearnTable make_table() {
  constexpr bool kFloats = Ops::kStep == 1;
  return {kPanel,
          Ops::kStep,
          product<Ops>,
          pack_forward<Ops>,
          pack_backward<Ops>,
          to_operand<Ops>,
          kFloats ? nullptr : interleave,
          norm_mish<Ops>,
          norm_mish_only<Ops>,
          norm_mish_backward<Ops>,
          norm_simnorm,
          norm_simnorm_backward<Ops>,
          penalty_backward<Ops>,
          penalty_finish<Ops>,
          dot_rows,
          weighted_sum,
          outer,
          add_rows,
          policy_sample,
          policy_backward,
          squared_error,
          sum_squares,
          adam,
          move,
          fill_dropout};
}

}  // namespace

// In the order of Precision.
extern const LearnTable learn_tables[2];
const LearnTable learn_tables[2] = {make_table<Floats>(), make_table<Pairs>()};

}  // namespace iqmpc::detail::IQMPC_LEVEL
