// Distribution focal loss on a GPU: forward and backward in one launch.
#pragma once
#include <cuda_runtime_api.h>

#include "kernel_args.h"

namespace fused_losses::cuda {

// Blocks the launch will have: so many doubles are its partial sums.
int64_t distribution_focal_blocks(const DistributionArgs& args);

// On the device; nullptr: absent.
struct DistributionBuffers {
  const void* scalar_upstream;  // one element of args.rows.value_dtype
  double* partial;              // [blocks] the blocks' sums of the values
  const double* avg_factor;     // one element: the mean divides by it, at least by 1
};

// args by value, its pointers on the device.
cudaError_t distribution_focal(const DistributionArgs& args, const DistributionBuffers& buffers, cudaStream_t stream);
// loss [1] = (sum of partial [blocks], in their order) * factor, divided as the gradient is.
cudaError_t finish_distribution_focal(const DistributionArgs& args, const DistributionBuffers& buffers, int64_t blocks,
                                      double factor, void* loss, cudaStream_t stream);

}  // namespace fused_losses::cuda
