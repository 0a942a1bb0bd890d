// The products of a tile: y [kRows, padded] = init + x W^T, over some of a layer's inputs.
//
// A Block is a thread block, or the tests' emulation of one. Its methods are phases: each spreads
// its work over the block's threads and ends in a barrier, so that no phase sees another's
// half-done work. Within a phase no thread may read what another writes, but for the lanes of a
// warp, which may after `each`.
#pragma once

#include <type_traits>

#include "cuda/fragments.hpp"
#include "cuda/math.hpp"

namespace iqmpc::gpu {

struct Sums {
  float x[4];  // as in c_place
};

// kTiles tiles of 16 outputs for each warp at a time, the inputs 16 by 16: weights come straight
// from global memory (the second-level cache) into the registers of the lane that multiplies them,
// kStages steps ahead; activations come from shared memory.
template <int kRows, int kTiles, class Block>
IQMPC_DEVICE inline void product_of_fragments(Block block, const Fragment* weights, int inputs,
                                              int padded, int first, int count, const Bf16* x,
                                              int ldx, const float* init, int ld_init, float* y,
                                              int ldy) {
  constexpr int kStrips = kRows / 16;
  constexpr int kStages = 3;
  const int tiles = padded / 16, steps = count / 16;
  block.warps([&](auto warp) {
    using Warp = decltype(warp);
    using LaneSums = typename Warp::template Lanes<Sums>;
    using LaneFragment = typename Warp::template Lanes<Fragment>;
    for (int group = warp.index(); group * kTiles < tiles; group += Block::kWarps) {
      LaneSums sums[kStrips][kTiles][2];
      LaneFragment staged[kStages][kTiles];
      // The last group may be short: it computes the last tile again and does not store it.
      const auto tile = [&](int n) {
        const int index = group * kTiles + n;
        return index < tiles ? index : tiles - 1;
      };
      const auto fetch = [&](int stage, int step) {
        warp.lanes([&](int lane) {
          IQMPC_UNROLL
          for (int n = 0; n < kTiles; ++n) {
            const int at = (tile(n) * (inputs / 16) + first / 16 + step) * kLanes + lane;
            staged[stage][n][lane] = load_weights<Fragment>(weights + at);
          }
        });
      };

      IQMPC_UNROLL
      for (int stage = 0; stage < kStages; ++stage) {
        if (stage < steps) fetch(stage, stage);
      }
      warp.lanes([&](int lane) {
        IQMPC_UNROLL
        for (int s = 0; s < kStrips; ++s) {
          IQMPC_UNROLL
          for (int n = 0; n < kTiles; ++n) {
            IQMPC_UNROLL
            for (int i = 0; i < 8; i += 2) {
              const Place place = c_place(lane, i % 4);
              const int row = s * 16 + place.row, column = tile(n) * 16 + i / 4 * 8 + place.column;
              Pair pair{};
              // Not of a tile that another warp may be storing: init may be y.
              if (group * kTiles + n < tiles) {
                pair = load_as<Pair>(init + row * ld_init + column);
              }
              sums[s][n][i / 4][lane].x[i % 4] = pair.x[0];
              sums[s][n][i / 4][lane].x[i % 4 + 1] = pair.x[1];
            }
          }
        }
      });
      for (int step = 0; step < steps; step += kStages) {
        IQMPC_UNROLL
        for (int stage = 0; stage < kStages; ++stage) {
          if (step + stage < steps) {
            LaneFragment inputs_of[kStrips];
            warp.lanes([&](int lane) {
              IQMPC_UNROLL
              for (int s = 0; s < kStrips; ++s) {
                IQMPC_UNROLL
                for (int reg = 0; reg < 4; ++reg) {
                  const Place place = a_place(lane, reg);
                  inputs_of[s][lane].x[reg] = load_as<std::uint32_t>(
                      x + (s * 16 + place.row) * ldx + (step + stage) * 16 + place.column);
                }
              }
            });
            IQMPC_UNROLL
            for (int n = 0; n < kTiles; ++n) {
              IQMPC_UNROLL
              for (int s = 0; s < kStrips; ++s) {
                warp.multiply_add(sums[s][n][0], inputs_of[s], staged[stage][n], 0);
                warp.multiply_add(sums[s][n][1], inputs_of[s], staged[stage][n], 1);
              }
            }
            if (step + stage + kStages < steps) fetch(stage, step + stage + kStages);
          }
        }
      }
      warp.lanes([&](int lane) {
        IQMPC_UNROLL
        for (int s = 0; s < kStrips; ++s) {
          IQMPC_UNROLL
          for (int n = 0; n < kTiles; ++n) {
            if (group * kTiles + n < tiles) {
              IQMPC_UNROLL
              for (int i = 0; i < 8; i += 2) {
                const Place place = c_place(lane, i % 4);
                const int row = s * 16 + place.row;
                const int column = tile(n) * 16 + i / 4 * 8 + place.column;
                const Sums& sum = sums[s][n][i / 4][lane];
                store_as<Pair>(y + row * ldy + column, {{sum.x[i % 4], sum.x[i % 4 + 1]}});
              }
            }
          }
        }
      });
    }
  });
}

// Of the layer's `inputs`, [first, first + count), both multiples of 16, which x [kRows, count]
// holds. `init` [kRows, padded] may be y; ld_init = 0 repeats one row.
template <int kRows, class Block>
IQMPC_DEVICE IQMPC_NOINLINE void product(Block block, const void* weights, int inputs, int padded,
                                         int first, int count, const Bf16* x, int ldx,
                                         const float* init, int ld_init, float* y, int ldy) {
  const auto* fragments = static_cast<const Fragment*>(weights);
  // As many tiles at a time as there are for each warp, so that narrow layers keep all busy.
  const int each = (padded / 16 + Block::kWarps - 1) / Block::kWarps;
  const auto run = [&](auto tiles) {
    product_of_fragments<kRows, decltype(tiles)::value>(block, fragments, inputs, padded, first,
                                                        count, x, ldx, init, ld_init, y, ldy);
  };
  if (each >= 4) {
    run(std::integral_constant<int, 4>{});
  } else if (each == 3) {
    run(std::integral_constant<int, 3>{});
  } else if (each == 2) {
    run(std::integral_constant<int, 2>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

// In float32 a thread takes 8 rows of 4 outputs, the inputs 4 by 4.
template <int kRows, class Block>
IQMPC_DEVICE IQMPC_NOINLINE void product(Block block, const void* weights, int, int padded,
                                         int first, int count, const float* x, int ldx,
                                         const float* init, int ld_init, float* y, int ldy) {
  const int columns = padded / 4;
  const float* start =
      static_cast<const float*>(weights) + static_cast<std::int64_t>(first) * padded;
  block.each(columns * (kRows / 8), [&](int item) {
    const int column = item % columns * 4, row = item / columns * 8;
    Quad sums[8];
    IQMPC_UNROLL
    for (int r = 0; r < 8; ++r) sums[r] = load_as<Quad>(init + (row + r) * ld_init + column);
    for (int k = 0; k < count; k += 4) {
      Quad weight[4];
      IQMPC_UNROLL
      for (int i = 0; i < 4; ++i) {
        weight[i] = load_weights<Quad>(start + static_cast<std::int64_t>(k + i) * padded + column);
      }
      IQMPC_UNROLL
      for (int r = 0; r < 8; ++r) {
        const Quad input = load_as<Quad>(x + (row + r) * ldx + k);
        IQMPC_UNROLL
        for (int i = 0; i < 4; ++i) {
          IQMPC_UNROLL
          for (int c = 0; c < 4; ++c) sums[r].x[c] += input.x[i] * weight[i].x[c];
        }
      }
    }
    IQMPC_UNROLL
    for (int r = 0; r < 8; ++r) store_as<Quad>(y + (row + r) * ldy + column, sums[r]);
  });
}

}  // namespace iqmpc::gpu
