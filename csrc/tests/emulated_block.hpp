// A thread block of the CUDA kernels, run by one thread of the host: the same kernel bodies on
// machines without a GPU, also under the sanitizers.
//
// Work that a phase spreads over threads comes in ascending or in descending order: kernels whose
// results depend on it have a race. Shared memory starts as NaNs, and is as large as a launch would
// ask for.
#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/product.hpp"

class EmulatedWarp {
 public:
  template <class T>
  using Lanes = std::array<T, iqmpc::gpu::kLanes>;

  EmulatedWarp(int index, bool descending) : index_(index), descending_(descending) {}

  int index() const { return index_; }

  template <class F>
  void lanes(F&& f) const {
    for (int i = 0; i < iqmpc::gpu::kLanes; ++i) {
      f(descending_ ? iqmpc::gpu::kLanes - 1 - i : i);
    }
  }

  template <class F>
  void each(int n, F&& f) const {
    for (int i = 0; i < n; ++i) f(descending_ ? n - 1 - i : i);
  }

  // In the device's order of additions.
  template <class F>
  float sum(int n, F&& f) const {
    Lanes<float> totals{};
    for (int i = 0; i < n; ++i) totals[i % iqmpc::gpu::kLanes] += f(i);
    for (int distance = iqmpc::gpu::kLanes / 2; distance > 0; distance /= 2) {
      const Lanes<float> before = totals;
      for (int i = 0; i < iqmpc::gpu::kLanes; ++i) totals[i] = before[i] + before[i ^ distance];
    }
    return totals[0];
  }

  void multiply_add(Lanes<iqmpc::gpu::Sums>& sums, const Lanes<iqmpc::gpu::Fragment>& inputs,
                    const Lanes<iqmpc::gpu::Fragment>& weights, int half) const {
    using namespace iqmpc::gpu;
    const auto element = [](std::uint32_t bits, int i) {
      return from_bf16({static_cast<std::uint16_t>(bits >> 16 * i)});
    };
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 2; ++i) {
        for (int reg = 0; reg < 4; ++reg) {
          const Place place = a_place(lane, reg);
          a[place.row][place.column + i] = element(inputs[lane].x[reg], i);
        }
        for (int reg = 0; reg < 2; ++reg) {
          const Place place = b_place(lane, reg);
          b[place.row + i][place.column] = element(weights[lane].x[2 * half + reg], i);
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Place place = c_place(lane, i);
        for (int k = 0; k < 16; ++k) {
          sums[lane].x[i] += a[place.row][k] * b[k][place.column];
        }
      }
    }
  }

 private:
  int index_;
  bool descending_;
};

class EmulatedBlock {
 public:
  static constexpr int kWarps = 8;

  EmulatedBlock(std::size_t shared_bytes, bool descending)
      : memory_(std::make_shared<std::vector<iqmpc::gpu::Quad>>((shared_bytes + 15) / 16)),
        descending_(descending) {
    std::memset(memory_->data(), 0xff, memory_->size() * sizeof(iqmpc::gpu::Quad));
  }

  unsigned char* shared() const { return reinterpret_cast<unsigned char*>(memory_->data()); }

  template <class F>
  void each(int n, F&& f) const {
    for (int i = 0; i < n; ++i) f(descending_ ? n - 1 - i : i);
  }

  template <class F>
  void rows(int n, F&& f) const {
    each(n, [&](int row) { f(row, EmulatedWarp(row % kWarps, descending_)); });
  }

  template <class F>
  void warps(F&& f) const {
    each(kWarps, [&](int warp) { f(EmulatedWarp(warp, descending_)); });
  }

 private:
  std::shared_ptr<std::vector<iqmpc::gpu::Quad>> memory_;
  bool descending_;
};
