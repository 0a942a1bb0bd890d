// Strict JSON (RFC 8259), for the little that a file says of itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace iqmpc::detail {

// A value, read once and then only looked at. Accessors throw std::invalid_argument, which says
// what was expected where, for a value of another kind.
class Json {
 public:
  // Throws std::invalid_argument for what is not one JSON text: of valid UTF-8, without names that
  // come twice in an object, nested 32 deep at most.
  static Json parse(std::string_view text);

  bool is_null() const noexcept { return kind_ == Kind::null; }

  bool boolean(const std::string& where) const;
  double number(const std::string& where) const;
  // A whole number from 0 to 2^53.
  std::int64_t count(const std::string& where) const;
  const std::string& text(const std::string& where) const;
  const std::vector<Json>& items(const std::string& where) const;
  const std::vector<std::pair<std::string, Json>>& members(const std::string& where) const;

  // The member of an object, or null.
  const Json* find(std::string_view name) const noexcept;
  // The member `name` of the object `where`; it must be there.
  const Json& at(std::string_view name, const std::string& where) const;

 private:
  friend class JsonParser;
  enum class Kind { null, boolean, number, text, array, object };

  void expect(Kind kind, const char* what, const std::string& where) const;

  Kind kind_ = Kind::null;
  bool boolean_ = false;
  double number_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;
};

}  // namespace iqmpc::detail
