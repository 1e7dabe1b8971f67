#include "cpu/level_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif

#define FUSED_LOSSES_VECTOR_BYTES 64
namespace fused_losses::cpu {
namespace level_avx512 {
#include "cpu/level.h"
}
const Kernels avx512{"avx512",
                     level_avx512::elementwise,
                     level_avx512::encode_labels,
                     level_avx512::find_outside_unit,
                     level_avx512::softmax_rows,
                     level_avx512::softmax_columns,
                     level_avx512::distribution_focal,
                     level_avx512::find_outside_bins,
                     level_avx512::count_targets,
                     level_avx512::pairwise,
                     level_avx512::scale,
                     level_avx512::evaluate};
}  // namespace fused_losses::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
