// The (G, A) classification cost of an assigner on a GPU.
#pragma once
#include <cuda_runtime_api.h>

#include "kernel_args.h"

namespace fused_losses::cuda {

// args by value, its pointers on the device. Queued on `stream`; returns what the launch returned.
cudaError_t pairwise(const PairwiseArgs& args, cudaStream_t stream);

}  // namespace fused_losses::cuda
