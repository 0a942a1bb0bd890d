#include "iqmpc/world_model.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/packed_model.hpp"

namespace iqmpc {

namespace detail {

namespace {

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
    const std::string name = part + " layer " + std::to_string(i);
    if (layer.out < 1 || layer.in < 1) {
      refuse(name, "weight must have at least one row and one column, got [" +
                       std::to_string(layer.out) + ", " + std::to_string(layer.in) + "]");
    }
    if (in != 0 && layer.in != in) {
      refuse(name, "expected " + std::to_string(in) + " inputs, got " + std::to_string(layer.in));
    }
    const bool normed = i + 1 < layers.size() || norm_last;
    if (layer.weight == nullptr || layer.bias == nullptr ||
        (layer.gamma != nullptr) != normed || (layer.beta != nullptr) != normed) {
      refuse(name, normed ? "needs weight, bias, gamma and beta"
                          : "needs weight and bias, and has no LayerNorm");
    }
    in = layer.out;
  }
  if (out != 0 && in != out) {
    refuse(part, "expected " + std::to_string(out) + " outputs, got " + std::to_string(in));
  }
}

PackedModel pack(const WorldModelView& view, Precision precision, Isa isa) {
  check_stack("encoder", view.encoder, 0, 0, 1, true);
  const Index z = view.encoder.back().out;
  check_stack("policy", view.policy, z, 0, 2, false);
  const Index heads = view.policy.back().out;
  if (heads % 2) refuse("policy", "expected an even number of outputs, got " + std::to_string(heads));
  const Index a = heads / 2;
  check_stack("dynamics", view.dynamics, z + a, z, 2, true);
  if (view.critics.size() < 2) {
    refuse("critics", "expected at least 2, got " + std::to_string(view.critics.size()));
  }
  for (std::size_t k = 0; k < view.critics.size(); ++k) {
    check_stack("critic " + std::to_string(k), view.critics[k], z + a, 1, 2, false);
  }
  if (view.simnorm_dim < 1 || z % view.simnorm_dim) {
    refuse("simnorm_dim", "must divide the latent size " + std::to_string(z) + ", got " +
                              std::to_string(view.simnorm_dim));
  }

  PackedModel model{};
  model.precision = precision;
  model.isa = isa_from_name(isa_name(isa), "isa");
  model.kernels = &kernel_table(isa, precision);
  model.exact = &kernel_table(isa, Precision::float32);
  model.obs_dim = view.encoder.front().in;
  model.action_dim = a;
  model.latent_dim = z;
  model.action_pad = round_up(a, kActionPad);
  const KernelTable& kernels = *model.kernels;
  const Index groups = z / view.simnorm_dim;
  model.simnorm = {view.simnorm_dim, groups, round_up(groups, kernels.width)};
  model.log_std_min = view.log_std_min;
  model.log_std_max = view.log_std_max;

  std::vector<Index> features(static_cast<std::size_t>(z));
  for (Index i = 0; i < z; ++i) features[i] = model.simnorm.feature(i);
  std::vector<Index> gaussian(static_cast<std::size_t>(heads));
  for (Index i = 0; i < heads; ++i) gaussian[i] = i < a ? i : model.action_pad + i - a;

  const auto add = [&](const KernelTable& table, const LinearView& layer, PackRequest request) {
    if (request.count == 0) request.count = layer.in;
    PackedLayer packed = pack_layer(table, layer, request);
    model.widest = std::max(model.widest, packed.padded);
    return packed;
  };
  const auto logits = [&] {
    PackRequest request;
    request.outputs = features;
    request.columns = model.simnorm.features();
    return request;
  };
  const auto first = [&](const LinearView& layer) {
    PackRequest latent, excess, action;
    latent.count = excess.count = z;
    latent.inputs = excess.inputs = &model.simnorm;
    excess.excess = excess.addend = action.addend = true;
    action.first = z;
    action.count = a;
    FirstLayer packed;
    packed.z = add(kernels, layer, latent);
    packed.excess = add(kernels, layer, excess);
    if (layer.in > z) packed.a = add(kernels, layer, action);
    return packed;
  };

  for (const LinearView& layer : view.encoder) {
    const bool last = &layer == &view.encoder.back();
    model.encoder.push_back(add(*model.exact, layer, last ? logits() : PackRequest{}));
  }
  model.dynamics.first = first(view.dynamics.front());
  for (std::size_t i = 1; i < view.dynamics.size(); ++i) {
    const bool last = i + 1 == view.dynamics.size();
    model.dynamics.rest.push_back(add(kernels, view.dynamics[i], last ? logits() : PackRequest{}));
  }
  model.policy_first = first(view.policy.front());
  for (std::size_t i = 1; i < view.policy.size(); ++i) {
    PackRequest request;
    if (i + 1 == view.policy.size()) {
      request.outputs = gaussian;
      request.columns = 2 * model.action_pad;
    }
    model.policy.push_back(add(kernels, view.policy[i], request));
  }
  for (const std::vector<LinearView>& layers : view.critics) {
    Critic critic;
    critic.first = first(layers.front());
    for (std::size_t i = 1; i + 1 < layers.size(); ++i) {
      critic.rest.push_back(add(kernels, layers[i], {}));
    }
    const LinearView& last = layers.back();
    critic.w = AlignedBuffer<float>(
        static_cast<std::size_t>(round_up(last.in, kernels.panel)));
    std::copy_n(last.weight, last.in, critic.w.data());
    critic.bias = last.bias[0];
    model.critics.push_back(std::move(critic));
  }
  return model;
}

}  // namespace

}  // namespace detail

WorldModel::WorldModel(const WorldModelView& view, Precision precision, Isa isa)
    : packed_(std::make_unique<const detail::PackedModel>(detail::pack(view, precision, isa))) {}
WorldModel::~WorldModel() = default;
WorldModel::WorldModel(WorldModel&&) noexcept = default;
WorldModel& WorldModel::operator=(WorldModel&&) noexcept = default;

std::ptrdiff_t WorldModel::obs_dim() const noexcept { return packed_->obs_dim; }
std::ptrdiff_t WorldModel::action_dim() const noexcept { return packed_->action_dim; }
std::ptrdiff_t WorldModel::latent_dim() const noexcept { return packed_->latent_dim; }
std::ptrdiff_t WorldModel::num_critics() const noexcept {
  return static_cast<std::ptrdiff_t>(packed_->critics.size());
}
Precision WorldModel::precision() const noexcept { return packed_->precision; }
Isa WorldModel::isa() const noexcept { return packed_->isa; }

}  // namespace iqmpc
