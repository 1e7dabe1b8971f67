// gradient *= upstream on the device: what backward has left to do where the forward pass made the gradient.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace fused_losses::cuda {

// data [count] of `dtype`, dense; upstream [1] of `dtype`. Queued on `stream`; returns what the launch returned.
cudaError_t scale(void* data, DType dtype, int64_t count, const void* upstream, cudaStream_t stream);

}  // namespace fused_losses::cuda
