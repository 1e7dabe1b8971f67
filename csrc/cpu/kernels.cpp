#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fused_losses::cpu {

#if defined(__x86_64__)
static const Kernels* const levels[] = {&baseline, &avx2, &avx512};  // slowest first
#else
static const Kernels* const levels[] = {&baseline};
#endif

static bool runs(const Kernels& level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (&level == &avx2) return has_avx2;
  if (&level == &avx512)
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return &level == &baseline;
}

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
  for (const Kernels* level : levels)
    if (runs(*level)) found.push_back(level);
  return found;
}

static const Kernels& choose() {
  const auto found = runnable();
  const char* wanted = std::getenv("FUSED_LOSSES_CPU_LEVEL");
  if (!wanted || !*wanted) return *found.back();
  std::string names;
  for (const Kernels* level : found) {
    if (std::strcmp(wanted, level->name) == 0) return *level;
    names += (names.empty() ? "" : ", ") + std::string(level->name);
  }
  throw std::invalid_argument("FUSED_LOSSES_CPU_LEVEL is '" + std::string(wanted) + "'; this CPU runs: " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fused_losses::cpu
