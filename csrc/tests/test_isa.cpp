#include <cstdlib>
#include <stdexcept>

#include "check.hpp"
#include "iqmpc/isa.hpp"

using iqmpc::Isa;

int main() {
  const auto levels = iqmpc::isa_levels();
  CHECK(levels.front() == Isa::portable);

  unsetenv("IQMPC_ISA");
  CHECK(iqmpc::active_isa() == levels.back());
  setenv("IQMPC_ISA", "", 1);
  CHECK(iqmpc::active_isa() == levels.back());
  for (const Isa level : levels) {
    setenv("IQMPC_ISA", iqmpc::isa_name(level), 1);
    CHECK(iqmpc::active_isa() == level);
  }

  setenv("IQMPC_ISA", "sse9", 1);
  CHECK(message_of<std::invalid_argument>(iqmpc::active_isa) ==
        "IQMPC_ISA=sse9: unknown instruction set, expected portable, avx2, avx512 or avx512bf16");
  if (levels.back() < Isa::avx512) {
    setenv("IQMPC_ISA", "avx512", 1);
    CHECK(message_of<std::invalid_argument>(iqmpc::active_isa)
              .find("IQMPC_ISA=avx512: this machine or build does not run it, only portable") == 0);
  }
  return 0;
}
