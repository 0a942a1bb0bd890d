// SHA-256 (FIPS 180-4).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace iqmpc::detail {

class Sha256 {
 public:
  void add(const void* data, std::size_t size);
  // 64 hexadecimal digits; nothing may be added afterwards.
  std::string hex();

 private:
  void block(const unsigned char* data);

  std::uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                             0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char pending_[64] = {};
  std::uint64_t size_ = 0;
};

}  // namespace iqmpc::detail
