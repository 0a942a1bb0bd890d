#include "iqmpc/isa.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernel_table.hpp"

namespace iqmpc {

namespace detail {

namespace portable {
extern const KernelTable table;
}
#ifdef IQMPC_X86
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

const KernelTable& kernel_table(Isa isa) noexcept {
#ifdef IQMPC_X86
  if (isa == Isa::avx2) return avx2::table;
  if (isa == Isa::avx512) return avx512::table;
#endif
  (void)isa;
  return portable::table;
}

}  // namespace detail

const char* isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::portable:
      break;
  }
  return "portable";
}

std::vector<Isa> isa_levels() {
  std::vector<Isa> levels{Isa::portable};
#ifdef IQMPC_X86
  // The checks cover the operating system's support for the wider registers as well.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f")) levels.push_back(Isa::avx512);
  }
#endif
  return levels;
}

Isa isa_from_name(std::string_view name, std::string_view source) {
  const std::string setting = std::string(source) + "=" + std::string(name);
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name != isa_name(isa)) continue;
    std::string running;
    for (const Isa level : isa_levels()) {
      if (level == isa) return isa;
      running += (running.empty() ? "" : ", ") + std::string(isa_name(level));
    }
    throw std::invalid_argument(setting + ": this machine or build does not run it, only " +
                                running);
  }
  throw std::invalid_argument(setting +
                              ": unknown instruction set, expected portable, avx2 or avx512");
}

Isa active_isa() {
  const char* forced = std::getenv("IQMPC_ISA");
  if (forced == nullptr || *forced == '\0') return isa_levels().back();
  return isa_from_name(forced, "IQMPC_ISA");
}

}  // namespace iqmpc
