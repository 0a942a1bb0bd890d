#include "iqmpc/isa.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernel_table.hpp"
#include "cpu/learn_table.hpp"

namespace iqmpc {

namespace detail {

// Each level has its kernels in float32 and in bf16, in the order of Precision.
#define IQMPC_TABLES(level)                \
  namespace level {                        \
  extern const KernelTable tables[2];      \
  extern const LearnTable learn_tables[2]; \
  }
IQMPC_TABLES(portable)
#ifdef IQMPC_X86
IQMPC_TABLES(avx2)
IQMPC_TABLES(avx512)
IQMPC_TABLES(avx512bf16)
#endif
#undef IQMPC_TABLES

#ifdef IQMPC_X86
#define IQMPC_CHOOSE(tables)                                  \
  const auto row = static_cast<std::size_t>(precision);       \
  if (isa == Isa::avx2) return avx2::tables[row];             \
  if (isa == Isa::avx512) return avx512::tables[row];         \
  if (isa == Isa::avx512bf16) return avx512bf16::tables[row]; \
  return portable::tables[row]
#else
#define IQMPC_CHOOSE(tables) \
  (void)isa;                 \
  return portable::tables[static_cast<std::size_t>(precision)]
#endif

const KernelTable& kernel_table(Isa isa, Precision precision) noexcept { IQMPC_CHOOSE(tables); }
const LearnTable& learn_table(Isa isa, Precision precision) noexcept { IQMPC_CHOOSE(learn_tables); }
#undef IQMPC_CHOOSE

}  // namespace detail

const char* isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::portable:
      break;
  }
  return "portable";
}

const char* precision_name(Precision precision) noexcept {
  return precision == Precision::bf16 ? "bf16" : "float32";
}

std::vector<Isa> isa_levels() {
  std::vector<Isa> levels{Isa::portable};
#ifdef IQMPC_X86
  // The checks cover the operating system's support for the wider registers as well.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      levels.push_back(Isa::avx512);
      if (__builtin_cpu_supports("avx512bf16")) levels.push_back(Isa::avx512bf16);
    }
  }
#endif
  return levels;
}

Isa isa_from_name(std::string_view name, std::string_view source) {
  const std::string setting = std::string(source) + "=" + std::string(name);
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16}) {
    if (name != isa_name(isa)) continue;
    std::string running;
    for (const Isa level : isa_levels()) {
      if (level == isa) return isa;
      running += (running.empty() ? "" : ", ") + std::string(isa_name(level));
    }
    throw std::invalid_argument(setting + ": this machine or build does not run it, only " +
                                running);
  }
  throw std::invalid_argument(
      setting + ": unknown instruction set, expected portable, avx2, avx512 or avx512bf16");
}

Isa active_isa() {
  const char* forced = std::getenv("IQMPC_ISA");
  if (forced == nullptr || *forced == '\0') return isa_levels().back();
  return isa_from_name(forced, "IQMPC_ISA");
}

Precision precision_from_name(std::string_view name) {
  for (const Precision precision : {Precision::float32, Precision::bf16}) {
    if (name == precision_name(precision)) return precision;
  }
  throw std::invalid_argument("precision must be float32 or bf16, got " + std::string(name));
}

}  // namespace iqmpc
