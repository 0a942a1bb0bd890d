// Instruction-set levels and precisions: what the machine runs, and what a packed model uses.
#pragma once

#include <string_view>
#include <vector>

#include "iqmpc/export.hpp"

namespace iqmpc {

// In ascending order of speed. `portable` is what the compiler's baseline for the platform allows;
// avx512bf16 multiplies bf16 pairs in one instruction and equals avx512 in float32.
enum class Isa { portable, avx2, avx512, avx512bf16 };

// The operands of matrix products; everything else is float32. Where the machine has no bf16
// product, bf16 weights are widened as they are loaded and activations stay float32.
enum class Precision { float32, bf16 };

IQMPC_API const char* isa_name(Isa isa) noexcept;
IQMPC_API const char* precision_name(Precision precision) noexcept;

// The levels this build has and this machine runs, best last; never empty.
IQMPC_API std::vector<Isa> isa_levels();

// The level called `name`. `source` says in the error where the name came from ("IQMPC_ISA").
// Throws std::invalid_argument where the name is unknown or the machine does not run that level.
IQMPC_API Isa isa_from_name(std::string_view name, std::string_view source);

// The level models are packed for by default: the best one, or the one the environment variable
// IQMPC_ISA names. Reads the variable on every call; throws as isa_from_name does.
IQMPC_API Isa active_isa();

// "float32" or "bf16"; throws std::invalid_argument for another name.
IQMPC_API Precision precision_from_name(std::string_view name);

}  // namespace iqmpc
