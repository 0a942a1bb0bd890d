// What one instruction-set level offers to the operations built on it.
#pragma once

#include <cstddef>

#include "iqmpc/isa.hpp"

namespace iqmpc::detail {

struct KernelTable {
  // Rows of x in one register tile; a caller that blocks rows itself does so in multiples of it.
  std::ptrdiff_t tile_rows;
  // Outputs in one packed panel.
  std::ptrdiff_t panel;

  // y [rows, out] = x [rows, in] W^T + bias. x and y are row-major with leading dimensions ldx and
  // ldy; `panels` and `bias` are laid out as NormedLinear's. Writes nothing beyond column `out`.
  void (*linear)(const float* x, std::ptrdiff_t ldx, std::ptrdiff_t rows, const float* panels,
                 const float* bias, std::ptrdiff_t in, std::ptrdiff_t out, float* y,
                 std::ptrdiff_t ldy);

  // y [rows, n] = mish(layer_norm(y) * gamma + beta), in place.
  void (*layer_norm_mish)(float* y, std::ptrdiff_t ldy, std::ptrdiff_t rows, const float* gamma,
                          const float* beta, std::ptrdiff_t n);
};

// The kernels of a level that isa_levels() lists.
const KernelTable& kernel_table(Isa isa) noexcept;

}  // namespace iqmpc::detail
