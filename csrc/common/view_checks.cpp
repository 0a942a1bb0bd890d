#include "common/view_checks.hpp"

#include <cstddef>
#include <stdexcept>
#include <string>

namespace iqmpc::detail {

namespace {

using Index = std::ptrdiff_t;

[[noreturn]] void refuse(const std::string& part, const std::string& what) {
  throw std::invalid_argument(part + ": " + what);
}

// The layers fit one another, start from `in` features and end in `out` (0: any number).
void check_stack(const std::string& part, const std::vector<LinearView>& layers, Index in,
                 Index out, std::size_t least, bool norm_last) {
  if (layers.size() < least) {
    refuse(part, "expected at least " + std::to_string(least) + " layers, got " +
                     std::to_string(layers.size()));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LinearView& layer = layers[i];
    // Made where it is needed: a published model is checked each time, and nothing is allocated.
    const auto name = [&] { return part + " layer " + std::to_string(i); };
    if (layer.out < 1 || layer.in < 1) {
      refuse(name(), "weight must have at least one row and one column, got [" +
                         std::to_string(layer.out) + ", " + std::to_string(layer.in) + "]");
    }
    if (in != 0 && layer.in != in) {
      refuse(name(), "expected " + std::to_string(in) + " inputs, got " + std::to_string(layer.in));
    }
    const bool normed = i + 1 < layers.size() || norm_last;
    if (layer.weight == nullptr || layer.bias == nullptr || (layer.gamma != nullptr) != normed ||
        (layer.beta != nullptr) != normed) {
      refuse(name(), normed ? "needs weight, bias, gamma and beta"
                            : "needs weight and bias, and has no LayerNorm");
    }
    in = layer.out;
  }
  if (out != 0 && in != out) {
    refuse(part, "expected " + std::to_string(out) + " outputs, got " + std::to_string(in));
  }
}

}  // namespace

void check_view(const WorldModelView& view) {
  check_stack("encoder", view.encoder, 0, 0, 0, true);
  if (view.encoder.empty()) check_stack("dynamics", view.dynamics, 0, 0, 2, true);
  const Index z = (view.encoder.empty() ? view.dynamics : view.encoder).back().out;
  check_stack("policy", view.policy, z, 0, 2, false);
  const Index heads = view.policy.back().out;
  if (heads % 2)
    refuse("policy", "expected an even number of outputs, got " + std::to_string(heads));
  const Index a = heads / 2;
  check_stack("dynamics", view.dynamics, z + a, z, 2, true);
  if (view.critics.size() < 2) {
    refuse("critics", "expected at least 2, got " + std::to_string(view.critics.size()));
  }
  for (std::size_t k = 0; k < view.critics.size(); ++k) {
    check_stack("critic " + std::to_string(k), view.critics[k], z + a, 1, 2, false);
  }
  if (!view.termination.empty()) check_stack("termination", view.termination, z, 1, 2, false);
  if (view.simnorm_dim < 1 || z % view.simnorm_dim) {
    refuse("simnorm_dim", "must divide the latent size " + std::to_string(z) + ", got " +
                              std::to_string(view.simnorm_dim));
  }
}

}  // namespace iqmpc::detail
