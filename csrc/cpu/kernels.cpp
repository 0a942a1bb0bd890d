// The kernels of cpu/kernel_table.hpp. CMake compiles this file once per instruction-set level,
// with that level's flags and IQMPC_LEVEL set to its name; cpu/simd.hpp says what such a file must
// not do.
#include "cpu/kernel_table.hpp"
#include "cpu/random.hpp"
#include "cpu/simd.hpp"

namespace iqmpc::detail::IQMPC_LEVEL {

// A register tile is kTileRows x (kPanelVecs * kWidth) accumulators, sized to fill the register
// file together with what a step over the inputs needs: kPanelVecs weights and a broadcast input.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 16 registers
#else
constexpr int kTileRows = 6;
#endif
constexpr int kPanelVecs = 2;
constexpr int kPanel = kPanelVecs * kWidth;

// The operands of a matrix product: what is stored, and one step of it on a vector of outputs.
// bf16 weights under float activations are for machines that cannot multiply bf16: half the memory
// traffic, exact products.
template <class W>
struct Single {
  using Weight = W;
  using Activation = float;
  static constexpr int kStep = 1;
  static Vec weight(const Weight* p) { return load(p); }
  static Vec input(const Activation* p) { return splat(*p); }
  static Vec multiply_add(Vec acc, Vec x, Vec w) { return acc + x * w; }
};

#if defined(__AVX512BF16__)
// Two inputs at a time: a lane of the weights holds a pair, as does the broadcast input.
struct Paired {
  using Weight = Bf16;
  using Activation = Bf16;
  static constexpr int kStep = 2;
  static __m512bh weight(const Weight* p) {
    __m512bh pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }
  static __m512bh input(const Activation* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vec multiply_add(Vec acc, __m512bh x, __m512bh w) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, w, x);
  }
};
#endif

// One register tile: y [Rows, kPanel] = init + x [Rows, in] panel.
template <class Operands, int Rows>
void tile(const typename Operands::Activation* x, Index ldx, const typename Operands::Weight* panel,
          const float* init, Index ld_init, Index in, float* y, Index ldy) {
  constexpr int kStep = Operands::kStep;
  Vec acc[Rows][kPanelVecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) acc[r][v] = load(init + r * ld_init + v * kWidth);
  }
  for (Index k = 0; k < in; k += kStep) {
    decltype(Operands::weight(panel)) weight[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) {
      weight[v] = Operands::weight(panel + k * kPanel + v * kWidth * kStep);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const auto input = Operands::input(x + r * ldx + k);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) {
        acc[r][v] = Operands::multiply_add(acc[r][v], input, weight[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) store(y + r * ldy + v * kWidth, acc[r][v]);
  }
}

template <class Operands>
using Tile = void (*)(const typename Operands::Activation*, Index, const typename Operands::Weight*,
                      const float*, Index, Index, float*, Index);

// tiles[r - 1] handles r rows, so that a short batch costs no padded rows.
template <class Operands, int N, int... Count>
struct UpTo : UpTo<Operands, N - 1, N - 1, Count...> {};
template <class Operands, int... Count>
struct UpTo<Operands, 0, Count...> {
  static constexpr Tile<Operands> tiles[] = {tile<Operands, Count + 1>...};
};

template <class Operands>
void linear(const void* x, Index ldx, Index rows, const void* panels, const float* init,
            Index ld_init, Index in, Index out, float* y, Index ldy) {
  const auto* inputs = static_cast<const typename Operands::Activation*>(x);
  const auto* weights = static_cast<const typename Operands::Weight*>(panels);
  const Index tiles = (rows + kTileRows - 1) / kTileRows;
  // Panels outside, tiles inside: a panel is read from memory once and then from the nearest cache.
  for (Index column = 0; column < out; column += kPanel) {
    const auto* panel = weights + column * in;
    const Index columns = out - column < kPanel ? out - column : kPanel;
    for (Index t = 0; t < tiles; ++t) {
      // Rows are spread evenly: 16 rows in tiles of at most 14 are 8 + 8, not 14 + 2.
      const Index first = rows * t / tiles;
      const Index count = rows * (t + 1) / tiles - first;
      const auto run = UpTo<Operands, kTileRows>::tiles[count - 1];
      const float* start = init + first * ld_init + column;
      float* destination = y + first * ldy + column;
      if (columns == kPanel) {
        run(inputs + first * ldx, ldx, panel, start, ld_init, in, destination, ldy);
        continue;
      }
      float whole[kTileRows * kPanel];
      run(inputs + first * ldx, ldx, panel, start, ld_init, in, whole, kPanel);
      for (Index r = 0; r < count; ++r) {
        __builtin_memcpy(destination + r * ldy, whole + r * kPanel,
                         static_cast<std::size_t>(columns) * sizeof(float));
      }
    }
  }
}

// 1 / sqrt(Σ x² / n + ε) of one row, or NaN where the sum is not finite: an overflow would
// otherwise turn the row into plausible zeros.
static inline float norm_scale(const float* row, Index columns, Index n) {
  constexpr float kEps = 1e-5f;
  constexpr float kMax = 3.402823466e38f;
  const Index whole = columns - columns % kWidth;
  Vec squares[2] = {};
  Index i = 0;
  for (; i + kWidth < whole; i += 2 * kWidth) {
    const Vec a = load(row + i), b = load(row + i + kWidth);
    squares[0] += a * a;
    squares[1] += b * b;
  }
  if (i < whole) squares[0] += load(row + i) * load(row + i);
  if (whole < columns) {
    const Vec rest = load_partial(row + whole, columns - whole, 0.0f);
    squares[1] += rest * rest;
  }
  const float variance = sum_lanes(squares[0] + squares[1]) / static_cast<float>(n);
  return variance <= kMax ? 1.0f / __builtin_sqrtf(variance + kEps) : __builtin_nanf("");
}

template <class Activation>
constexpr Accuracy accuracy_for =
    sizeof(Activation) == sizeof(float) ? Accuracy::exact : Accuracy::fast;

static inline void store_rest(float* p, Vec v, Index count) { store_partial(p, v, count); }
// Never reached: activations in bf16 live in padded buffers.
static inline void store_rest(Bf16*, Vec, Index) {}

template <class Activation>
void norm_mish(const float* x, Index ldx, Index rows, const float* gamma, const float* beta,
               Index columns, Index n, void* out, Index ld_out) {
  constexpr Accuracy kAccuracy = accuracy_for<Activation>;
  const Index whole = columns - columns % kWidth;
  for (Index r = 0; r < rows; ++r) {
    const float* row = x + r * ldx;
    auto* destination = static_cast<Activation*>(out) + r * ld_out;
    const Vec scale = splat(norm_scale(row, columns, n));
    for (Index i = 0; i < whole; i += kWidth) {
      const Vec normed = load(row + i) * scale;
      store(destination + i, mish<kAccuracy>(normed * load(gamma + i) + load(beta + i)));
    }
    if (whole < columns) {
      const Vec normed = load_partial(row + whole, columns - whole, 0.0f) * scale;
      store_rest(destination + whole,
                 mish<kAccuracy>(normed * load(gamma + whole) + load(beta + whole)),
                 columns - whole);
    }
  }
}

template <class Activation>
void norm_mish_dot(const float* x, Index ldx, Index rows, const float* gamma, const float* beta,
                   Index columns, Index n, const float* w, float bias, float* out) {
  for (Index r = 0; r < rows; ++r) {
    const float* row = x + r * ldx;
    const Vec scale = splat(norm_scale(row, columns, n));
    Vec sum{};
    for (Index i = 0; i < columns; i += kWidth) {
      const Vec normed = load(row + i) * scale;
      sum +=
          load(w + i) * mish<accuracy_for<Activation>>(normed * load(gamma + i) + load(beta + i));
    }
    out[r] = sum_lanes(sum) + bias;
  }
}

template <class Activation>
void norm_simnorm(float* x, Index ldx, Index rows, const float* gamma, const float* beta, Index dim,
                  Index groups, Index n, void* out, Index ld_out) {
  for (Index r = 0; r < rows; ++r) {
    float* row = x + r * ldx;
    auto* destination = static_cast<Activation*>(out) + r * ld_out;
    const Vec scale = splat(norm_scale(row, dim * groups, n));
    // The members of a group lie in the same lane of `dim` vectors: no lane meets another.
    for (Index g = 0; g < groups; g += kWidth) {
      Vec highest = splat(-3.402823466e38f);
      for (Index i = g; i < dim * groups; i += groups) {
        const Vec logit = load(row + i) * scale * load(gamma + i) + load(beta + i);
        store(row + i, logit);
        highest = highest > logit ? highest : logit;
      }
      Vec sum{};
      for (Index i = g; i < dim * groups; i += groups) {
        const Vec e =
            exp_in_range<accuracy_for<Activation>>(at_least(load(row + i) - highest, -87.0f));
        store(row + i, e);
        sum += e;
      }
      const Vec share = reciprocal<Accuracy::exact>(sum);
      for (Index i = g; i < dim * groups; i += groups) {
        store(destination + i, load(row + i) * share);
      }
    }
  }
}

static void gaussian(const float* head, Index ld_head, Index rows, const float* noise, Index pad,
                     float low, float high, float* action) {
  const Vec half = splat(0.5f * (high - low));
  for (Index r = 0; r < rows; ++r) {
    const float* mean = head + r * ld_head;
    for (Index i = 0; i < pad; i += kWidth) {
      const Vec log_std = splat(low) + half * (tanh(load(mean + pad + i)) + splat(1.0f));
      const Vec std = exp_in_range<Accuracy::exact>(at_least(at_most(log_std, 88.0f), -87.0f));
      store(action + r * pad + i, tanh(load(mean + i) + std * load(noise + r * pad + i)));
    }
  }
}

template <class Activation>
void to_activations(const float* x, Index count, void* out) {
  auto* destination = static_cast<Activation*>(out);
  for (Index i = 0; i < count; i += kWidth) store(destination + i, load(x + i));
}

static void affine_clamp(float* x, const float* mean, const float* std, Index count) {
  for (Index i = 0; i < count; i += kWidth) {
    const Vec drawn = load(mean + i) + load(std + i) * load(x + i);
    store(x + i, at_least(at_most(drawn, 1.0f), -1.0f));
  }
}

static void column_means(const float* w, Index rows, Index columns, float* mean) {
  // As wide as a vector of the machine; several of them, so that one row's sums do not wait for the
  // row before.
  constexpr int kHalf = kWidth / 2, kVecs = 8, kColumns = kVecs * kHalf;
  typedef float Singles __attribute__((vector_size(kHalf * sizeof(float))));
  typedef double Doubles __attribute__((vector_size(kHalf * sizeof(double))));
  const double n = static_cast<double>(rows);
  Index first = 0;
  for (; first + kColumns <= columns; first += kColumns) {
    Doubles sum[kVecs] = {};
    const float* row = w + first;
    for (Index r = 0; r < rows; ++r, row += columns) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        Singles x;
        __builtin_memcpy(&x, row + v * kHalf, sizeof x);
        sum[v] += __builtin_convertvector(x, Doubles);
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      for (int i = 0; i < kHalf; ++i) {
        mean[first + v * kHalf + i] = static_cast<float>(sum[v][i] / n);
      }
    }
  }
  const Index rest = columns - first;
  if (rest == 0) return;
  double sum[kColumns] = {};
  for (Index r = 0; r < rows; ++r) {
    for (Index i = 0; i < rest; ++i) sum[i] += static_cast<double>(w[r * columns + first + i]);
  }
  for (Index i = 0; i < rest; ++i) mean[first + i] = static_cast<float>(sum[i] / n);
}

static void transpose(const float* const* rows, const float* end, const float* mean, Index columns,
                      float* out) {
  for (int part = 0; part < kPanelVecs; ++part) {
    const float* const* own = rows + part * kWidth;
    // A bit mask rather than a product: zeros stay zeros whatever the mean is.
    Bits there{};
    for (int r = 0; r < kWidth; ++r) there[r] = own[r] ? ~0u : 0u;
    float* to = out + part * kWidth;
    for (Index first = 0; first < columns; first += kWidth) {
      const Index count = columns - first < kWidth ? columns - first : kWidth;
      Vec x[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        if (!own[r]) {
          x[r] = Vec{};
        } else if (end - own[r] >= first + kWidth) {  // what lies beyond the row is not stored
          x[r] = load(own[r] + first);
        } else {
          x[r] = load_partial(own[r] + first, count, 0.0f);
        }
      }
      transpose_square(x);
      for (Index i = 0; i < count; ++i, to += kPanel) {
        store(to, (Vec)((Bits)(x[i] - splat(mean[first + i])) & there));
      }
    }
  }
}

static inline Bits bf16_bits(Vec v) { return rounded_to_bf16(v) >> 16; }

template <class Operands>
void pack_panel(const float* x, const Index* plus, const Index* minus, Index in, void* panel) {
  using Weight = typename Operands::Weight;
  constexpr int kStep = Operands::kStep;
  auto* to = static_cast<Weight*>(panel);
  const auto input = [&](Index k, int v) {
    return load(x + plus[k] * kPanel + v * kWidth) - load(x + minus[k] * kPanel + v * kWidth);
  };
  for (Index k = 0; k < in; k += kStep) {
    for (int v = 0; v < kPanelVecs; ++v, to += kStep * kWidth) {
      if constexpr (sizeof(Weight) == sizeof(float)) {
        store(to, input(k, v));
      } else if constexpr (kStep == 1) {
        const Halves halves = __builtin_convertvector(bf16_bits(input(k, v)), Halves);
        __builtin_memcpy(to, &halves, sizeof halves);
      } else {
        const Bits pairs = bf16_bits(input(k, v)) | bf16_bits(input(k + 1, v)) << 16;
        __builtin_memcpy(to, &pairs, sizeof pairs);
      }
    }
  }
}

template <class Operands>
constexpr KernelTable make_table() {
  using Activation = typename Operands::Activation;
  return {kTileRows,
          kPanel,
          kWidth,
          Operands::kStep,
          sizeof(typename Operands::Weight) < sizeof(float),
          sizeof(Activation) < sizeof(float),
          linear<Operands>,
          norm_mish<Activation>,
          norm_mish_dot<Activation>,
          norm_simnorm<Activation>,
          gaussian,
          to_activations<Activation>,
          fill_normal,
          affine_clamp,
          column_means,
          transpose,
          pack_panel<Operands>};
}

// In the order of Precision.
extern const KernelTable tables[2];
#if defined(__AVX512BF16__)
const KernelTable tables[2] = {make_table<Single<float>>(), make_table<Paired>()};
#else
const KernelTable tables[2] = {make_table<Single<float>>(), make_table<Single<Bf16>>()};
#endif

}  // namespace iqmpc::detail::IQMPC_LEVEL
