// The dense-layer kernels. CMake compiles this file once per instruction-set level, with that
// level's flags and IQMPC_LEVEL set to its name; cpu/simd.hpp says what such a file must not do.
#include "cpu/kernel_table.hpp"
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

// One register tile: y [Rows, kPanel] = x [Rows, in] panel + bias.
template <int Rows>
void tile(const float* x, std::ptrdiff_t ldx, const float* panel, const float* bias,
          std::ptrdiff_t in, float* y, std::ptrdiff_t ldy) {
  Vec acc[Rows][kPanelVecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) acc[r][v] = load(bias + v * kWidth);
  }
  for (std::ptrdiff_t k = 0; k < in; ++k) {
    Vec weight[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) weight[v] = load(panel + k * kPanel + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec input = splat(x[r * ldx + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) acc[r][v] += input * weight[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) store(y + r * ldy + v * kWidth, acc[r][v]);
  }
}

using Tile = void (*)(const float*, std::ptrdiff_t, const float*, const float*, std::ptrdiff_t,
                      float*, std::ptrdiff_t);

// Tiles[r - 1] handles r rows, so that a short batch costs no padded rows.
template <int N, int... Index>
struct UpTo : UpTo<N - 1, N - 1, Index...> {};
template <int... Index>
struct UpTo<0, Index...> {
  static constexpr Tile tiles[] = {tile<Index + 1>...};
};
constexpr const Tile* kTiles = UpTo<kTileRows>::tiles;

void linear(const float* x, std::ptrdiff_t ldx, std::ptrdiff_t rows, const float* panels,
            const float* bias, std::ptrdiff_t in, std::ptrdiff_t out, float* y,
            std::ptrdiff_t ldy) {
  const std::ptrdiff_t tiles = (rows + kTileRows - 1) / kTileRows;
  // Panels outside, tiles inside: a panel is read from memory once and then from the nearest cache.
  for (std::ptrdiff_t column = 0; column < out; column += kPanel) {
    const float* panel = panels + column * in;
    const std::ptrdiff_t columns = out - column < kPanel ? out - column : kPanel;
    for (std::ptrdiff_t t = 0; t < tiles; ++t) {
      // Rows are spread evenly: 16 rows in tiles of at most 14 are 8 + 8, not 14 + 2.
      const std::ptrdiff_t first = rows * t / tiles;
      const std::ptrdiff_t count = rows * (t + 1) / tiles - first;
      const Tile run = kTiles[count - 1];
      float* destination = y + first * ldy + column;
      if (columns == kPanel) {
        run(x + first * ldx, ldx, panel, bias + column, in, destination, ldy);
        continue;
      }
      float whole[kTileRows * kPanel];
      run(x + first * ldx, ldx, panel, bias + column, in, whole, kPanel);
      for (std::ptrdiff_t r = 0; r < count; ++r) {
        __builtin_memcpy(destination + r * ldy, whole + r * kPanel,
                         static_cast<std::size_t>(columns) * sizeof(float));
      }
    }
  }
}

void layer_norm_mish(float* y, std::ptrdiff_t ldy, std::ptrdiff_t rows, const float* gamma,
                     const float* beta, std::ptrdiff_t n) {
  constexpr float kEps = 1e-5f;
  constexpr float kMax = 3.402823466e38f;
  const std::ptrdiff_t whole = n - n % kWidth;
  const std::ptrdiff_t rest = n - whole;
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    float* row = y + r * ldy;

    Vec total{};
    for (std::ptrdiff_t i = 0; i < whole; i += kWidth) total += load(row + i);
    if (rest) total += load_partial(row + whole, rest, 0.0f);
    const float mean = sum_lanes(total) / static_cast<float>(n);

    // A second pass, because E[y²] - mean² cancels where the mean is large beside the deviation.
    Vec squares{};
    for (std::ptrdiff_t i = 0; i < whole; i += kWidth) {
      const Vec d = load(row + i) - splat(mean);
      squares += d * d;
    }
    if (rest) {
      const Vec d = load_partial(row + whole, rest, mean) - splat(mean);
      squares += d * d;
    }
    const float variance = sum_lanes(squares) / static_cast<float>(n);
    // An overflowed variance would turn the row into plausible zeros; NaN lets callers see it.
    const float scale =
        variance <= kMax ? 1.0f / __builtin_sqrtf(variance + kEps) : __builtin_nanf("");

    for (std::ptrdiff_t i = 0; i < whole; i += kWidth) {
      const Vec normed = (load(row + i) - splat(mean)) * splat(scale);
      store(row + i, mish(normed * load(gamma + i) + load(beta + i)));
    }
    if (rest) {
      const Vec normed = (load_partial(row + whole, rest, mean) - splat(mean)) * splat(scale);
      const Vec scaled = normed * load_partial(gamma + whole, rest, 0.0f) +
                         load_partial(beta + whole, rest, 0.0f);
      store_partial(row + whole, mish(scaled), rest);
    }
  }
}

extern const KernelTable table;
const KernelTable table = {kTileRows, kPanel, linear, layer_norm_mish};

}  // namespace iqmpc::detail::IQMPC_LEVEL
