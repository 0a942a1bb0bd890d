// Where a thread block keeps its rows in shared memory.
#pragma once

#include "cuda/math.hpp"
#include "cuda/packed_model.hpp"

namespace iqmpc::gpu {

// Offsets in bytes, distances between rows (ld) in elements. An operand is bf16 or float.
struct TileLayout {
  int ld_pre;     // pre, part
  int ld_hidden;  // hidden
  int ld_z;
  int ld_action;     // action, policy_action
  std::size_t pre;   // float [rows, widest]: pre-activations
  std::size_t part;  // float [rows, widest]: z's part of a critic's first layer
  std::size_t hidden, z, action, policy_action;  // operands [rows, inputs]
  std::size_t q;                                 // float [4, rows]: Q_0, Q_1 at a_t, then at ã_t
  std::size_t total;                             // float [rows]
  std::size_t bytes;
};

// Lanes of a warp read 8 rows of a bf16 fragment at once, 4 bytes each from 4 neighbours: rows that
// lie 4 banks of 4 bytes apart keep them on different banks. Likewise 8 banks for pairs of floats.
template <class Operand>
IQMPC_BOTH constexpr int operand_ld(int inputs) {
  return sizeof(Operand) < sizeof(float) ? round_up(inputs, 64) + 8 : round_up(inputs, 4) + 4;
}

template <class Operand>
IQMPC_BOTH inline TileLayout tile_layout(const ModelData& m, int rows) {
  TileLayout l{};
  const int latents = round_up(m.latent_dim, kSide), actions = round_up(m.action_dim, kSide);
  l.ld_pre = round_up(m.widest, 32) + 8;
  l.ld_hidden = operand_ld<Operand>(m.widest_input);
  l.ld_z = operand_ld<Operand>(latents);
  l.ld_action = operand_ld<Operand>(actions);
  std::size_t end = 0;
  const auto take = [&](int columns, std::size_t element) {
    const std::size_t start = end;
    // Every buffer starts on 16 bytes: element sizes and row distances see to it, given even rows.
    end += static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns) * element;
    return start;
  };
  l.pre = take(l.ld_pre, sizeof(float));
  l.part = take(l.ld_pre, sizeof(float));
  l.hidden = take(l.ld_hidden, sizeof(Operand));
  l.z = take(l.ld_z, sizeof(Operand));
  l.action = take(l.ld_action, sizeof(Operand));
  l.policy_action = take(l.ld_action, sizeof(Operand));
  l.q = take(4, sizeof(float));
  l.total = take(1, sizeof(float));
  l.bytes = end;
  return l;
}

}  // namespace iqmpc::gpu
