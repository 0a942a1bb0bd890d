// The rollout of one tile of rows, and what all rows of a problem share: what a thread block does.
#pragma once

#include "cuda/arguments.hpp"
#include "cuda/product.hpp"
#include "cuda/tile_layout.hpp"

namespace iqmpc::gpu {

// What root_tile computes: z_0's part of three first layers and, unrolled, the entropy at z_0.
IQMPC_BOTH constexpr std::int64_t root_parts(const RolloutArgs& args) {
  return args.unrolled ? 4 : 3;
}

// Blocks that the work of all problems takes.
template <int kRows>
IQMPC_BOTH constexpr std::int64_t root_tiles(const RolloutArgs& args) {
  return (args.problems + kRows - 1) / kRows * root_parts(args);
}

template <int kRows>
IQMPC_BOTH constexpr std::int64_t rollout_tiles(const RolloutArgs& args) {
  return args.problems * ((args.samples + kRows - 1) / kRows);
}

struct Moments {
  float mean, scale;
};

template <class Warp>
IQMPC_DEVICE inline Moments moments(Warp warp, const float* row, int n) {
  const auto count = static_cast<float>(n);
  const float mean = warp.sum(n, [&](int i) { return row[i]; }) / count;
  const float squares = warp.sum(n, [&](int i) { return (row[i] - mean) * (row[i] - mean); });
  return {mean, norm_scale(squares / count)};
}

struct Layer {
  const unsigned char* weights;
  const float *bias, *gamma, *beta;
  int inputs, latents, outputs, padded;

  IQMPC_DEVICE float normed(float x, Moments m, int i) const {
    return (x - m.mean) * m.scale * gamma[i] + beta[i];
  }
};

// kRows rows in the shared memory of one block, and a network's layers applied to them.
template <class Operand, int kRows, class Block>
class Tile {
 public:
  IQMPC_DEVICE Tile(Block block, const unsigned char* arena, const ModelData& model)
      : block_(block), arena_(arena), model_(model), l_(tile_layout<Operand>(model, kRows)) {}

  IQMPC_DEVICE float* pre() const { return at<float>(l_.pre); }
  IQMPC_DEVICE float* part() const { return at<float>(l_.part); }
  IQMPC_DEVICE Operand* hidden() const { return at<Operand>(l_.hidden); }
  IQMPC_DEVICE Operand* z() const { return at<Operand>(l_.z); }
  IQMPC_DEVICE Operand* action() const { return at<Operand>(l_.action); }
  IQMPC_DEVICE Operand* policy_action() const { return at<Operand>(l_.policy_action); }
  IQMPC_DEVICE float* q() const { return at<float>(l_.q); }
  IQMPC_DEVICE float* total() const { return at<float>(l_.total); }
  IQMPC_DEVICE int ld_pre() const { return l_.ld_pre; }

  IQMPC_DEVICE StackData critic_stack(std::int64_t k) const {
    return reinterpret_cast<const StackData*>(arena_ + model_.critics)[k];
  }

  IQMPC_DEVICE Layer layer(int index) const {
    const LayerData& data = reinterpret_cast<const LayerData*>(arena_ + model_.layers)[index];
    const auto floats = [&](std::int64_t offset) {
      return reinterpret_cast<const float*>(arena_ + offset);
    };
    return {arena_ + data.weights, floats(data.bias), floats(data.gamma), floats(data.beta),
            data.inputs,           data.latents,      data.outputs,       data.padded};
  }

  // out = init + x W^T over the layer's latent inputs, its action inputs, or, behind the first
  // layer, all there are.
  IQMPC_DEVICE void latent_part(const Layer& layer, float* out) const {
    product<kRows>(block_, layer.weights, layer.inputs, layer.padded, 0, layer.latents, z(),
                   l_.ld_z, layer.bias, 0, out, l_.ld_pre);
  }
  IQMPC_DEVICE void action_part(const Layer& layer, const Operand* actions, const float* init,
                                int ld_init, float* out) const {
    product<kRows>(block_, layer.weights, layer.inputs, layer.padded, layer.latents,
                   layer.inputs - layer.latents, actions, l_.ld_action, init, ld_init, out,
                   l_.ld_pre);
  }
  IQMPC_DEVICE void hidden_product(const Layer& layer, float* out) const {
    product<kRows>(block_, layer.weights, layer.inputs, layer.padded, 0, layer.inputs, hidden(),
                   l_.ld_hidden, layer.bias, 0, out, l_.ld_pre);
  }

  // hidden = mish(layer_norm(pre)), with zeros in the padding.
  IQMPC_DEVICE void norm_mish(const Layer& layer) const {
    block_.rows(kRows, [&](int row, auto warp) {
      const float* x = pre() + row * l_.ld_pre;
      Operand* out = hidden() + row * l_.ld_hidden;
      const Moments m = moments(warp, x, layer.outputs);
      warp.each(layer.padded, [&](int i) {
        out[i] =
            to_operand<Operand>(i < layer.outputs ? mish<Operand>(layer.normed(x[i], m, i)) : 0.0f);
      });
    });
  }

  // From the first layer's pre-activations in `pre` to the last one's, through `count` layers.
  IQMPC_DEVICE void through(StackData stack, int count) const {
    for (int i = 1; i < count; ++i) {
      norm_mish(layer(stack.first + i - 1));
      hidden_product(layer(stack.first + i), pre());
    }
  }

  // z = simnorm(layer_norm(pre)), with zeros in the padding. Overwrites pre.
  IQMPC_DEVICE void simnorm(const Layer& layer) const {
    const int dim = model_.simnorm_dim, n = layer.outputs;
    block_.rows(kRows, [&](int row, auto warp) {
      float* x = pre() + row * l_.ld_pre;
      Operand* out = z() + row * l_.ld_z;
      const Moments m = moments(warp, x, n);
      warp.each(layer.padded, [&](int i) {
        if (i < n) {
          x[i] = layer.normed(x[i], m, i);
        } else {
          out[i] = to_operand<Operand>(0.0f);
        }
      });
      warp.each(n / dim, [&](int group) {
        float* logit = x + group * dim;
        float highest = logit[0];
        for (int v = 1; v < dim; ++v) highest = logit[v] > highest ? logit[v] : highest;
        float sum = 0;
        for (int v = 0; v < dim; ++v) {
          // A NaN may lose every comparison above; here it reaches the sum.
          logit[v] = exponential<Operand>(logit[v] - highest);
          sum += logit[v];
        }
        const float share = 1.0f / sum;
        for (int v = 0; v < dim; ++v) out[group * dim + v] = to_operand<Operand>(logit[v] * share);
      });
    });
  }

  // q [kRows], from the pre-activations of the critic's first layer in `pre`.
  IQMPC_DEVICE void critic(StackData stack, float* q) const {
    through(stack, stack.count - 1);
    const Layer normed = layer(stack.first + stack.count - 2);
    const Layer last = layer(stack.first + stack.count - 1);
    const auto* weights = reinterpret_cast<const float*>(last.weights);
    block_.rows(kRows, [&](int row, auto warp) {
      const float* x = pre() + row * l_.ld_pre;
      const Moments m = moments(warp, x, normed.outputs);
      const float sum = warp.sum(normed.outputs, [&](int i) {
        return weights[i] * mish<Operand>(normed.normed(x[i], m, i));
      });
      warp.each(1, [&](int) { q[row] = sum + last.bias[0]; });
    });
  }

  // μ and s of π, in `pre`: row [0, A) and [A, 2A).
  IQMPC_DEVICE void policy() const {
    const StackData stack = model_.policy;
    latent_part(layer(stack.first), pre());
    through(stack, stack.count);
  }

  // out [kRows, columns, padded], from `rows` dense rows in global memory, with zeros around them.
  IQMPC_DEVICE void load(const float* from, std::int64_t rows, int columns, Operand* out,
                         int ld) const {
    const int padded = round_up(columns, kSide);
    block_.each(kRows * padded, [&](int item) {
      const int row = item / padded, column = item % padded;
      const bool there = row < rows && column < columns;
      out[row * ld + column] =
          to_operand<Operand>(there ? from[static_cast<std::int64_t>(row) * columns + column] : 0);
    });
  }

  IQMPC_DEVICE void load_latents(const float* from, std::int64_t rows) const {
    load(from, rows, model_.latent_dim, z(), l_.ld_z);
  }
  IQMPC_DEVICE void load_actions(const float* from, std::int64_t rows) const {
    load(from, rows, model_.action_dim, action(), l_.ld_action);
  }

  // policy_action = tanh(μ + σ noise) with the policy in `pre`; noise [rows, A].
  IQMPC_DEVICE void draw(const float* noise, std::int64_t rows) const {
    const int columns = model_.action_dim, padded = round_up(columns, kSide);
    block_.each(kRows * padded, [&](int item) {
      const int row = item / padded, column = item % padded;
      float drawn = 0;
      if (row < rows && column < columns) {
        const float* head = pre() + row * l_.ld_pre + column;
        const float log_std = log_deviation(head[columns], model_.log_std_min, model_.log_std_max);
        drawn = tanhf(before_squashing(head[0], log_std,
                                       noise[static_cast<std::int64_t>(row) * columns + column]));
      }
      policy_action()[row * l_.ld_action + column] = to_operand<Operand>(drawn);
    });
  }

 private:
  template <class T>
  IQMPC_DEVICE T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(block_.shared() + offset);
  }

  Block block_;
  const unsigned char* arena_;
  const ModelData& model_;
  const TileLayout l_;
};

IQMPC_DEVICE inline bool critics_exist(const ModelData& model, const RolloutArgs& args) {
  return args.pair[0] >= 0 && args.pair[0] < model.num_critics && args.pair[1] >= 0 &&
         args.pair[1] < model.num_critics;
}

// One part of what z_0 contributes, for kRows problems: block `index` of root_tiles.
template <class Operand, int kRows, class Block>
IQMPC_DEVICE inline void root_tile(Block block, const unsigned char* arena, const ModelData& model,
                                   const RolloutArgs& args, std::int64_t index) {
  if (!critics_exist(model, args)) return;
  const Tile<Operand, kRows, Block> tile(block, arena, model);
  const std::int64_t first = index / root_parts(args) * kRows;
  const auto part = static_cast<int>(index % root_parts(args));
  const std::int64_t left = args.problems - first, rows = left < kRows ? left : kRows;
  tile.load_latents(args.z0 + first * model.latent_dim, rows);
  if (part < 3) {
    const StackData stack = part == 0 ? model.dynamics : tile.critic_stack(args.pair[part - 1]);
    const Layer layer = tile.layer(stack.first);
    tile.latent_part(layer, tile.pre());
    const int columns = layer.padded;
    block.each(static_cast<int>(rows) * columns, [&](int item) {
      const int row = item / columns, column = item % columns;
      args.root[((first + row) * 3 + part) * model.widest + column] =
          tile.pre()[row * tile.ld_pre() + column];
    });
    return;
  }
  tile.policy();
  const int dims = model.action_dim;
  block.rows(static_cast<int>(rows), [&](int row, auto warp) {
    const float* head = tile.pre() + row * tile.ld_pre();
    // ã_0 takes the first sample's draw of the problem's first row.
    const float* noise = args.noise + (first + row) * args.noise_steps * args.samples * dims;
    const float sum = warp.sum(dims, [&](int i) {
      const float log_std = log_deviation(head[dims + i], model.log_std_min, model.log_std_max);
      return log_density(head[i], log_std, noise[i]);
    });
    warp.each(1, [&](int) { args.constant[first + row] = args.entropy_coef * sum; });
  });
}

// The returns of kRows samples of one problem: block `index` of rollout_tiles, after all of
// root_tiles.
template <class Operand, int kRows, class Block>
IQMPC_DEVICE inline void rollout_tile(Block block, const unsigned char* arena,
                                      const ModelData& model, const RolloutArgs& args,
                                      std::int64_t index) {
  const Tile<Operand, kRows, Block> tile(block, arena, model);
  const std::int64_t per_problem = (args.samples + kRows - 1) / kRows;
  const std::int64_t problem = index / per_problem, first = index % per_problem * kRows;
  const std::int64_t left = args.samples - first, rows = left < kRows ? left : kRows;
  float* returns = args.returns + problem * args.samples + first;
  if (!critics_exist(model, args)) {
    block.each(static_cast<int>(rows), [&](int row) { returns[row] = nanf(""); });
    return;
  }
  const float* root = args.root + problem * 3 * model.widest;
  const int dims = model.action_dim, ld = tile.ld_pre();
  float weight = 1;
  for (std::int64_t t = 0; t < args.horizon; ++t) {
    if (t > 0) {
      // z_t = d(z_{t-1}, a_{t-1}), whose first layer knows z_0's part
      const Layer dynamics = tile.layer(model.dynamics.first);
      if (t > 1) tile.latent_part(dynamics, tile.pre());
      tile.action_part(dynamics, tile.action(), t > 1 ? tile.pre() : root, t > 1 ? ld : 0,
                       tile.pre());
      tile.through(model.dynamics, model.dynamics.count);
      tile.simnorm(tile.layer(model.dynamics.first + model.dynamics.count - 1));
      // ã_t
      tile.policy();
      const std::int64_t step = problem * args.noise_steps + args.noise_first + t - 1;
      tile.draw(args.noise + (step * args.samples + first) * dims, rows);
    }
    const std::int64_t step = problem * args.horizon + t;
    tile.load_actions(args.actions + (step * args.samples + first) * dims, rows);
    for (int i = 0; i < 2; ++i) {
      const StackData critic = tile.critic_stack(args.pair[i]);
      const Layer layer = tile.layer(critic.first);
      if (t > 0) tile.latent_part(layer, tile.part());
      const float* init = t > 0 ? tile.part() : root + (1 + i) * model.widest;
      for (int drawn = 0; drawn < (t > 0 ? 2 : 1); ++drawn) {
        tile.action_part(layer, drawn ? tile.policy_action() : tile.action(), init, t > 0 ? ld : 0,
                         tile.pre());
        tile.critic(critic, tile.q() + (2 * drawn + i) * kRows);
      }
    }
    if (t > 0) weight *= args.discount;
    block.each(kRows, [&](int row) {
      const float* q = tile.q() + row;
      const float value = smaller(q[0], q[kRows]);
      if (t == 0) {
        tile.total()[row] = value;
      } else {
        tile.total()[row] += weight * (value - smaller(q[2 * kRows], q[3 * kRows]));
      }
    });
  }
  const float constant = args.unrolled ? args.constant[problem] : 0.0f;
  block.each(static_cast<int>(rows), [&](int row) { returns[row] = tile.total()[row] - constant; });
}

}  // namespace iqmpc::gpu
