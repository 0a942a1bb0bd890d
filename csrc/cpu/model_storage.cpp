#include "iqmpc/model_storage.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/setting_checks.hpp"
#include "cpu/learner_views.hpp"
#include "cpu/threefry.hpp"

namespace iqmpc {

namespace {

using Index = std::ptrdiff_t;
using Layers = std::vector<LayerParameters>;

void check(const ModelSizes& s) {
  const auto at_least = [](const char* name, Index value, Index least) {
    detail::require(value >= least, name, "at least " + std::to_string(least),
                    static_cast<double>(value));
  };
  at_least("obs", s.obs, 1);
  at_least("action", s.action, 1);
  at_least("latent", s.latent, 1);
  at_least("hidden", s.hidden, 1);
  at_least("encoder", s.encoder, 1);
  at_least("critics", s.critics, 2);
  at_least("simnorm_dim", s.simnorm_dim, 1);
  detail::require(s.latent % s.simnorm_dim == 0, "latent",
                  "a multiple of simnorm_dim = " + std::to_string(s.simnorm_dim),
                  static_cast<double>(s.latent));
}

// Lays tensors out one behind the other, each on a cache line of its own; without a `base` only to
// learn how much they take.
struct Shelf {
  float* base;
  Index used = 0;

  float* take(Index size) {
    float* place = base != nullptr ? base + used : nullptr;
    used += (size + 15) / 16 * 16;
    return place;
  }
};

enum class Kind { model, target };  // targets: values alone

Layers lay_out(Shelf& shelf, const ModelSizes& s, Kind kind, bool last_normed,
               std::initializer_list<Index> widths) {
  const auto parameter = [&](Index size) {
    Parameter p;
    p.value = shelf.take(size);
    if (kind == Kind::target) return p;
    p.first = shelf.take(size);
    p.second = shelf.take(size);
    if (s.average) p.average = shelf.take(size);
    return p;
  };
  Layers layers;
  for (const Index* width = widths.begin(); width + 1 != widths.end(); ++width) {
    LayerParameters layer;
    layer.in = width[0];
    layer.out = width[1];
    layer.weight = parameter(layer.out * layer.in);
    layer.bias = parameter(layer.out);
    if (width + 2 != widths.end() || last_normed) {
      layer.gamma = parameter(layer.out);
      layer.beta = parameter(layer.out);
    }
    layers.push_back(layer);
  }
  return layers;
}

LearnerView lay_out(Shelf& shelf, const ModelSizes& s) {
  const Index joint = s.latent + s.action;
  LearnerView view;
  view.simnorm_dim = s.simnorm_dim;
  view.encoder = lay_out(shelf, s, Kind::model, true, {s.obs, s.encoder, s.latent});
  view.dynamics = lay_out(shelf, s, Kind::model, true, {joint, s.hidden, s.hidden, s.latent});
  view.policy = lay_out(shelf, s, Kind::model, false, {s.latent, s.hidden, s.hidden, 2 * s.action});
  for (const Kind kind : {Kind::model, Kind::target}) {
    auto& critics = kind == Kind::model ? view.critics : view.targets;
    for (Index k = 0; k < s.critics; ++k) {
      critics.push_back(lay_out(shelf, s, kind, false, {joint, s.hidden, s.hidden, 1}));
    }
  }
  if (s.termination) {
    view.termination = lay_out(shelf, s, Kind::model, false, {s.latent, s.hidden, s.hidden, 1});
  }
  return view;
}

// Normal numbers that are the same on every platform, up to its logarithm and sines.
class Normal {
 public:
  explicit Normal(std::uint64_t seed)
      : key_{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32), 0, 0} {}

  // Never beyond 7 in size, so that a truncation at 2 (100 deviations of the weights) would find
  // nothing to do.
  double operator()() {
    if (left_ == 0) {
      std::uint32_t x[4] = {static_cast<std::uint32_t>(counter_),
                            static_cast<std::uint32_t>(counter_ >> 32), kStream, 0};
      ++counter_;
      detail::threefry(key_, x);
      for (int i = 0; i < 4; i += 2) {
        const double radius = std::sqrt(-2 * std::log((x[i] + 0.5) * 0x1p-32));
        const double angle = 6.283185307179586 * (x[i + 1] * 0x1p-32);
        normal_[i] = radius * std::cos(angle);
        normal_[i + 1] = radius * std::sin(angle);
      }
      left_ = 4;
    }
    return normal_[--left_];
  }

 private:
  // One that neither a learner nor a planner of the same seed draws from.
  static constexpr std::uint32_t kStream = 0xff000000;
  std::uint32_t key_[4];
  std::uint64_t counter_ = 0;
  double normal_[4];
  int left_ = 0;
};

// Values alone; memory is zero to begin with.
void initialise(const Layers& layers, bool zero_last, Normal& normal) {
  for (const LayerParameters& layer : layers) {
    if (!zero_last || &layer != &layers.back()) {
      for (Index i = 0; i < layer.out * layer.in; ++i) {
        layer.weight.value[i] = static_cast<float>(0.02 * normal());
      }
    }
    if (layer.gamma.value != nullptr) std::fill_n(layer.gamma.value, layer.out, 1.0f);
  }
}

struct Tensor {
  const Parameter* parameter;
  Index size;
};

// A layer's parameters, in the order of LearnerView.
std::vector<Tensor> tensors(const LayerParameters& layer) {
  std::vector<Tensor> result = {{&layer.weight, layer.out * layer.in}, {&layer.bias, layer.out}};
  if (layer.gamma.value != nullptr) {
    result.push_back({&layer.gamma, layer.out});
    result.push_back({&layer.beta, layer.out});
  }
  return result;
}

void copy(const Layers& from, const Layers& to) {
  for (std::size_t i = 0; i < from.size(); ++i) {
    const std::vector<Tensor> source = tensors(from[i]), target = tensors(to[i]);
    for (std::size_t k = 0; k < source.size(); ++k) {
      std::copy_n(source[k].parameter->value, source[k].size, target[k].parameter->value);
    }
  }
}

}  // namespace

ModelStorage::ModelStorage(const ModelSizes& sizes, std::uint64_t seed) : sizes_(sizes) {
  check(sizes);
  Shelf shelf{nullptr};
  lay_out(shelf, sizes);
  memory_ = AlignedBuffer<float>(static_cast<std::size_t>(shelf.used));
  shelf = {memory_.data()};
  learner_ = lay_out(shelf, sizes);
  weights_ = detail::world_model_view(learner_, &Parameter::value);
  if (sizes.average) average_ = detail::world_model_view(learner_, &Parameter::average);

  Normal normal(seed);
  initialise(learner_.encoder, false, normal);
  initialise(learner_.dynamics, false, normal);
  initialise(learner_.policy, false, normal);
  for (std::size_t k = 0; k < learner_.critics.size(); ++k) {
    initialise(learner_.critics[k], true, normal);
    copy(learner_.critics[k], learner_.targets[k]);
  }
  initialise(learner_.termination, true, normal);

  std::vector<const Layers*> parts = {&learner_.encoder, &learner_.dynamics, &learner_.policy,
                                      &learner_.termination};
  for (const Layers& critic : learner_.critics) parts.push_back(&critic);
  for (const Layers* part : parts) {
    for (const LayerParameters& layer : *part) {
      for (const Tensor& t : tensors(layer)) {
        parameters_ += t.size;
        if (sizes.average) std::copy_n(t.parameter->value, t.size, t.parameter->average);
      }
    }
  }
}

const WorldModelView& ModelStorage::average() const {
  if (!sizes_.average) {
    throw std::logic_error("this storage keeps no average of the weights: ModelSizes::average");
  }
  return average_;
}

UpdateMetrics ModelStorage::learn(Learner& learner, const ReplayView* experts,
                                  const ReplayView& behaviour, std::ptrdiff_t batch) {
  const UpdateMetrics metrics = learner.learn(experts, behaviour, batch, counts.updates,
                                              counts.model_steps, counts.policy_steps);
  ++counts.updates;
  counts.model_steps += !metrics.model_skipped;
  counts.policy_steps += !metrics.policy_skipped;
  return metrics;
}

}  // namespace iqmpc
