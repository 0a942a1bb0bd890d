// Which element of a matrix each lane of a warp holds for mma.sync.m16n8k16 in bf16: C [16, 8] +=
// A [16, 16] B [16, 8] (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type").
#pragma once

#include "cuda/portable.hpp"

namespace iqmpc::gpu {

struct Place {
  int row, column;
};

// A's register 0..3 holds columns `column` and `column + 1`, the first in the low half.
IQMPC_BOTH constexpr Place a_place(int lane, int reg) {
  return {lane / 4 + reg % 2 * 8, lane % 4 * 2 + reg / 2 * 8};
}

// B's register 0..1 holds rows `row` and `row + 1`, the first in the low half.
IQMPC_BOTH constexpr Place b_place(int lane, int reg) { return {lane % 4 * 2 + reg * 8, lane / 4}; }

// C's element 0..3.
IQMPC_BOTH constexpr Place c_place(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

// Weights are packed as B for two such products side by side, 16 inputs (rows) by 16 outputs
// (columns): registers 0 and 1 for the first 8 outputs, 2 and 3 for the others.
IQMPC_BOTH constexpr Place weight_place(int lane, int reg) {
  return {b_place(lane, reg % 2).row, b_place(lane, reg % 2).column + reg / 2 * 8};
}

}  // namespace iqmpc::gpu
