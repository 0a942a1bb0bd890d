// Instruction-set levels: which the machine runs, and which one a packed layer uses.
#pragma once

#include <string_view>
#include <vector>

namespace iqmpc {

// In ascending order of speed. `portable` is what the compiler's baseline for the platform allows.
enum class Isa { portable, avx2, avx512 };

const char* isa_name(Isa isa) noexcept;

// The levels this build has and this machine runs, best last; never empty.
std::vector<Isa> isa_levels();

// The level called `name`. `source` says in the error where the name came from ("IQMPC_ISA").
// Throws std::invalid_argument where the name is unknown or the machine does not run that level.
Isa isa_from_name(std::string_view name, std::string_view source);

// The level layers are packed for by default: the best one, or the one the environment variable
// IQMPC_ISA names. Reads the variable on every call; throws as isa_from_name does.
Isa active_isa();

}  // namespace iqmpc
