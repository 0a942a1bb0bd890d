// Owned storage that starts on a cache line, so that no vector load straddles two.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

namespace iqmpc {

template <class T>
class AlignedBuffer {
  static_assert(std::is_trivially_destructible_v<T>);

 public:
  AlignedBuffer() = default;

  // `size` elements, all zero.
  explicit AlignedBuffer(std::size_t size)
      : data_(new(std::align_val_t{kAlignment}) T[size]()), size_(size) {}

  // Room for `size` elements: the same memory, with what it holds, where there is as much already,
  // else new memory, all zero.
  void fit(std::size_t size) {
    if (size != size_) *this = AlignedBuffer(size);
  }

  T* data() noexcept { return data_.get(); }
  const T* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }

 private:
  static constexpr std::size_t kAlignment = 64;

  struct Free {
    void operator()(T* p) const noexcept { ::operator delete[](p, std::align_val_t{kAlignment}); }
  };

  std::unique_ptr<T[], Free> data_;
  std::size_t size_ = 0;
};

}  // namespace iqmpc
