// NormedLinear: Linear, LayerNorm, Mish (IQ-MPC, Appendix A.1), forward only, float32.
#pragma once

#include <cstddef>
#include <memory>

#include "iqmpc/export.hpp"
#include "iqmpc/isa.hpp"

namespace iqmpc {

namespace detail {
struct KernelTable;
struct PackedLayer;
}  // namespace detail

// y = mish(layer_norm(x W^T + b) * gamma + beta), with the weights packed once for one
// instruction-set level. Immutable after construction: any number of threads may call forward on
// the same object, each with its own rows.
class IQMPC_API NormedLinear {
 public:
  // Copies and packs weight [out, in] (row-major) and bias, gamma, beta [out].
  // Throws std::invalid_argument where a size is below 1, a parameter is not finite, or the machine
  // does not run `isa`.
  NormedLinear(const float* weight, const float* bias, const float* gamma, const float* beta,
               std::ptrdiff_t out_features, std::ptrdiff_t in_features, Isa isa = active_isa());
  ~NormedLinear();
  NormedLinear(NormedLinear&&) noexcept;
  NormedLinear& operator=(NormedLinear&&) noexcept;

  // x [rows, in] -> y [rows, out], both row-major and dense; they must not overlap.
  // Single-threaded. A row of x that holds a NaN or an infinity, or whose variance overflows
  // float32 (pre-activations beyond about 1e18), comes out as NaN; other rows are unaffected. With
  // one output the variance is 0 and y is mish(beta).
  void forward(const float* x, std::ptrdiff_t rows, float* y) const noexcept;

  std::ptrdiff_t in_features() const noexcept { return in_; }
  std::ptrdiff_t out_features() const noexcept { return out_; }
  Isa isa() const noexcept { return isa_; }

 private:
  std::ptrdiff_t out_;
  std::ptrdiff_t in_;
  Isa isa_;
  const detail::KernelTable* kernels_;
  std::unique_ptr<const detail::PackedLayer> layer_;
};

}  // namespace iqmpc
