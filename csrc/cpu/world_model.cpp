#include "iqmpc/world_model.hpp"

#include <algorithm>

#include "cpu/packed_model.hpp"
#include "cpu/view_checks.hpp"

namespace iqmpc {

namespace detail {

namespace {

PackedModel pack(const WorldModelView& view, Precision precision, Isa isa) {
  check_view(view);
  const Index z = view.dynamics.back().out, heads = view.policy.back().out, a = heads / 2;

  PackedModel model{};
  model.precision = precision;
  model.isa = isa_from_name(isa_name(isa), "isa");
  model.kernels = &kernel_table(isa, precision);
  model.exact = &kernel_table(isa, Precision::float32);
  model.obs_dim = view.encoder.empty() ? z : view.encoder.front().in;
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
  const auto scalar = [&](const std::vector<LinearView>& layers) {
    Scalar packed;
    packed.first = first(layers.front());
    for (std::size_t i = 1; i + 1 < layers.size(); ++i) {
      packed.rest.push_back(add(kernels, layers[i], {}));
    }
    const LinearView& last = layers.back();
    packed.w = AlignedBuffer<float>(
        static_cast<std::size_t>(round_up(last.in, kernels.panel)));
    std::copy_n(last.weight, last.in, packed.w.data());
    packed.bias = last.bias[0];
    return packed;
  };
  for (const std::vector<LinearView>& layers : view.critics) {
    model.critics.push_back(scalar(layers));
  }
  if (!view.termination.empty()) model.termination = scalar(view.termination);
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
bool WorldModel::has_termination() const noexcept { return packed_->termination.has_value(); }
Precision WorldModel::precision() const noexcept { return packed_->precision; }
Isa WorldModel::isa() const noexcept { return packed_->isa; }

}  // namespace iqmpc
