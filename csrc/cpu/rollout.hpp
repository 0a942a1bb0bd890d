// Imagining and scoring: the steps that the public operation and the planner share.
#pragma once

#include "cpu/packed_model.hpp"

namespace iqmpc::detail {

// Rows worked on together: their activations stay in the second-level cache while the weights pass.
constexpr Index kBlockRows = 64;

// Work for `count` rows of each of `problems` problems in blocks of nearly equal size, as many as
// keep all threads busy to the end. What a row comes out as does not depend on its block.
struct Blocks {
  Blocks(Index problems, Index count, Index threads);

  Index problems, count, per_problem;

  Index total() const { return problems * per_problem; }
  // In turn, so that the first blocks are of all problems.
  Index problem(Index block) const { return block % problems; }
  Index first(Index block) const { return count * (block / problems) / per_problem; }
  Index rows(Index block) const {
    return count * (block / problems + 1) / per_problem - first(block);
  }
};

// What all samples of one problem have in common: the functions of z_0.
struct Root {
  Root(const PackedModel& model);

  AlignedBuffer<float> z;         // [simnorm.features()], in SimNormLayout's order
  AlignedBuffer<float> dynamics;  // z_0's part of the first layers
  AlignedBuffer<float> critic[2];
  AlignedBuffer<float> head;  // π(z_0): μ and s
};

// One thread's buffers, for models of one set of sizes.
struct Workspace {
  Workspace(const PackedModel& model, Index horizon);

  AlignedBuffer<float> pre;      // [2 rows, widest] pre-activations
  AlignedBuffer<float> hidden;   // [2 rows, widest] activations (of either type)
  AlignedBuffer<float> part;     // [rows, widest] z's part of a critic's first layer
  AlignedBuffer<float> z;        // [rows, simnorm.features()] activations
  AlignedBuffer<float> operand;  // [2 rows, action_pad] actions as activations
  AlignedBuffer<float> drawn;    // [2 rows, action_pad] a_t and then ã_t
  AlignedBuffer<float> q[2];     // [2 rows]
  AlignedBuffer<float> logit;    // [rows] of z being terminal
  AlignedBuffer<float> alive;    // [rows] c_t: 1 until the first terminal z, then 0
  // The draws and actions of a block, for callers to fill.
  AlignedBuffer<float> score_noise;   // [horizon - 1, rows, action_pad]
  AlignedBuffer<float> policy_noise;  // [horizon, rows, action_pad]
  AlignedBuffer<float> actions;       // [horizon, rows, action_pad]
};

// z_0 = h(obs), into root.z; obs itself where the model has no encoder.
void encode(const PackedModel& model, const float* obs, Workspace& workspace, Root& root);

// π's part of `root`, from root.z. `excess` [simnorm.groups] is the groups' sums minus one, or null
// for a z_0 that `encode` wrote.
void head(const PackedModel& model, const float* excess, Workspace& workspace, Root& root);

// All fields of `root` but z, in the same way.
void grow(const PackedModel& model, const Index* pair, const float* excess, Workspace& workspace,
          Root& root);

// The policy's draw at z_0, action [action_pad] = tanh(μ + σ noise).
void policy_at_root(const PackedModel& model, const Root& root, const float* noise, float* action);

struct Block {
  Index horizon;
  Index rows;      // at most kBlockRows
  float* actions;  // a_t of row r at actions + t * step + r * action_pad
  Index step;
  // ε of ã_{t+1}: [horizon - 1, rows, action_pad]
  const float* score_noise;
  // Null, or [horizon, rows, action_pad]: a_t is drawn from π and written.
  const float* policy_noise;
  float discount;
  float* returns;  // [rows], the advantage form
};

void score(const PackedModel& model, const Index* pair, const Root& root, const Block& block,
           Workspace& workspace);

}  // namespace iqmpc::detail
