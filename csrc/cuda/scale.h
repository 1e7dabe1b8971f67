// gradient *= upstream on the device: what backward has left to do where the forward pass made the gradient.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace fused_losses::cuda {

// data [count] of `dtype`, dense; upstream [1] of `dtype`, or f32 beside a narrower one. Queued on `stream`; returns
// what the launch returned.
cudaError_t scale(void* data, DType dtype, int64_t count, const void* upstream, DType upstream_dtype,
                  cudaStream_t stream);

}  // namespace fused_losses::cuda
