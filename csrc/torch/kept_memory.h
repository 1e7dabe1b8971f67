// Memory for large gradients on a CPU. New memory is cleared by the system page by page, which takes longer than the
// loss, and malloc returns every block of 32 MB and more when it is freed: a training step would pay for it each time.
// So the last few blocks are kept for the next step. The system may take what is in them whenever it wants memory
// (MADV_FREE), and release_kept_memory() gives it back at once.
#pragma once
#include "torch/tensors.h"

namespace fused_losses {

constexpr int64_t kLargeBytes = 1 << 20;  // from here on

// A new tensor in such memory, uninitialised, of `bytes` bytes in all; nothing where the system has none to give.
std::optional<Tensor> tensor_in_kept_memory(Sizes sizes, Sizes strides, int32_t dtype, int64_t bytes);

void release_kept_memory();

}  // namespace fused_losses
