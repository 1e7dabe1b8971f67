// The element-wise losses on a GPU: forward and backward in one pass.
#pragma once
#include <cuda_runtime_api.h>

#include "kernel_args.h"

namespace fused_losses::cuda {

// Blocks the launch will have: so many doubles are its partial sums.
int64_t elementwise_blocks(int64_t count);

// args by value, its pointers on the device. scalar_upstream: one element of the input's dtype, or nullptr.
// partial [elementwise_blocks(count)]: the blocks' sums of the values, where args.want_sum.
cudaError_t elementwise(const ElementwiseArgs& args, int64_t count, const void* scalar_upstream, double* partial,
                        cudaStream_t stream);

// loss [1] of `dtype` = (sum of partial [blocks]) * factor, added in their order.
cudaError_t finish(const double* partial, int64_t blocks, double factor, void* loss, DType dtype, cudaStream_t stream);

}  // namespace fused_losses::cuda
