#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check.hpp"
#include "iqmpc/model_storage.hpp"

namespace {

using iqmpc::LayerParameters;
using iqmpc::LinearView;
using iqmpc::ModelSizes;
using iqmpc::ModelStorage;

ModelSizes small_sizes() {
  ModelSizes s;
  s.obs = 5;
  s.action = 3;
  s.latent = 12;
  s.simnorm_dim = 4;
  s.hidden = 17;
  s.encoder = 9;
  s.critics = 3;
  s.termination = true;
  return s;
}

bool all(const float* values, std::ptrdiff_t count, float value) {
  return std::all_of(values, values + count, [=](float x) { return x == value; });
}

void as_many_parameters_as_the_paper_has() {
  ModelSizes s;
  s.obs = 91;
  s.action = 39;
  s.latent = s.hidden = 512;
  s.critics = 5;
  s.average = false;
  CHECK(ModelStorage(s, 0).parameters() == 4274259);
}

void check_layers(const std::vector<LayerParameters>& layers, bool zero_last, bool target = false) {
  for (const LayerParameters& layer : layers) {
    const bool last = &layer == &layers.back();
    double square = 0;
    for (std::ptrdiff_t i = 0; i < layer.out * layer.in; ++i) {
      square += layer.weight.value[i] * layer.weight.value[i];
    }
    const double deviation = std::sqrt(square / static_cast<double>(layer.out * layer.in));
    CHECK(last && zero_last ? deviation == 0 : std::abs(deviation - 0.02) < 0.006);
    CHECK(all(layer.bias.value, layer.out, 0));
    if (layer.gamma.value != nullptr) {
      CHECK(all(layer.gamma.value, layer.out, 1) && all(layer.beta.value, layer.out, 0));
    }
    CHECK((layer.weight.first == nullptr) == target);
    if (!target) {
      CHECK(all(layer.weight.first, layer.out * layer.in, 0));
      CHECK(all(layer.weight.second, layer.out * layer.in, 0));
    }
  }
}

bool same(const LinearView& a, const LinearView& b) {
  const auto equal = [](const float* x, const float* y, std::ptrdiff_t count) {
    return x == nullptr ? y == nullptr : std::equal(x, x + count, y);
  };
  return equal(a.weight, b.weight, a.out * a.in) && equal(a.bias, b.bias, a.out) &&
         equal(a.gamma, b.gamma, a.out) && equal(a.beta, b.beta, a.out);
}

void a_new_model_is_initialised() {
  const ModelStorage model(small_sizes(), 1);
  const iqmpc::LearnerView& view = model.learner_view();
  check_layers(view.encoder, false);
  check_layers(view.dynamics, false);
  check_layers(view.policy, false);
  check_layers(view.termination, true);
  for (std::size_t k = 0; k < 3; ++k) {
    check_layers(view.critics[k], true);
    check_layers(view.targets[k], true, true);
    for (std::size_t l = 0; l < 3; ++l) {
      const LayerParameters &critic = view.critics[k][l], &target = view.targets[k][l];
      CHECK(critic.weight.value != target.weight.value);
      CHECK(std::equal(critic.weight.value, critic.weight.value + critic.out * critic.in,
                       target.weight.value));
    }
  }
  CHECK(view.critics[0][0].weight.value[0] != view.critics[1][0].weight.value[0]);
  const iqmpc::WorldModelView &weights = model.weights(), &average = model.average();
  CHECK(weights.simnorm_dim == 4 && weights.termination.size() == 3);
  CHECK(weights.encoder[0].weight == view.encoder[0].weight.value);
  CHECK(average.encoder[0].weight == view.encoder[0].weight.average);
  for (std::size_t l = 0; l < 3; ++l) {
    CHECK(same(weights.dynamics[l], average.dynamics[l]));
    CHECK(same(weights.critics[2][l], average.critics[2][l]));
  }
}

void the_seed_decides() {
  const ModelStorage a(small_sizes(), 1), b(small_sizes(), 1), c(small_sizes(), 2);
  const auto values = [](const ModelStorage& model) {
    return std::vector<float>(model.data(), model.data() + model.size());
  };
  CHECK(values(a) == values(b) && values(a) != values(c));
}

void views_follow_a_move() {
  ModelStorage model(small_sizes(), 1);
  const float* weight = model.weights().encoder[0].weight;
  const ModelStorage moved = std::move(model);
  CHECK(moved.weights().encoder[0].weight == weight);
  CHECK(weight >= moved.data() && weight < moved.data() + moved.size());
}

void sizes_that_cannot_be_are_refused() {
  const auto refused = [](auto change) {
    ModelSizes s = small_sizes();
    change(s);
    return message_of<std::invalid_argument>([&] { ModelStorage(s, 0); });
  };
  CHECK(refused([](ModelSizes& s) { s.obs = 0; }) == "obs must be at least 1, got 0");
  CHECK(refused([](ModelSizes& s) { s.hidden = -3; }) == "hidden must be at least 1, got -3");
  CHECK(refused([](ModelSizes& s) { s.critics = 1; }) == "critics must be at least 2, got 1");
  CHECK(refused([](ModelSizes& s) { s.latent = 14; }) ==
        "latent must be a multiple of simnorm_dim = 4, got 14");
  ModelSizes s = small_sizes();
  s.average = false;
  const ModelStorage without(s, 0);
  CHECK(without.learner_view().encoder[0].weight.average == nullptr);
  CHECK(message_of<std::logic_error>([&] { without.average(); }) ==
        "this storage keeps no average of the weights: ModelSizes::average");
}

}  // namespace

int main() {
  as_many_parameters_as_the_paper_has();
  a_new_model_is_initialised();
  the_seed_decides();
  views_follow_a_move();
  sizes_that_cannot_be_are_refused();
  return 0;
}
