#include "cuda/arguments.hpp"

#include <limits>
#include <stdexcept>
#include <string>

namespace iqmpc::gpu {

namespace {

void check_size(const char* name, std::ptrdiff_t size, std::ptrdiff_t least) {
  if (size >= least) return;
  throw std::invalid_argument(std::string("the ") + name + " must be at least " +
                              std::to_string(least) + ", got " + std::to_string(size));
}

void check_pointer(const char* name, const void* pointer) {
  if (pointer != nullptr) return;
  throw std::invalid_argument(std::string(name) + " must not be null");
}

}  // namespace

std::size_t work_floats(const ModelData& model, std::ptrdiff_t problems) {
  return static_cast<std::size_t>(problems) * (3 * static_cast<std::size_t>(model.widest) + 1);
}

RolloutArgs rollout_args(const ModelData& model, const CudaRolloutView& view) {
  check_size("horizon", view.horizon, 1);
  check_size("number of problems", view.problems, 0);
  check_size("number of samples", view.samples, 0);
  const bool unrolled = view.score == Score::unrolled;
  RolloutArgs args{};
  args.noise_steps = unrolled ? view.horizon + 1 : view.horizon - 1;
  args.noise_first = unrolled ? 1 : 0;
  if (view.problems > 0 && view.samples > 0) {
    // A tile has at least 8 rows and a launch at most 2^31 - 1 of them.
    constexpr std::ptrdiff_t kMost = std::ptrdiff_t{8} * std::numeric_limits<std::int32_t>::max();
    if (view.samples > kMost || view.problems > kMost / 8 / ((view.samples + 7) / 8)) {
      throw std::invalid_argument("too many rows for one launch: " + std::to_string(view.problems) +
                                  " problems of " + std::to_string(view.samples) + " samples");
    }
    check_pointer("z0", view.z0);
    check_pointer("actions", view.actions);
    if (args.noise_steps > 0) check_pointer("score_noise", view.score_noise);
    check_pointer("critic_pair", view.critic_pair);
    check_pointer("returns", view.returns);
    check_pointer("work", view.work);
  }
  args.problems = view.problems;
  args.horizon = view.horizon;
  args.samples = view.samples;
  args.z0 = view.z0;
  args.actions = view.actions;
  args.noise = view.score_noise;
  args.pair = view.critic_pair;
  args.discount = view.discount;
  args.unrolled = unrolled;
  args.entropy_coef = view.entropy_coef;
  args.root = static_cast<float*>(view.work);
  args.constant = args.root + work_floats(model, view.problems) - view.problems;
  args.returns = view.returns;
  return args;
}

}  // namespace iqmpc::gpu
