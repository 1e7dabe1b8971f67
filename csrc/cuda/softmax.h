// Cross entropy and softmax focal loss on a GPU: forward and backward in one launch, and what it needs around it.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernel_args.h"

namespace fused_losses::cuda {

enum class SoftmaxKernel { lanes, staged, reread, columns };

// One line of the table in softmax.cu: which kernel serves these rows, and how it is launched.
struct SoftmaxPlan {
  SoftmaxKernel kernel;
  unsigned blocks, threads;
  unsigned lanes;         // threads a row (lanes)
  unsigned cluster;       // blocks a row (staged, reread)
  size_t shared;          // bytes a block
  unsigned count_blocks;  // of the launch that counts targets; 0: every block counts them itself
};
cudaError_t plan_softmax(const SoftmaxArgs& args, bool needs_count, int device, SoftmaxPlan* plan);

// Doubles on the device: `partial` [plan.blocks / plan.cluster] sums of the values, `counts` [plan.count_blocks] of the
// targets.
struct SoftmaxBuffers {
  const void* scalar_upstream;  // one element of args.value_dtype, or nullptr
  double* partial;              // or nullptr
  double* counts;
  unsigned count_blocks;
  bool mean;  // gradients (and the loss) are divided by the number, or the weight, of the targets not ignored
};

// args by value, its pointers on the device.
cudaError_t softmax(const SoftmaxArgs& args, const SoftmaxPlan& plan, const SoftmaxBuffers& buffers,
                    cudaStream_t stream);
// loss [1] = sum of the partial sums, divided by the denominator where buffers.mean.
cudaError_t finish_softmax(const SoftmaxArgs& args, const SoftmaxPlan& plan, const SoftmaxBuffers& buffers, void* loss,
                           cudaStream_t stream);

}  // namespace fused_losses::cuda
