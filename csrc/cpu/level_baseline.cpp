// What every CPU of the architecture runs: SSE2 on x86-64, NEON on arm64.
#include "cpu/level_headers.h"

#define FUSED_LOSSES_VECTOR_BYTES 16
namespace fused_losses::cpu {
namespace level_baseline {
#include "cpu/level.h"
}
const Kernels baseline{"baseline",
                       level_baseline::elementwise,
                       level_baseline::encode_labels,
                       level_baseline::find_outside_unit,
                       level_baseline::softmax_rows,
                       level_baseline::softmax_columns,
                       level_baseline::distribution_focal,
                       level_baseline::find_outside_bins,
                       level_baseline::count_targets,
                       level_baseline::pairwise,
                       level_baseline::scale,
                       level_baseline::evaluate};
}  // namespace fused_losses::cpu
