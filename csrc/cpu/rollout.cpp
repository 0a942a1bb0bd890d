#include "cpu/rollout.hpp"

#include <algorithm>

#include "common/smaller.hpp"

namespace iqmpc::detail {

namespace {

AlignedBuffer<float> floats(Index rows, Index columns) {
  return AlignedBuffer<float>(static_cast<std::size_t>(rows * columns));
}

// The kernels with one model's layers put in.
class Network {
 public:
  Network(const PackedModel& model, const KernelTable& kernels, Workspace& workspace)
      : model_(model), k_(kernels), w_(workspace) {}

  Index ld() const { return model_.widest; }

  // pre = init + x W^T, or the layer's bias for init.
  void linear(const PackedLayer& layer, const void* x, Index ldx, Index rows, float* pre) const {
    k_.linear(x, ldx, rows, layer.panels.data(), layer.bias.data(), 0, layer.in, layer.padded, pre,
              ld());
  }
  void add(const PackedLayer& layer, const void* x, Index ldx, Index rows, const float* init,
           Index ld_init, float* pre) const {
    k_.linear(x, ldx, rows, layer.panels.data(), init, ld_init, layer.in, layer.padded, pre, ld());
  }

  // From the pre-activations of `first`, in workspace.pre, through the layers behind it: leaves
  // the last one's pre-activations there.
  void through(const PackedLayer& first, const std::vector<PackedLayer>& rest, std::size_t from,
               Index rows) const {
    const PackedLayer* before = &first;
    for (std::size_t i = from; i < rest.size(); ++i) {
      k_.norm_mish(w_.pre.data(), ld(), rows, before->gamma.data(), before->beta.data(),
                   before->padded, before->outputs, w_.hidden.data(), ld());
      linear(rest[i], w_.hidden.data(), ld(), rows, w_.pre.data());
      before = &rest[i];
    }
  }

  void simnorm(const PackedLayer& layer, Index rows, void* z) const {
    const SimNormLayout& s = model_.simnorm;
    k_.norm_simnorm(w_.pre.data(), ld(), rows, layer.gamma.data(), layer.beta.data(), s.dim,
                    s.groups, layer.outputs, z, s.features());
  }

  void scalar(const Scalar& f, Index rows, float* out) const {
    through(f.first.z, f.rest, 0, rows);
    const PackedLayer& last = f.rest.empty() ? f.first.z : f.rest.back();
    k_.norm_mish_dot(w_.pre.data(), ld(), rows, last.gamma.data(), last.beta.data(), last.padded,
                     last.outputs, f.w.data(), f.bias, out);
  }

  // Actions as operands of a product: converted, or as they are.
  const void* operand(const float* actions, Index rows) const {
    if (!k_.bf16_activations) return actions;
    k_.to_activations(actions, rows * model_.action_pad, w_.operand.data());
    return w_.operand.data();
  }

 private:
  const PackedModel& model_;
  const KernelTable& k_;
  Workspace& w_;
};

}  // namespace

Blocks::Blocks(Index problems, Index count, Index threads)
    : problems(problems), count(count), per_problem((count + kBlockRows - 1) / kBlockRows) {
  while (per_problem > 0 && per_problem * problems % threads && per_problem < count) ++per_problem;
}

Root::Root(const PackedModel& model)
    : z(floats(1, model.simnorm.features())),
      dynamics(floats(1, model.widest)),
      critic{floats(1, model.widest), floats(1, model.widest)},
      head(floats(1, model.widest)) {}

Workspace::Workspace(const PackedModel& model, Index horizon)
    : pre(floats(2 * kBlockRows, model.widest)),
      hidden(floats(2 * kBlockRows, model.widest)),
      part(floats(kBlockRows, model.widest)),
      z(floats(kBlockRows, model.simnorm.features())),
      operand(floats(2 * kBlockRows, model.action_pad)),
      drawn(floats(2 * kBlockRows, model.action_pad)),
      q{floats(2, kBlockRows), floats(2, kBlockRows)},
      logit(floats(1, kBlockRows)),
      alive(floats(1, kBlockRows)),
      score_noise(floats((horizon - 1) * kBlockRows, model.action_pad)),
      policy_noise(floats(horizon * kBlockRows, model.action_pad)),
      actions(floats(horizon * kBlockRows, model.action_pad)) {}

void encode(const PackedModel& model, const float* obs, Workspace& workspace, Root& root) {
  if (model.encoder.empty()) {
    for (Index i = 0; i < model.latent_dim; ++i) root.z.data()[model.simnorm.feature(i)] = obs[i];
    return;
  }
  const Network network(model, *model.exact, workspace);
  const PackedLayer& first = model.encoder.front();
  network.linear(first, obs, model.obs_dim, 1, workspace.pre.data());
  network.through(first, model.encoder, 1, 1);
  network.simnorm(model.encoder.back(), 1, root.z.data());
}

namespace {

// z_0's part of a first layer, from the activations that `root_operand` has left.
void first_part(const PackedModel& model, const Network& network, const FirstLayer& layer,
                const float* excess, Workspace& workspace, float* pre) {
  network.linear(layer.z, workspace.z.data(), model.simnorm.features(), 1, pre);
  if (excess) {
    network.add(layer.excess, workspace.hidden.data(), model.simnorm.groups, 1, pre, 0, pre);
  }
}

// z_0 and its groups' excess as operands of products.
void root_operand(const PackedModel& model, const float* excess, const Root& root,
                  Workspace& workspace) {
  const KernelTable& k = *model.kernels;
  k.to_activations(root.z.data(), model.simnorm.features(), workspace.z.data());
  if (excess) k.to_activations(excess, model.simnorm.groups, workspace.hidden.data());
}

}  // namespace

void head(const PackedModel& model, const float* excess, Workspace& workspace, Root& root) {
  const Network network(model, *model.kernels, workspace);
  root_operand(model, excess, root, workspace);
  first_part(model, network, model.policy_first, excess, workspace, workspace.pre.data());
  network.through(model.policy_first.z, model.policy, 0, 1);
  std::copy_n(workspace.pre.data(), 2 * model.action_pad, root.head.data());
}

void grow(const PackedModel& model, const Index* pair, const float* excess, Workspace& workspace,
          Root& root) {
  const Network network(model, *model.kernels, workspace);
  root_operand(model, excess, root, workspace);
  const auto part = [&](const FirstLayer& layer, float* pre) {
    first_part(model, network, layer, excess, workspace, pre);
  };
  part(model.dynamics.first, root.dynamics.data());
  for (int i = 0; i < 2; ++i) part(model.critics[pair[i]].first, root.critic[i].data());
  head(model, excess, workspace, root);
}

void policy_at_root(const PackedModel& model, const Root& root, const float* noise, float* action) {
  model.kernels->gaussian(root.head.data(), 0, 1, noise, model.action_pad, model.log_std_min,
                          model.log_std_max, action);
}

void score(const PackedModel& model, const Index* pair, const Root& root, const Block& block,
           Workspace& w) {
  const KernelTable& k = *model.kernels;
  const Network network(model, k, w);
  const Index rows = block.rows, pad = model.action_pad, ld = model.widest;
  const Index ld_z = model.simnorm.features();

  const auto draw = [&](const float* head, Index ld_head, const float* noise, float* actions) {
    k.gaussian(head, ld_head, rows, noise, pad, model.log_std_min, model.log_std_max, actions);
  };
  const auto noise_at = [&](Index t) { return block.policy_noise + t * rows * pad; };

  // t = 0: z_0 is one latent for all rows, so its part of a first layer takes a bias's place.
  if (block.policy_noise) draw(root.head.data(), 0, noise_at(0), block.actions);
  const void* a = network.operand(block.actions, rows);
  for (int i = 0; i < 2; ++i) {
    const Scalar& critic = model.critics[pair[i]];
    network.add(critic.first.a, a, pad, rows, root.critic[i].data(), 0, w.pre.data());
    network.scalar(critic, rows, w.q[i].data());
  }
  for (Index r = 0; r < rows; ++r) {
    block.returns[r] = smaller(w.q[0].data()[r], w.q[1].data()[r]);
  }

  std::fill_n(w.alive.data(), rows, 1.0f);
  float weight = 1;
  for (Index t = 1; t < block.horizon; ++t) {
    // z_t = d(z_{t-1}, a_{t-1})
    const FirstLayer& first = model.dynamics.first;
    if (t == 1) {
      network.add(first.a, a, pad, rows, root.dynamics.data(), 0, w.pre.data());
    } else {
      network.linear(first.z, w.z.data(), ld_z, rows, w.pre.data());
      network.add(first.a, a, pad, rows, w.pre.data(), ld, w.pre.data());
    }
    network.through(first.z, model.dynamics.rest, 0, rows);
    network.simnorm(model.dynamics.rest.back(), rows, w.z.data());

    if (model.termination) {
      network.linear(model.termination->first.z, w.z.data(), ld_z, rows, w.pre.data());
      network.scalar(*model.termination, rows, w.logit.data());
      for (Index r = 0; r < rows; ++r) {
        if (w.logit.data()[r] > 0) w.alive.data()[r] = 0;
      }
    }

    // a_t and ã_t, one below the other
    network.linear(model.policy_first.z, w.z.data(), ld_z, rows, w.pre.data());
    network.through(model.policy_first.z, model.policy, 0, rows);
    float* actions = block.actions + t * block.step;
    float* sampled = w.drawn.data() + rows * pad;
    if (block.policy_noise) draw(w.pre.data(), ld, noise_at(t), actions);
    draw(w.pre.data(), ld, block.score_noise + (t - 1) * rows * pad, sampled);
    std::copy_n(actions, rows * pad, w.drawn.data());
    a = network.operand(w.drawn.data(), 2 * rows);

    for (int i = 0; i < 2; ++i) {
      const Scalar& critic = model.critics[pair[i]];
      network.linear(critic.first.z, w.z.data(), ld_z, rows, w.part.data());
      const auto* tilde =
          static_cast<const unsigned char*>(a) +
          static_cast<std::size_t>(rows * pad) * (k.bf16_activations ? 2 : sizeof(float));
      network.add(critic.first.a, a, pad, rows, w.part.data(), ld, w.pre.data());
      network.add(critic.first.a, tilde, pad, rows, w.part.data(), ld, w.pre.data() + rows * ld);
      network.scalar(critic, 2 * rows, w.q[i].data());
    }
    weight *= block.discount;
    const float *q0 = w.q[0].data(), *q1 = w.q[1].data();
    for (Index r = 0; r < rows; ++r) {
      if (w.alive.data()[r] == 0) continue;  // whatever follows, NaN too, is nothing
      const float policy = smaller(q0[rows + r], q1[rows + r]);
      block.returns[r] += weight * (smaller(q0[r], q1[r]) - policy);
    }
  }
}

}  // namespace iqmpc::detail
