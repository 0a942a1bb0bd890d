#include "iqmpc/world_model.hpp"

#include <algorithm>

#include "common/view_checks.hpp"
#include "cpu/packed_model.hpp"

namespace iqmpc {

namespace detail {

void ModelPacker::pack(const WorldModelView& view, Precision precision, Isa isa,
                       PackedModel& model) {
  check_view(view);
  const Index z = view.dynamics.back().out, heads = view.policy.back().out, a = heads / 2;

  model.precision = precision;
  model.isa = isa;
  model.kernels = &kernel_table(isa, precision);
  model.exact = &kernel_table(isa, Precision::float32);
  model.obs_dim = view.encoder.empty() ? z : view.encoder.front().in;
  model.action_dim = a;
  model.latent_dim = z;
  model.action_pad = round_up(a, kActionPad);
  const KernelTable& kernels = *model.kernels;
  const Index groups = z / view.simnorm_dim;
  const SimNormLayout simnorm{view.simnorm_dim, groups, round_up(groups, kernels.width)};
  model.simnorm = simnorm;
  model.log_std_min = view.log_std_min;
  model.log_std_max = view.log_std_max;
  model.widest = 0;

  const auto widest = [&](const PackedLayer& layer) {
    model.widest = std::max(model.widest, layer.padded);
  };
  const auto add = [&](const KernelTable& table, const LinearView& layer,
                       const PackOutputs* outputs, PackedLayer& packed) {
    layers_.pack(table, layer, outputs, packed);
    widest(packed);
  };

  features_.columns = simnorm.features();
  features_.column.resize(static_cast<std::size_t>(z));
  latent_.clear(round_up(simnorm.inputs(), kernels.step));
  excess_.clear(simnorm.groups);  // whole vectors, and so whole steps
  for (Index i = 0; i < z; ++i) {
    features_.column[i] = simnorm.feature(i);
    const Index group = i / simnorm.dim, last = (group + 1) * simnorm.dim - 1;
    if (i == last) {
      excess_.plus[group] = last;
    } else {
      latent_.plus[simnorm.feature(i)] = i;
      latent_.minus[simnorm.feature(i)] = last;
    }
  }
  gaussian_.columns = 2 * model.action_pad;
  gaussian_.column.resize(static_cast<std::size_t>(heads));
  for (Index i = 0; i < heads; ++i) gaussian_.column[i] = i < a ? i : model.action_pad + i - a;
  action_.clear(round_up(a, kernels.step));
  for (Index i = 0; i < a; ++i) action_.plus[i] = z + i;

  const auto first = [&](const LinearView& layer, FirstLayer& packed) {
    if (layer.in > z) {
      layers_.pack(kernels, layer, nullptr,
                   {{latent_, packed.z}, {excess_, packed.excess}, {action_, packed.a}}, &excess_);
    } else {
      layers_.pack(kernels, layer, nullptr, {{latent_, packed.z}, {excess_, packed.excess}},
                   &excess_);
    }
    widest(packed.z);
  };
  // The layers behind a first one; the last of them has `outputs`.
  const auto rest = [&](const std::vector<LinearView>& layers, std::size_t count,
                        const PackOutputs* outputs, std::vector<PackedLayer>& packed) {
    packed.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
      add(kernels, layers[1 + i], i + 1 == count ? outputs : nullptr, packed[i]);
    }
  };
  const auto scalar = [&](const std::vector<LinearView>& layers, Scalar& packed) {
    first(layers.front(), packed.first);
    rest(layers, layers.size() - 2, nullptr, packed.rest);
    const LinearView& last = layers.back();
    packed.w.fit(static_cast<std::size_t>(round_up(last.in, kernels.panel)));
    std::copy_n(last.weight, last.in, packed.w.data());
    std::fill(packed.w.data() + last.in, packed.w.data() + packed.w.size(), 0.0f);
    packed.bias = last.bias[0];
  };

  model.encoder.resize(view.encoder.size());
  for (std::size_t i = 0; i < view.encoder.size(); ++i) {
    const bool last = i + 1 == view.encoder.size();
    add(*model.exact, view.encoder[i], last ? &features_ : nullptr, model.encoder[i]);
  }
  first(view.dynamics.front(), model.dynamics.first);
  rest(view.dynamics, view.dynamics.size() - 1, &features_, model.dynamics.rest);
  first(view.policy.front(), model.policy_first);
  rest(view.policy, view.policy.size() - 1, &gaussian_, model.policy);
  model.critics.resize(view.critics.size());
  for (std::size_t k = 0; k < view.critics.size(); ++k) scalar(view.critics[k], model.critics[k]);
  if (view.termination.empty()) {
    model.termination.reset();
  } else {
    if (!model.termination) model.termination.emplace();
    scalar(view.termination, *model.termination);
  }
}

}  // namespace detail

namespace {

std::unique_ptr<const detail::PackedModel> pack(const WorldModelView& view, Precision precision,
                                                Isa isa) {
  isa_from_name(isa_name(isa), "isa");  // throws where the machine does not run it
  auto model = std::make_unique<detail::PackedModel>();
  detail::ModelPacker().pack(view, precision, isa, *model);
  return model;
}

}  // namespace

WorldModel::WorldModel(const WorldModelView& view, Precision precision, Isa isa)
    : packed_(pack(view, precision, isa)) {}
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
