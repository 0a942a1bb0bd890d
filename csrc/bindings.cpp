// The Python face of the C++ library: checks arrays, releases the GIL, calls. No logic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#ifdef IQMPC_HAS_CUDA
#include "iqmpc/cuda_rollout.hpp"
#endif
#include "iqmpc/isa.hpp"
#include "iqmpc/learner.hpp"
#include "iqmpc/planner.hpp"
#include "iqmpc/rollout.hpp"
#include "iqmpc/thread_pool.hpp"
#include "iqmpc/world_model.hpp"

namespace py = pybind11;

namespace {

// One side of an expected shape: a size, or a name where any size will do.
struct Side {
  // Implicit, so that a braced list reads as a shape: {"N", 134}.
  Side(const char* label) : name(label) {}
  Side(py::ssize_t length) : name(std::to_string(length)), size(length) {}

  std::string name;
  py::ssize_t size = -1;
};

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ", ") + part;
  return "[" + text + "]";
}

// `object` as a C-contiguous float32 array of the expected shape, or an error that says what it is.
py::array checked(const py::object& object, const char* name, const std::vector<Side>& shape) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(std::string(name) + " must be a NumPy array, got " +
                         std::string(py::str(py::type::of(object).attr("__name__"))));
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  bool fits = py::isinstance<py::array_t<float>>(array) &&
              array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (std::size_t d = 0; fits && d < shape.size(); ++d) {
    const auto size = array.shape(static_cast<py::ssize_t>(d));
    fits = shape[d].size < 0 || shape[d].size == size;
  }
  if (!fits) {
    std::vector<std::string> expected, got;
    for (const Side& side : shape) expected.push_back(side.name);
    for (py::ssize_t d = 0; d < array.ndim(); ++d) got.push_back(std::to_string(array.shape(d)));
    throw py::value_error(std::string(name) + " must be float32 with shape " + join(expected) +
                          ", got " + std::string(py::str(array.dtype())) + " " + join(got));
  }
  constexpr int kLayout =
      py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & kLayout) != kLayout) {
    std::vector<std::string> strides;
    for (py::ssize_t d = 0; d < array.ndim(); ++d) {
      strides.push_back(std::to_string(array.strides(d)));
    }
    throw py::value_error(std::string(name) + " must be C-contiguous and aligned, got strides of " +
                          join(strides) + " bytes");
  }
  return array;
}

const float* data(const py::array& array) { return static_cast<const float*>(array.data()); }

// `object` as an array of the expected shape to write into.
float* writeable(const py::object& object, const char* name, const std::vector<Side>& shape) {
  py::array array = checked(object, name, shape);
  if (!array.writeable()) throw py::value_error(std::string(name) + " must be writeable");
  return static_cast<float*>(array.mutable_data());
}

using Model = std::shared_ptr<iqmpc::WorldModel>;

// A model's layers where they lie, in arrays that are kept alive.
struct ModelView {
  iqmpc::WorldModelView view;
  std::vector<py::array> arrays;
};

// (weight, bias) or (weight, bias, gamma, beta) as views: of one layer, or of those of `members`
// that the arrays have in front.
std::vector<iqmpc::LinearView> linear_views(const py::handle& layer, const std::string& name,
                                            py::ssize_t members, std::vector<py::array>& arrays) {
  const auto parts = py::cast<py::sequence>(layer);
  if (parts.size() != 2 && parts.size() != 4) {
    throw py::value_error(name + " must be (weight, bias) or (weight, bias, gamma, beta), got " +
                          std::to_string(parts.size()) + " arrays");
  }
  std::vector<Side> shape{"O", "I"};
  if (members >= 0) shape.insert(shape.begin(), Side(members));
  const py::array weight = checked(parts[0], (name + " weight").c_str(), shape);
  arrays.push_back(weight);
  const py::ssize_t out = weight.shape(weight.ndim() - 2), in = weight.shape(weight.ndim() - 1);
  std::vector<iqmpc::LinearView> views(static_cast<std::size_t>(members < 0 ? 1 : members));
  for (std::size_t k = 0; k < views.size(); ++k) {
    views[k].weight = data(weight) + static_cast<py::ssize_t>(k) * out * in;
    views[k].out = out;
    views[k].in = in;
  }
  const float* iqmpc::LinearView::* fields[] = {
      nullptr, &iqmpc::LinearView::bias, &iqmpc::LinearView::gamma, &iqmpc::LinearView::beta};
  const char* names[] = {"", " bias", " gamma", " beta"};
  shape.pop_back();
  shape.back() = Side(out);
  for (std::size_t i = 1; i < parts.size(); ++i) {
    const py::array values = checked(parts[i], (name + names[i]).c_str(), shape);
    arrays.push_back(values);
    for (std::size_t k = 0; k < views.size(); ++k) {
      views[k].*fields[i] = data(values) + static_cast<py::ssize_t>(k) * out;
    }
  }
  return views;
}

std::vector<iqmpc::LinearView> stack_view(const py::sequence& layers, const std::string& name,
                                          std::vector<py::array>& arrays) {
  std::vector<iqmpc::LinearView> views;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    views.push_back(linear_views(layers[i], name + " layer " + std::to_string(i), -1, arrays)[0]);
  }
  return views;
}

// Stacked critics, one by one. How many there are is the first weight's to say.
std::vector<std::vector<iqmpc::LinearView>> critic_views(const py::sequence& layers,
                                                         std::vector<py::array>& arrays) {
  std::vector<std::vector<iqmpc::LinearView>> critics;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::string name = "critics layer " + std::to_string(i);
    if (i == 0) {
      const auto parts = py::cast<py::sequence>(layers[0]);
      if (parts.size() > 0) {
        critics.resize(static_cast<std::size_t>(
            checked(parts[0], (name + " weight").c_str(), {"K", "O", "I"}).shape(0)));
      }
    }
    const auto members = static_cast<py::ssize_t>(critics.size());
    const auto views = linear_views(layers[i], name, members, arrays);
    for (std::size_t k = 0; k < critics.size(); ++k) critics[k].push_back(views[k]);
  }
  return critics;
}

std::unique_ptr<ModelView> model_view(const py::sequence& encoder, const py::sequence& dynamics,
                                      const py::sequence& policy, const py::sequence& critics,
                                      const py::sequence& termination, py::ssize_t simnorm_dim,
                                      float log_std_min, float log_std_max) {
  auto view = std::make_unique<ModelView>();
  iqmpc::WorldModelView& model = view->view;
  model.encoder = stack_view(encoder, "encoder", view->arrays);
  model.dynamics = stack_view(dynamics, "dynamics", view->arrays);
  model.policy = stack_view(policy, "policy", view->arrays);
  model.critics = critic_views(critics, view->arrays);
  model.termination = stack_view(termination, "termination", view->arrays);
  model.simnorm_dim = simnorm_dim;
  model.log_std_min = log_std_min;
  model.log_std_max = log_std_max;
  return view;
}

Model world_model(const ModelView& view, const std::string& precision,
                  const std::optional<std::string>& isa) {
  const iqmpc::Precision operands = iqmpc::precision_from_name(precision);
  const iqmpc::Isa level = isa ? iqmpc::isa_from_name(*isa, "isa") : iqmpc::active_isa();
  py::gil_scoped_release release;
  return std::make_shared<iqmpc::WorldModel>(view.view, operands, level);
}

iqmpc::Score score_from_name(const std::string& name) {
  if (name == "unrolled") return iqmpc::Score::unrolled;
  if (name == "advantage") return iqmpc::Score::advantage;
  throw py::value_error("score must be advantage or unrolled, got " + name);
}

template <class Object>
void check_fork(const Object& object, const std::string& name) {
  if (object.forked_while_busy()) {
    throw std::runtime_error("this process was forked while the " + name +
                             " was at work, which never ends here: make another " + name);
  }
}

void rollout(const Model& model, const py::object& z0, const py::object& actions,
             const py::object& score_noise, std::pair<py::ssize_t, py::ssize_t> critic_pair,
             float discount, const std::string& score, float entropy_coef,
             const py::object& returns, int threads) {
  iqmpc::RolloutView view;
  view.score = score_from_name(score);
  const py::array a = checked(actions, "actions", {"E", "H", "S", model->action_dim()});
  view.problems = a.shape(0);
  view.horizon = a.shape(1);
  view.samples = a.shape(2);
  const py::ssize_t steps =
      view.score == iqmpc::Score::unrolled ? view.horizon + 1 : view.horizon - 1;
  const py::array z = checked(z0, "z0", {view.problems, model->latent_dim()});
  const py::array noise = checked(score_noise, "score_noise",
                                  {view.problems, steps, view.samples, model->action_dim()});
  view.returns = writeable(returns, "returns", {view.problems, view.samples});
  view.z0 = data(z);
  view.actions = data(a);
  view.score_noise = data(noise);
  view.critic_pair[0] = critic_pair.first;
  view.critic_pair[1] = critic_pair.second;
  view.discount = discount;
  view.entropy_coef = entropy_coef;
  py::gil_scoped_release release;
  iqmpc::ThreadPool pool(threads);
  iqmpc::rollout(*model, pool, view);
}

py::tuple plan(iqmpc::Planner& planner, const py::object& obs, bool explore,
               const py::object& action, double spent_us) {
  check_fork(planner, "planner");
  const py::ssize_t envs = planner.settings().problems;
  const py::array input = checked(obs, "obs", {envs, planner.obs_dim()});
  float* output = writeable(action, "action", {envs, planner.action_dim()});
  iqmpc::PlanResult result;
  {
    py::gil_scoped_release release;
    result = planner.plan(data(input), explore, output, spent_us);
  }
  return py::make_tuple(result.iterations, result.samples, result.nonfinite, result.missed,
                        result.late, result.elapsed_us);
}

#ifdef IQMPC_HAS_CUDA

using CudaModel = std::shared_ptr<iqmpc::CudaWorldModel>;

CudaModel cuda_world_model(const ModelView& view, const std::string& precision, int device) {
  const iqmpc::Precision operands = iqmpc::precision_from_name(precision);
  py::gil_scoped_release release;
  return std::make_shared<iqmpc::CudaWorldModel>(view.view, operands, device);
}

// Pointers into device memory come as integers: what they point to is the caller's to check.
void cuda_rollout(const CudaModel& model, py::ssize_t problems, py::ssize_t horizon,
                  py::ssize_t samples, std::uintptr_t z0, std::uintptr_t actions,
                  std::uintptr_t score_noise, std::uintptr_t critic_pair, float discount,
                  const std::string& score, float entropy_coef, std::uintptr_t returns,
                  std::uintptr_t work, std::uintptr_t stream) {
  iqmpc::CudaRolloutView view;
  view.problems = problems;
  view.horizon = horizon;
  view.samples = samples;
  view.z0 = reinterpret_cast<const float*>(z0);
  view.actions = reinterpret_cast<const float*>(actions);
  view.score_noise = reinterpret_cast<const float*>(score_noise);
  view.critic_pair = reinterpret_cast<const std::int64_t*>(critic_pair);
  view.discount = discount;
  view.score = score_from_name(score);
  view.entropy_coef = entropy_coef;
  view.returns = reinterpret_cast<float*>(returns);
  view.work = reinterpret_cast<void*>(work);
  view.stream = reinterpret_cast<void*>(stream);
  py::gil_scoped_release release;
  iqmpc::cuda_rollout(*model, view);
}

#endif

// Why no CUDA kernel can run here; empty where they can.
std::string cuda_unavailable_reason() {
#ifdef IQMPC_HAS_CUDA
  return iqmpc::cuda_unavailable_reason();
#else
  return "iqmpc._C was built without CUDA";
#endif
}

// A learner and the arrays whose memory it works in.
struct BoundLearner {
  std::vector<py::array> arrays;
  std::unique_ptr<iqmpc::Learner> learner;
};

// (value, first, second, average) or, of a target, (value,): None where there is none.
// What a sequence yields is kept while it is read: it may have made it for this alone.
iqmpc::Parameter parameter(const py::handle& object, const std::string& name,
                           const std::vector<Side>& shape, std::vector<py::array>& arrays) {
  iqmpc::Parameter result;
  float** fields[] = {&result.value, &result.first, &result.second, &result.average};
  const char* names[] = {"", "'s first moment", "'s second moment", "'s average"};
  std::size_t i = 0;
  for (const py::object part : py::cast<py::sequence>(object)) {
    if (i == 4) throw py::value_error(name + " must be at most four arrays");
    if (!part.is_none()) {
      *fields[i] = writeable(part, (name + names[i]).c_str(), shape);
      arrays.push_back(py::reinterpret_borrow<py::array>(part));
    }
    ++i;
  }
  return result;
}

std::vector<iqmpc::LayerParameters> layer_parameters(const py::sequence& layers,
                                                     const std::string& part,
                                                     std::vector<py::array>& arrays) {
  std::vector<iqmpc::LayerParameters> result;
  for (const py::object layer : layers) {
    const std::string name = part + " layer " + std::to_string(result.size());
    const auto parts = py::cast<py::sequence>(layer);
    if (parts.size() != 2 && parts.size() != 4) {
      throw py::value_error(name + " must be (weight, bias) or (weight, bias, gamma, beta), got " +
                            std::to_string(parts.size()) + " parameters");
    }
    const auto weight = py::cast<py::sequence>(parts[0]);
    const py::array matrix = checked(weight[0], (name + " weight").c_str(), {"O", "I"});
    iqmpc::LayerParameters p;
    p.out = matrix.shape(0);
    p.in = matrix.shape(1);
    p.weight = parameter(parts[0], name + " weight", {p.out, p.in}, arrays);
    p.bias = parameter(parts[1], name + " bias", {p.out}, arrays);
    if (parts.size() == 4) {
      p.gamma = parameter(parts[2], name + " gamma", {p.out}, arrays);
      p.beta = parameter(parts[3], name + " beta", {p.out}, arrays);
    }
    result.push_back(p);
  }
  return result;
}

template <class Enum>
Enum named(const std::string& what, const std::string& name,
           const std::vector<std::pair<const char*, Enum>>& values) {
  std::string known;
  for (const auto& [text, value] : values) {
    if (name == text) return value;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  throw py::value_error(what + " must be one of " + known + ", got " + name);
}

std::unique_ptr<BoundLearner> bound_learner(
    const py::sequence& encoder, const py::sequence& dynamics, const py::sequence& policy,
    const py::sequence& critics, const py::sequence& targets, const py::sequence& termination,
    py::ssize_t simnorm_dim, float log_std_min, float log_std_max, const std::string& objective,
    const std::string& entropy, py::ssize_t horizon, float rho, float discount, float alpha,
    float entropy_coef, float c_cons, float c_iq, float c_gp, float c_bc, float c_termination,
    float termination_weight, float dropout, bool dropout_always, float lr, float encoder_lr_scale,
    float grad_clip, float tau, float average_rate, const std::string& precision, int threads,
    std::uint64_t seed, const std::optional<std::string>& isa) {
  auto bound = std::make_unique<BoundLearner>();
  iqmpc::LearnerView view;
  view.encoder = layer_parameters(encoder, "encoder", bound->arrays);
  view.dynamics = layer_parameters(dynamics, "dynamics", bound->arrays);
  view.policy = layer_parameters(policy, "policy", bound->arrays);
  view.termination = layer_parameters(termination, "termination", bound->arrays);
  for (const py::object critic : critics) {
    view.critics.push_back(layer_parameters(py::cast<py::sequence>(critic),
                                            "critic " + std::to_string(view.critics.size()),
                                            bound->arrays));
  }
  for (const py::object target : targets) {
    view.targets.push_back(layer_parameters(py::cast<py::sequence>(target),
                                            "target " + std::to_string(view.targets.size()),
                                            bound->arrays));
  }
  view.simnorm_dim = simnorm_dim;
  view.log_std_min = log_std_min;
  view.log_std_max = log_std_max;
  iqmpc::LearnerSettings s;
  s.objective = named<iqmpc::Objective>("objective", objective,
                                        {{"iq", iqmpc::Objective::iq},
                                         {"v_diff", iqmpc::Objective::v_diff},
                                         {"td", iqmpc::Objective::td}});
  s.entropy = named<iqmpc::Entropy>(
      "entropy", entropy,
      {{"exact", iqmpc::Entropy::exact}, {"presquash", iqmpc::Entropy::presquash}});
  s.horizon = horizon;
  s.rho = rho;
  s.discount = discount;
  s.alpha = alpha;
  s.entropy_coef = entropy_coef;
  s.c_cons = c_cons;
  s.c_iq = c_iq;
  s.c_gp = c_gp;
  s.c_bc = c_bc;
  s.c_termination = c_termination;
  s.termination_weight = termination_weight;
  s.dropout = dropout;
  s.dropout_always = dropout_always;
  s.lr = lr;
  s.encoder_lr_scale = encoder_lr_scale;
  s.grad_clip = grad_clip;
  s.tau = tau;
  s.average_rate = average_rate;
  s.precision = iqmpc::precision_from_name(precision);
  s.threads = threads;
  const iqmpc::Isa level = isa ? iqmpc::isa_from_name(*isa, "isa") : iqmpc::active_isa();
  bound->learner = std::make_unique<iqmpc::Learner>(view, s, seed, level);
  return bound;
}

// (obs [R, O], action [R, A], reward [R], terminated [R], starts int64 [S]) as a view; `arrays`
// keeps them alive.
iqmpc::ReplayView replay_view(const iqmpc::Learner& learner, const py::sequence& replay,
                              const std::string& name, std::vector<py::array>& arrays) {
  if (replay.size() != 5) {
    throw py::value_error(name + " must be (obs, action, reward, terminated, starts), got " +
                          std::to_string(replay.size()) + " arrays");
  }
  iqmpc::ReplayView view;
  arrays.push_back(checked(replay[0], (name + " obs").c_str(), {"R", learner.obs_dim()}));
  view.obs = data(arrays.back());
  view.rows = arrays.back().shape(0);
  arrays.push_back(
      checked(replay[1], (name + " action").c_str(), {view.rows, learner.action_dim()}));
  view.action = data(arrays.back());
  arrays.push_back(checked(replay[2], (name + " reward").c_str(), {view.rows}));
  view.reward = data(arrays.back());
  arrays.push_back(checked(replay[3], (name + " terminated").c_str(), {view.rows}));
  view.terminated = data(arrays.back());
  const auto starts = py::cast<py::object>(replay[4]);
  if (!py::isinstance<py::array_t<std::int64_t, py::array::c_style>>(starts) ||
      py::reinterpret_borrow<py::array>(starts).ndim() != 1) {
    throw py::value_error(name + " starts must be contiguous int64 with shape [S], got " +
                          std::string(py::str(starts)));
  }
  arrays.push_back(py::reinterpret_borrow<py::array>(starts));
  view.starts = static_cast<const std::int64_t*>(arrays.back().data());
  view.slices = arrays.back().shape(0);
  return view;
}

py::tuple as_tuple(const iqmpc::UpdateMetrics& m) {
  return py::make_tuple(m.consistency, m.q_expert, m.q_behaviour, m.target_value, m.reward_expert,
                        m.reward_behaviour, m.value_term, m.gradient_penalty, m.critic_loss,
                        m.termination_loss, m.termination_recall, m.termination_precision,
                        m.model_grad_norm, m.policy_loss, m.entropy, m.q_policy, m.policy_grad_norm,
                        m.cloning_error, m.model_skipped, m.policy_skipped);
}

py::tuple learn(const BoundLearner& bound, const py::object& experts, const py::sequence& behaviour,
                py::ssize_t batch, std::uint64_t update, std::uint64_t model_steps,
                std::uint64_t policy_steps) {
  check_fork(*bound.learner, "learner");
  std::vector<py::array> arrays;
  iqmpc::ReplayView of_experts;
  const bool demonstrations = !experts.is_none();
  if (demonstrations) {
    of_experts = replay_view(*bound.learner, py::cast<py::sequence>(experts), "experts", arrays);
  }
  const auto of_behaviour = replay_view(*bound.learner, behaviour, "behaviour", arrays);
  iqmpc::UpdateMetrics metrics;
  {
    py::gil_scoped_release release;
    metrics = bound.learner->learn(demonstrations ? &of_experts : nullptr, of_behaviour, batch,
                                   update, model_steps, policy_steps);
  }
  return as_tuple(metrics);
}

py::tuple update(const BoundLearner& bound, const py::object& obs, const py::object& action,
                 const py::object& reward, const py::object& terminated, py::ssize_t experts,
                 std::uint64_t update, std::uint64_t model_steps, std::uint64_t policy_steps) {
  check_fork(*bound.learner, "learner");
  const py::ssize_t h = bound.learner->settings().horizon;
  const py::array a = checked(action, "action", {h, "N", bound.learner->action_dim()});
  const py::ssize_t columns = a.shape(1);
  const py::array o = checked(obs, "obs", {h + 1, columns, bound.learner->obs_dim()});
  const py::array r = checked(reward, "reward", {h, columns});
  const py::array d = checked(terminated, "terminated", {h, columns});
  const iqmpc::BatchView batch{data(o), data(a), data(r), data(d), columns, experts};
  iqmpc::UpdateMetrics metrics;
  {
    py::gil_scoped_release release;
    metrics = bound.learner->update(batch, update, model_steps, policy_steps);
  }
  return as_tuple(metrics);
}

py::dict update_draws(const BoundLearner& bound, std::uint64_t update, py::ssize_t columns,
                      py::ssize_t experts) {
  const iqmpc::LearnerSettings& s = bound.learner->settings();
  const py::ssize_t h = s.horizon, a = bound.learner->action_dim();
  const py::ssize_t k = bound.learner->num_critics(), d = bound.learner->hidden_dim();
  const bool difference = s.objective == iqmpc::Objective::v_diff;
  iqmpc::UpdateDraws draws;
  py::dict result;
  const auto array = [&](const char* name, std::vector<py::ssize_t> shape) {
    py::array_t<float> out(shape);
    result[name] = out;
    return out.mutable_data();
  };
  draws.target = array("target", {h, columns, a});
  draws.initial = array("initial", {difference ? h : 1, columns, a});
  draws.policy = array("policy", {h + 1, columns, a});
  draws.mix = array("mix", {h, experts, 1});
  draws.keep = array("keep", {k, h * columns, d});
  draws.keep_target = array("keep_target", {2, h * columns, d});
  draws.keep_value = array("keep_value", {2, difference ? h * (columns - experts) : experts, d});
  draws.keep_penalty = array("keep_penalty", {k, h * experts, d});
  draws.keep_policy = array("keep_policy", {2, (h + 1) * columns, d});
  bound.learner->draws(update, columns, experts, draws);
  result["pair"] = py::make_tuple(draws.pair[0], draws.pair[1]);
  result["policy_pair"] = py::make_tuple(draws.policy_pair[0], draws.policy_pair[1]);
  return result;
}

py::array_t<std::int64_t> slices(const BoundLearner& bound, std::uint64_t update, bool experts,
                                 const py::sequence& replay, py::ssize_t batch) {
  std::vector<py::array> arrays;
  const auto view = replay_view(*bound.learner, replay, "replay", arrays);
  py::array_t<std::int64_t> rows(batch);
  bound.learner->slices(update, experts, view, batch, rows.mutable_data());
  return rows;
}

py::list gradients(const BoundLearner& bound) {
  py::list result;
  for (const iqmpc::LearnerGradient& g : bound.learner->gradients()) {
    py::array_t<float> copy({g.rows, g.columns});
    for (py::ssize_t r = 0; r < g.rows; ++r) {
      std::copy_n(g.values + r * g.ld, g.columns, copy.mutable_data() + r * g.columns);
    }
    result.append(copy);
  }
  return result;
}

py::dict draws(const iqmpc::Planner& planner, std::uint64_t step) {
  const iqmpc::PlannerSettings& s = planner.settings();
  const py::ssize_t a = planner.action_dim(), e = s.problems, h = s.horizon;
  const py::ssize_t p = s.policy_trajectories, rest = s.samples - p, i = s.iterations;
  py::array_t<float> policy_noise({e, h, p, a}), sample_noise({i, e, h, rest, a});
  py::array_t<float> policy_score_noise({e, h - 1, p, a}), score_noise({i, e, h - 1, rest, a});
  py::array_t<float> explore({e, a}), gumbel({e, s.elites});
  iqmpc::PlanDraws out{policy_noise.mutable_data(),
                       sample_noise.mutable_data(),
                       policy_score_noise.mutable_data(),
                       score_noise.mutable_data(),
                       explore.mutable_data(),
                       gumbel.mutable_data(),
                       {0, 0}};
  planner.draws(step, out);
  py::dict named;
  named["policy_noise"] = policy_noise;
  named["sample_noise"] = sample_noise;
  named["policy_score_noise"] = policy_score_noise;
  named["score_noise"] = score_noise;
  named["explore"] = explore;
  named["gumbel"] = gumbel;
  named["pair"] = py::make_tuple(out.pair[0], out.pair[1]);
  return named;
}

// Objects that were made by __new__ alone are refused. pybind11 would hand out memory in which
// there is nothing yet; the type's allocator, which it asks for that and for nothing else, throws.
template <class T, class... Options>
py::class_<T, Options...> expose(py::module_& module, const char* name, const char* doc) {
  py::class_<T, Options...> bound(module, name, doc);
  py::detail::get_type_info(typeid(T))->operator_new = [](std::size_t) -> void* {
    throw py::type_error("an iqmpc._C object was made without its __init__");
  };
  return bound;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "CPU kernels over NumPy arrays and CUDA kernels over device memory; iqmpc.kernels has the "
      "public operations.";

  module.def(
      "isa_levels",
      [] {
        std::vector<std::string> names;
        for (const iqmpc::Isa isa : iqmpc::isa_levels()) names.emplace_back(iqmpc::isa_name(isa));
        return names;
      },
      "Names of the instruction-set levels this machine runs, best last.");
  module.def(
      "isa", [] { return std::string(iqmpc::isa_name(iqmpc::active_isa())); },
      "Name of the level that layers packed now use: the best one, or the one the environment "
      "variable IQMPC_ISA names. Raises ValueError where that one is unknown or cannot run.");

  expose<ModelView>(
      module, "ModelView",
      "A world model's layers where they lie: packing one reads what the arrays hold then.")
      .def(py::init(&model_view), py::kw_only(), py::arg("encoder"), py::arg("dynamics"),
           py::arg("policy"), py::arg("critics"), py::arg("termination") = py::tuple(),
           py::arg("simnorm_dim"), py::arg("log_std_min"), py::arg("log_std_max"),
           "Each part is a sequence of layers (weight [O, I], bias [O], gamma [O], beta [O]), the "
           "last one of policy, critics and termination without gamma and beta; arrays of critics "
           "are stacked, [K, ...], and termination is empty where there is none. Without encoder "
           "layers observations are latents. The arrays are kept, not copied. Raises ValueError "
           "for wrong shapes, dtypes and layouts.");

  expose<iqmpc::WorldModel, Model>(
      module, "WorldModel",
      "An immutable copy of a world model, packed for one instruction-set level and precision.")
      .def(py::init(&world_model), py::arg("view"), py::kw_only(), py::arg("precision") = "float32",
           py::arg("isa") = py::none(),
           "precision is float32 or bf16. Raises ValueError for sizes that do not fit together.")
      .def_property_readonly("obs_dim", &iqmpc::WorldModel::obs_dim)
      .def_property_readonly("action_dim", &iqmpc::WorldModel::action_dim)
      .def_property_readonly("latent_dim", &iqmpc::WorldModel::latent_dim)
      .def_property_readonly("num_critics", &iqmpc::WorldModel::num_critics)
      .def_property_readonly("has_termination", &iqmpc::WorldModel::has_termination)
      .def_property_readonly("precision",
                             [](const iqmpc::WorldModel& model) {
                               return std::string(iqmpc::precision_name(model.precision()));
                             })
      .def_property_readonly("isa", [](const iqmpc::WorldModel& model) {
        return std::string(iqmpc::isa_name(model.isa()));
      });

  module.def("rollout", &rollout, py::arg("model").none(false), py::arg("z0"), py::arg("actions"),
             py::arg("score_noise"), py::arg("critic_pair"), py::arg("discount"), py::arg("score"),
             py::arg("entropy_coef"), py::arg("returns"), py::arg("threads"),
             "Write the soft returns of iqmpc.kernels.mppi_rollout into `returns` [E, S].");

  module.def("cuda_unavailable_reason", &cuda_unavailable_reason,
             py::call_guard<py::gil_scoped_release>(),
             "Why no CUDA device can run this module's kernels; empty where one can.");
  module.def(
      "cuda_available", [] { return cuda_unavailable_reason().empty(); },
      py::call_guard<py::gil_scoped_release>(), "Whether a CUDA device can run them.");

#ifdef IQMPC_HAS_CUDA
  expose<iqmpc::CudaWorldModel, CudaModel>(
      module, "CudaWorldModel",
      "An immutable copy of a world model in the memory of one CUDA device. Only in builds with "
      "CUDA.")
      .def(py::init(&cuda_world_model), py::arg("view"), py::kw_only(),
           py::arg("precision") = "float32", py::arg("device") = 0,
           "Raises ValueError for what does not fit and RuntimeError, with CUDA's own words, where "
           "the device cannot be used.")
      .def_property_readonly("action_dim", &iqmpc::CudaWorldModel::action_dim)
      .def_property_readonly("latent_dim", &iqmpc::CudaWorldModel::latent_dim)
      .def_property_readonly("num_critics", &iqmpc::CudaWorldModel::num_critics)
      .def_property_readonly("device", &iqmpc::CudaWorldModel::device)
      .def_property_readonly("precision",
                             [](const iqmpc::CudaWorldModel& model) {
                               return std::string(iqmpc::precision_name(model.precision()));
                             })
      .def("work_bytes", &iqmpc::CudaWorldModel::work_bytes, py::arg("problems"),
           "Bytes of device memory that cuda_rollout works in.");

  module.def("cuda_rollout", &cuda_rollout, py::arg("model").none(false), py::kw_only(),
             py::arg("problems"), py::arg("horizon"), py::arg("samples"), py::arg("z0"),
             py::arg("actions"), py::arg("score_noise"), py::arg("critic_pair"),
             py::arg("discount"), py::arg("score"), py::arg("entropy_coef"), py::arg("returns"),
             py::arg("work"), py::arg("stream"),
             "Enqueue iqmpc.kernels.mppi_rollout on a stream. Arrays are addresses in the memory "
             "of the model's device: float32, dense, critic_pair int64. Only in builds with CUDA.");
#endif

  expose<iqmpc::Planner>(module, "Planner", "MPPI for E problems: a whole plan in one call.")
      .def(py::init([](Model model, py::ssize_t problems, py::ssize_t horizon, py::ssize_t samples,
                       py::ssize_t elites, py::ssize_t policy_trajectories, py::ssize_t iterations,
                       float temperature, float std_min, float std_max, float discount,
                       bool enabled, int threads, double budget_us, std::uint64_t seed) {
             return std::make_unique<iqmpc::Planner>(
                 std::move(model),
                 iqmpc::PlannerSettings{problems, horizon, samples, elites, policy_trajectories,
                                        iterations, temperature, std_min, std_max, discount,
                                        enabled, threads, budget_us},
                 seed);
           }),
           py::arg("model").none(false), py::kw_only(), py::arg("problems"), py::arg("horizon"),
           py::arg("samples"), py::arg("elites"), py::arg("policy_trajectories"),
           py::arg("iterations"), py::arg("temperature"), py::arg("std_min"), py::arg("std_max"),
           py::arg("discount"), py::arg("enabled"), py::arg("threads"), py::arg("budget_us"),
           py::arg("seed"))
      .def("plan", &plan, py::arg("obs"), py::arg("explore"), py::arg("action"),
           py::arg("spent_us") = 0.0,
           "Write the actions for float32 obs [E, O] into float32 action [E, A]; returns "
           "(iterations, samples, nonfinite problems, missed, late, elapsed_us). spent_us of the "
           "budget were used before the call.")
      .def(
          "publish",
          [](iqmpc::Planner& planner, Model model) {
            check_fork(planner, "planner");
            planner.publish(std::move(model));
          },
          py::arg("model").none(false), "Plan with this model from now on.")
      .def(
          "publish",
          [](iqmpc::Planner& planner, const ModelView& view) {
            check_fork(planner, "planner");
            py::gil_scoped_release release;
            planner.publish(view.view);
          },
          py::arg("view"), "Plan from now on with what the view shows now.")
      .def("reset",
           [](iqmpc::Planner& planner) {
             check_fork(planner, "planner");
             py::gil_scoped_release release;
             planner.reset();
           })
      .def(
          "reset",
          [](iqmpc::Planner& planner, std::ptrdiff_t problem) {
            check_fork(planner, "planner");
            py::gil_scoped_release release;
            planner.reset(problem);
          },
          py::arg("problem"))
      .def_property_readonly(
          "mean",
          [](py::object self) {
            auto& planner = self.cast<iqmpc::Planner&>();
            const iqmpc::PlannerSettings& s = planner.settings();
            return py::array_t<float>({s.problems, s.horizon, planner.action_dim()}, planner.mean(),
                                      self);
          },
          "The last plan's mean [E, H, A], the planner's own memory. Not to be touched while a "
          "plan runs.")
      .def_property("step", &iqmpc::Planner::step, &iqmpc::Planner::set_step)
      .def("draws", &draws, py::arg("step"), "What plan number `step` draws, by name.");

  expose<BoundLearner>(
      module, "Learner",
      "Updates a model in the memory of the arrays given: iqmpc.kernels.iq_update.")
      .def(py::init(&bound_learner), py::kw_only(), py::arg("encoder"), py::arg("dynamics"),
           py::arg("policy"), py::arg("critics"), py::arg("targets"), py::arg("termination"),
           py::arg("simnorm_dim"), py::arg("log_std_min"), py::arg("log_std_max"),
           py::arg("objective"), py::arg("entropy"), py::arg("horizon"), py::arg("rho"),
           py::arg("discount"), py::arg("alpha"), py::arg("entropy_coef"), py::arg("c_cons"),
           py::arg("c_iq"), py::arg("c_gp"), py::arg("c_bc"), py::arg("c_termination"),
           py::arg("termination_weight"), py::arg("dropout"), py::arg("dropout_always"),
           py::arg("lr"), py::arg("encoder_lr_scale"), py::arg("grad_clip"), py::arg("tau"),
           py::arg("average_rate"), py::arg("precision"), py::arg("threads"), py::arg("seed"),
           py::arg("isa") = py::none(),
           "Each part is a sequence of layers, each layer of parameters (weight, bias[, gamma, "
           "beta]), each parameter of arrays (value, first moment, second moment, average or "
           "None), of targets the value alone. All are written in place.")
      .def("learn", &learn, py::arg("experts"), py::arg("behaviour"), py::arg("batch"),
           py::arg("update"), py::arg("model_steps"), py::arg("policy_steps"),
           "One update on slices of two replays (obs, action, reward, terminated, starts).")
      .def("update", &update, py::arg("obs"), py::arg("action"), py::arg("reward"),
           py::arg("terminated"), py::arg("experts"), py::arg("update"), py::arg("model_steps"),
           py::arg("policy_steps"), "One update on slices given, time-major.")
      .def("draws", &update_draws, py::arg("update"), py::arg("columns"), py::arg("experts"),
           "What update number `update` draws, by name.")
      .def("slices", &slices, py::arg("update"), py::arg("experts"), py::arg("replay"),
           py::arg("batch"), "First rows of the slices that `learn` takes of a replay.")
      .def("gradients", &gradients,
           "The last update's, before clipping, layer by layer: encoder, dynamics, critics, "
           "termination, policy.")
      .def_property_readonly("isa", [](const BoundLearner& bound) {
        return std::string(iqmpc::isa_name(bound.learner->isa()));
      });
}
