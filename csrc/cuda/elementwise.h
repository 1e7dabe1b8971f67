// The element-wise losses on a GPU: forward and backward in one pass.
#pragma once
#include <cuda_runtime_api.h>

#include "kernel_args.h"

namespace fused_losses::cuda {

// The blocks of a launch for `count` elements.
int64_t elementwise_blocks(int64_t count, int multiprocessors);
// Blocks of encode_labels: so many doubles are its counts.
int64_t encode_blocks(int64_t anchors);

// On the device; nullptr: absent.
struct ElementwiseBuffers {
  const void* scalar_upstream;  // one element of args.value_dtype
  int64_t blocks;               // of the launch, or 0 without elements
  double* partial;              // [blocks] their sums of the values
  const double* avg_factor;     // one element: the mean divides by it, at least by 1, ...
  double* counts;               // [count_blocks] ... or by the anchors not ignored,
  int64_t count_blocks;
  double classes;               // times the classes; without either by nothing here
};

// code [anchors] from label [anchors], and how many are not ignored, by blocks, in counts.
cudaError_t encode_labels(const LabelArgs& labels, int64_t anchors, double* counts, cudaStream_t stream);

// args by value, its pointers on the device.
cudaError_t elementwise(const ElementwiseArgs& args, int64_t count, const ElementwiseBuffers& buffers,
                        cudaStream_t stream);
// The same where the input is stored so.
using ElementwiseOfDType = cudaError_t(const ElementwiseArgs&, int64_t, const ElementwiseBuffers&, cudaStream_t);
ElementwiseOfDType elementwise_f32, elementwise_f64, elementwise_bf16, elementwise_f16;

// loss [1] of `dtype` = (sum of partial, in the blocks' order) * factor, divided as the gradient is.
cudaError_t finish(const ElementwiseBuffers& buffers, double factor, void* loss, DType dtype, cudaStream_t stream);

}  // namespace fused_losses::cuda
