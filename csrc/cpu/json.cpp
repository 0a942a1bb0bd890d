#include "cpu/json.hpp"

#include <algorithm>
#include <cmath>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace iqmpc::detail {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

bool digit(char c) { return c >= '0' && c <= '9'; }

// Whether the text is UTF-8 without overlong forms, surrogates and what lies beyond U+10FFFF.
bool valid_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto byte = [&](std::size_t k) {
      return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0u;
    };
    const unsigned lead = byte(0);
    std::size_t more = 0;
    std::uint32_t code = lead, least = 0;
    if (lead >= 0xf0 && lead <= 0xf4) {
      more = 3, code = lead & 0x07, least = 0x10000;
    } else if (lead >= 0xe0 && lead < 0xf0) {
      more = 2, code = lead & 0x0f, least = 0x800;
    } else if (lead >= 0xc2 && lead < 0xe0) {
      more = 1, code = lead & 0x1f, least = 0x80;
    } else if (lead >= 0x80) {
      return false;
    }
    for (std::size_t k = 1; k <= more; ++k) {
      if ((byte(k) & 0xc0) != 0x80) return false;
      code = code << 6 | (byte(k) & 0x3f);
    }
    if (code < least || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    i += more + 1;
  }
  return true;
}

void append_utf8(std::uint32_t code, std::string& out) {
  const auto put = [&](std::uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | code >> 6), put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12), put(0x80 | (code >> 6 & 0x3f)), put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 0x3f));
    put(0x80 | (code >> 6 & 0x3f)), put(0x80 | (code & 0x3f));
  }
}

}  // namespace

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json whole() {
    if (!valid_utf8(text_)) refuse("the JSON text is not UTF-8");
    Json value = this->value(0);
    space();
    if (at_ != text_.size()) fail("more text behind the value");
    return value;
  }

 private:
  static constexpr int kDeepest = 32;

  [[noreturn]] void fail(const std::string& what) const {
    refuse("JSON at byte " + std::to_string(at_) + ": " + what);
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void space() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != text_.npos) ++at_;
  }
  void take(char c) {
    if (peek() != c) fail(std::string("expected '") + c + "'");
    ++at_;
  }
  bool took(char c) {
    space();
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  Json value(int depth) {
    if (depth > kDeepest) fail("nested too deep");
    space();
    Json value;
    switch (peek()) {
      case '{':
        object(depth, value);
        break;
      case '[':
        array(depth, value);
        break;
      case '"':
        value.kind_ = Json::Kind::text;
        value.text_ = string();
        break;
      case 't':
      case 'f':
        value.kind_ = Json::Kind::boolean;
        value.boolean_ = peek() == 't';
        word(value.boolean_ ? "true" : "false");
        break;
      case 'n':
        word("null");
        break;
      default:
        value.kind_ = Json::Kind::number;
        value.number_ = number();
    }
    return value;
  }

  void word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) fail("expected a value");
    at_ += word.size();
  }

  void object(int depth, Json& value) {
    value.kind_ = Json::Kind::object;
    take('{');
    if (took('}')) return;
    do {
      space();
      std::string name = string();
      space();
      take(':');
      value.members_.emplace_back(std::move(name), this->value(depth + 1));
    } while (took(','));
    space();
    take('}');
    unique(value);
  }

  void unique(const Json& value) const {
    std::vector<std::string_view> names;
    for (const auto& member : value.members_) names.push_back(member.first);
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end()) fail("the name \"" + std::string(*twice) + "\" comes twice");
  }

  void array(int depth, Json& value) {
    value.kind_ = Json::Kind::array;
    take('[');
    if (took(']')) return;
    do {
      value.items_.push_back(this->value(depth + 1));
    } while (took(','));
    space();
    take(']');
  }

  std::string string() {
    take('"');
    std::string out;
    while (true) {
      const char c = peek();
      if (at_ >= text_.size()) fail("a string without end");
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      ++at_;
      if (c == '"') return out;
      if (c == '\\') {
        escape(out);
      } else {
        out.push_back(c);
      }
    }
  }

  void escape(std::string& out) {
    const char c = peek();
    ++at_;
    constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    if (const std::size_t i = c == '\0' ? kFrom.npos : kFrom.find(c); i != kFrom.npos) {
      out.push_back(kTo[i]);
      return;
    }
    if (c != 'u') fail("an escape that JSON does not have");
    std::uint32_t code = hex4();
    if (code >= 0xdc00 && code < 0xe000) fail("half a surrogate pair");
    if (code >= 0xd800 && code < 0xdc00) {
      take('\\');
      take('u');
      const std::uint32_t low = hex4();
      if (low < 0xdc00 || low >= 0xe000) fail("half a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    append_utf8(code, out);
  }

  std::uint32_t hex4() {
    std::uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const int value = digit(c)               ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (value < 0) fail("expected four hexadecimal digits");
      code = code << 4 | static_cast<std::uint32_t>(value);
    }
    return code;
  }

  double number() {
    const std::size_t from = at_;
    const auto digits = [&] {
      if (!digit(peek())) fail("expected a value");
      while (digit(peek())) ++at_;
    };
    if (peek() == '-') ++at_;
    if (peek() == '0') {
      ++at_;
    } else {
      digits();
    }
    if (peek() == '.') {
      ++at_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    // A stream, since strtod reads as the program's locale writes numbers.
    std::istringstream stream(std::string(text_.substr(from, at_ - from)));
    stream.imbue(std::locale::classic());
    double value = 0;
    stream >> value;
    if (stream.fail() || !std::isfinite(value)) fail("a number beyond those of 64 bits");
    return value;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).whole(); }

void Json::expect(Kind kind, const char* what, const std::string& where) const {
  if (kind_ != kind) refuse(where + " must be " + what);
}

bool Json::boolean(const std::string& where) const {
  expect(Kind::boolean, "true or false", where);
  return boolean_;
}

double Json::number(const std::string& where) const {
  expect(Kind::number, "a number", where);
  return number_;
}

std::int64_t Json::count(const std::string& where) const {
  const double value = number(where);
  if (!(value >= 0 && value <= 0x1p53) || value != std::floor(value)) {
    refuse(where + " must be a whole number from 0 on");
  }
  return static_cast<std::int64_t>(value);
}

const std::string& Json::text(const std::string& where) const {
  expect(Kind::text, "a string", where);
  return text_;
}

const std::vector<Json>& Json::items(const std::string& where) const {
  expect(Kind::array, "an array", where);
  return items_;
}

const std::vector<std::pair<std::string, Json>>& Json::members(const std::string& where) const {
  expect(Kind::object, "an object", where);
  return members_;
}

const Json* Json::find(std::string_view name) const noexcept {
  for (const auto& member : members_) {
    if (member.first == name) return &member.second;
  }
  return nullptr;
}

const Json& Json::at(std::string_view name, const std::string& where) const {
  expect(Kind::object, "an object", where);
  const Json* found = find(name);
  if (found == nullptr) refuse(where + " has no \"" + std::string(name) + "\"");
  return *found;
}

}  // namespace iqmpc::detail
