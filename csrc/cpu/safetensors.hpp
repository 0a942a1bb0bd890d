// A reader of safetensors files that hold an agent: tensors of float32, and text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "iqmpc/aligned_buffer.hpp"

namespace iqmpc::detail {

struct Tensor {
  const float* data;
  std::vector<std::ptrdiff_t> shape;
};

struct Safetensors {
  AlignedBuffer<float> memory;  // what the tensors' data lies in
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Throws std::invalid_argument for bytes that are no such file: a header that is cut short, larger
// than 4 MiB or no JSON, tensors of another type, of sizes that do not fit, that overlap, leave
// bytes unused or are not aligned to their values, and names that come twice.
Safetensors read_safetensors(const unsigned char* bytes, std::size_t size);

}  // namespace iqmpc::detail
