// What a learner updates, as what plans are made from.
#pragma once

#include <vector>

#include "iqmpc/learner.hpp"
#include "iqmpc/world_model.hpp"

namespace iqmpc::detail {

// `which`: the values, or the averages.
inline std::vector<LinearView> linear_views(const std::vector<LayerParameters>& layers,
                                            float* Parameter::* which) {
  std::vector<LinearView> views;
  for (const LayerParameters& p : layers) {
    views.push_back({p.weight.*which, p.bias.*which, p.gamma.*which, p.beta.*which, p.out, p.in});
  }
  return views;
}

inline WorldModelView world_model_view(const LearnerView& from, float* Parameter::* which) {
  WorldModelView view;
  view.encoder = linear_views(from.encoder, which);
  view.dynamics = linear_views(from.dynamics, which);
  view.policy = linear_views(from.policy, which);
  for (const auto& critic : from.critics) view.critics.push_back(linear_views(critic, which));
  view.termination = linear_views(from.termination, which);
  view.simnorm_dim = from.simnorm_dim;
  view.log_std_min = from.log_std_min;
  view.log_std_max = from.log_std_max;
  return view;
}

}  // namespace iqmpc::detail
