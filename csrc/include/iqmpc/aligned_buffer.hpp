// Owned float storage that starts on a cache line, so that no vector load straddles two.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace iqmpc {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;

  // `size` floats, all zero.
  explicit AlignedBuffer(std::size_t size)
      : data_(new (std::align_val_t{kAlignment}) float[size]()), size_(size) {}

  float* data() noexcept { return data_.get(); }
  const float* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }

 private:
  static constexpr std::size_t kAlignment = 64;

  struct Free {
    void operator()(float* p) const noexcept {
      ::operator delete[](p, std::align_val_t{kAlignment});
    }
  };

  std::unique_ptr<float[], Free> data_;
  std::size_t size_ = 0;
};

}  // namespace iqmpc
