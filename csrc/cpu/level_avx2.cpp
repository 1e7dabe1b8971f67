#include "cpu/level_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define FUSED_LOSSES_VECTOR_BYTES 32
namespace fused_losses::cpu {
namespace level_avx2 {
#include "cpu/level.h"
}
const Kernels avx2{"avx2",
                   level_avx2::elementwise,
                   level_avx2::encode_labels,
                   level_avx2::find_outside_unit,
                   level_avx2::softmax_rows,
                   level_avx2::softmax_columns,
                   level_avx2::distribution_focal,
                   level_avx2::find_outside_bins,
                   level_avx2::count_targets,
                   level_avx2::pairwise,
                   level_avx2::scale,
                   level_avx2::evaluate};
}  // namespace fused_losses::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
