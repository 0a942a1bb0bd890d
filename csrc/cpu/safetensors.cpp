#include "cpu/safetensors.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "cpu/json.hpp"

namespace iqmpc::detail {

namespace {

constexpr std::size_t kLargestHeader = std::size_t{1} << 22, kLength = 8;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

// A tensor's place in the data, in bytes.
struct Place {
  std::size_t begin, end;
  std::string name;
};

Place place_of(const std::string& name, const Json& described, std::size_t available,
               std::vector<std::ptrdiff_t>& shape) {
  const std::string where = "tensor \"" + name + "\"";
  for (const auto& member : described.members(where)) {
    if (member.first != "dtype" && member.first != "shape" && member.first != "data_offsets") {
      refuse(where + " has \"" + member.first + "\", which tensors have not");
    }
  }
  const std::string& type = described.at("dtype", where).text(where + "'s dtype");
  if (type != "F32") refuse(where + " must be F32, got " + type);

  std::size_t bytes = sizeof(float);
  for (const Json& side : described.at("shape", where).items(where + "'s shape")) {
    const std::int64_t length = side.count(where + "'s shape");
    // Before it is multiplied: a product that is too large may not look so afterwards.
    if (length < 1 || static_cast<std::uint64_t>(length) > available / bytes) {
      refuse(where + "'s shape needs more than the " + std::to_string(available) +
             " bytes of data, or has a side of 0");
    }
    bytes *= static_cast<std::size_t>(length);
    shape.push_back(static_cast<std::ptrdiff_t>(length));
  }
  const auto& offsets = described.at("data_offsets", where).items(where + "'s data_offsets");
  if (offsets.size() != 2) refuse(where + "'s data_offsets must be two numbers");
  const auto begin = static_cast<std::uint64_t>(offsets[0].count(where + "'s data_offsets"));
  const auto end = static_cast<std::uint64_t>(offsets[1].count(where + "'s data_offsets"));
  if (begin > end || end > available) {
    refuse(where + " must lie in the " + std::to_string(available) + " bytes of data, got [" +
           std::to_string(begin) + ", " + std::to_string(end) + ")");
  }
  if (end - begin != bytes) {
    refuse(where + " takes " + std::to_string(bytes) + " bytes, its data_offsets are " +
           std::to_string(end - begin) + " apart");
  }
  if (begin % sizeof(float) != 0) refuse(where + " does not start at a multiple of 4 bytes");
  return {static_cast<std::size_t>(begin), static_cast<std::size_t>(end), name};
}

// The data is covered from one end to the other, every byte once.
void check_covered(std::vector<Place> places, std::size_t size) {
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.begin < b.begin; });
  std::size_t at = 0;
  for (const Place& place : places) {
    if (place.begin < at) refuse("tensor \"" + place.name + "\" overlaps the one before it");
    if (place.begin > at) refuse("there are unused bytes before tensor \"" + place.name + "\"");
    at = place.end;
  }
  if (at != size) refuse("there are unused bytes behind the last tensor");
}

}  // namespace

Safetensors read_safetensors(const unsigned char* bytes, std::size_t size) {
  if (size < kLength) refuse("it is too short");
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < kLength; ++i) length |= std::uint64_t{bytes[i]} << (8 * i);
  if (length > kLargestHeader || length > size - kLength) {
    refuse("its header claims " + std::to_string(length) + " bytes of " +
           std::to_string(size - kLength) + " (at most " + std::to_string(kLargestHeader) + ")");
  }
  const auto header_size = static_cast<std::size_t>(length);
  const std::string_view text(reinterpret_cast<const char*>(bytes + kLength), header_size);
  if (text.empty() || text.front() != '{') refuse("its header does not start with '{'");
  const Json header = Json::parse(text);
  const std::size_t available = size - kLength - header_size;

  Safetensors file;
  std::vector<Place> places;
  for (const auto& [name, described] : header.members("the header")) {
    if (name == "__metadata__") {
      for (const auto& [key, value] : described.members("the metadata")) {
        file.metadata[key] = value.text("the metadata's \"" + key + "\"");
      }
      continue;
    }
    std::vector<std::ptrdiff_t> shape;
    places.push_back(place_of(name, described, available, shape));
    file.tensors[name].shape = std::move(shape);
  }
  check_covered(places, available);
  file.memory = AlignedBuffer<float>(available / sizeof(float));
  if (available > 0) std::memcpy(file.memory.data(), bytes + kLength + header_size, available);
  for (const Place& place : places) {
    file.tensors[place.name].data = file.memory.data() + place.begin / sizeof(float);
  }
  return file;
}

}  // namespace iqmpc::detail
