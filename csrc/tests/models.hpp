// World models of any size for the C++ tests, with activations around 1 in every layer.
#pragma once

#include <cmath>
#include <cstddef>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "iqmpc/world_model.hpp"

struct Sizes {
  std::ptrdiff_t obs = 5, action = 3, latent = 24, hidden = 37, encoder = 9, critics = 3;
  std::ptrdiff_t simnorm = 8;
  bool termination = false;
};

class RandomModel {
 public:
  explicit RandomModel(const Sizes& s, unsigned seed = 0) : random_(seed) {
    const std::ptrdiff_t joint = s.latent + s.action;
    view.encoder = {layer(s.obs, s.encoder, true), layer(s.encoder, s.latent, true)};
    view.dynamics = {layer(joint, s.hidden, true), layer(s.hidden, s.hidden, true),
                     layer(s.hidden, s.latent, true)};
    view.policy = {layer(s.latent, s.hidden, true), layer(s.hidden, s.hidden, true),
                   layer(s.hidden, 2 * s.action, false)};
    for (std::ptrdiff_t k = 0; k < s.critics; ++k) {
      view.critics.push_back({layer(joint, s.hidden, true), layer(s.hidden, s.hidden, true),
                              layer(s.hidden, 1, false)});
    }
    if (s.termination) {
      view.termination = {layer(s.latent, s.hidden, true), layer(s.hidden, s.hidden, true),
                          layer(s.hidden, 1, false)};
    }
    view.simnorm_dim = s.simnorm;
  }

  std::shared_ptr<const iqmpc::WorldModel> pack(
      iqmpc::Precision precision = iqmpc::Precision::float32,
      iqmpc::Isa isa = iqmpc::active_isa()) const {
    return std::make_shared<const iqmpc::WorldModel>(view, precision, isa);
  }

  // Every parameter at once, for tests that spoil a model.
  void fill(float value) {
    for (std::vector<float>& values : storage_) {
      for (float& x : values) x = value;
    }
  }

  // The termination head's last bias: far above 0, every latent is terminal, far below, none.
  void end_by(float bias) {
    storage_.emplace_back(1, bias);
    view.termination.back().bias = storage_.back().data();
  }

  iqmpc::WorldModelView view;

 private:
  const float* normal(std::ptrdiff_t size, float mean, float deviation) {
    std::normal_distribution<float> draw(mean, deviation);
    storage_.emplace_back(static_cast<std::size_t>(size));
    for (float& value : storage_.back()) value = draw(random_);
    return storage_.back().data();
  }

  iqmpc::LinearView layer(std::ptrdiff_t in, std::ptrdiff_t out, bool normed) {
    iqmpc::LinearView view;
    view.weight = normal(out * in, 0, 1.0f / std::sqrt(static_cast<float>(in)));
    view.bias = normal(out, 0, 0.3f);
    if (normed) {
      view.gamma = normal(out, 1, 0.3f);
      view.beta = normal(out, 0, 0.3f);
    }
    view.out = out;
    view.in = in;
    return view;
  }

  std::mt19937 random_;
  std::deque<std::vector<float>> storage_;
};

inline std::vector<float> normal_floats(std::ptrdiff_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = draw(random);
  return values;
}
