#include "iqmpc/normed_linear.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/packed_layer.hpp"

namespace iqmpc {

namespace {

// Bytes of x and y that a block of rows may take: a share of the smallest second-level cache in use
// (256 KiB), so that LayerNorm finds the block's outputs where the matrix product left them.
constexpr std::ptrdiff_t kBlockBytes = 192 * 1024;

// `prefix` is the part of the index before this row's ("3, " for row 3 of a matrix).
void check_finite(const char* name, const float* values, std::ptrdiff_t size,
                  const std::string& prefix = "") {
  for (std::ptrdiff_t i = 0; i < size; ++i) {
    if (std::isfinite(values[i])) continue;
    const char* value = std::isnan(values[i]) ? "nan" : values[i] > 0 ? "inf" : "-inf";
    throw std::invalid_argument(std::string(name) + " must be finite, got " + value + " at [" +
                                prefix + std::to_string(i) + "]");
  }
}

}  // namespace

NormedLinear::NormedLinear(const float* weight, const float* bias, const float* gamma,
                           const float* beta, std::ptrdiff_t out_features,
                           std::ptrdiff_t in_features, Isa isa)
    : out_(out_features),
      in_(in_features),
      isa_(isa_from_name(isa_name(isa), "isa")),
      kernels_(&detail::kernel_table(isa, Precision::float32)) {
  if (out_ < 1 || in_ < 1) {
    throw std::invalid_argument("weight must have at least one row and one column, got [" +
                                std::to_string(out_) + ", " + std::to_string(in_) + "]");
  }
  for (std::ptrdiff_t o = 0; o < out_; ++o) {
    check_finite("weight", weight + o * in_, in_, std::to_string(o) + ", ");
  }
  check_finite("bias", bias, out_);
  check_finite("gamma", gamma, out_);
  check_finite("beta", beta, out_);

  auto layer = std::make_unique<detail::PackedLayer>();
  detail::LayerPacker().pack(*kernels_, {weight, bias, gamma, beta, out_, in_}, nullptr, *layer);
  layer_ = std::move(layer);
}

NormedLinear::~NormedLinear() = default;
NormedLinear::NormedLinear(NormedLinear&&) noexcept = default;
NormedLinear& NormedLinear::operator=(NormedLinear&&) noexcept = default;

void NormedLinear::forward(const float* x, std::ptrdiff_t rows, float* y) const noexcept {
  const std::ptrdiff_t row_bytes = (in_ + out_) * static_cast<std::ptrdiff_t>(sizeof(float));
  const std::ptrdiff_t tile = kernels_->tile_rows;
  const std::ptrdiff_t block = std::max<std::ptrdiff_t>(1, kBlockBytes / (row_bytes * tile)) * tile;
  for (std::ptrdiff_t first = 0; first < rows; first += block) {
    const std::ptrdiff_t count = std::min(block, rows - first);
    float* destination = y + first * out_;
    kernels_->linear(x + first * in_, in_, count, layer_->panels.data(), layer_->bias.data(), 0,
                     in_, out_, destination, out_);
    kernels_->norm_mish(destination, out_, count, layer_->gamma.data(), layer_->beta.data(), out_,
                        out_, destination, out_);
  }
}

}  // namespace iqmpc
