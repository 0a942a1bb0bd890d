// Counts every allocation of the process, whichever thread makes it. For the one source file of a
// test program: the allocation functions are replaced here.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IQMPC_SANITIZED
#endif

namespace {
std::atomic<long> allocations{0};
}

// Not inlined: GCC would see malloc meet delete, or new meet free, and warn.
#define IQMPC_NOINLINE __attribute__((noinline))

IQMPC_NOINLINE void* operator new(std::size_t size) {
  ++allocations;
  if (void* p = std::malloc(size ? size : 1)) return p;
  throw std::bad_alloc();
}
IQMPC_NOINLINE void* operator new(std::size_t size, std::align_val_t alignment) {
  ++allocations;
  const auto to = static_cast<std::size_t>(alignment);
  if (void* p = std::aligned_alloc(to, (size + to - 1) / to * to)) return p;
  throw std::bad_alloc();
}
IQMPC_NOINLINE void operator delete(void* p) noexcept { std::free(p); }
IQMPC_NOINLINE void operator delete(void* p, std::size_t) noexcept { std::free(p); }
IQMPC_NOINLINE void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
IQMPC_NOINLINE void operator delete(void* p, std::size_t, std::align_val_t) noexcept {
  std::free(p);
}

#if defined(__GLIBC__) && !defined(IQMPC_SANITIZED)
// C's allocator too, which the sanitizers need for themselves.
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* malloc(std::size_t size) {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* p, std::size_t size) {
  ++allocations;
  return __libc_realloc(p, size);
}
}
#endif
