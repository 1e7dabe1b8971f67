#include "cuda/elementwise.cuh"

namespace fused_losses::cuda {

cudaError_t elementwise_f64(const ElementwiseArgs& a, int64_t count, const ElementwiseBuffers& b, cudaStream_t stream) {
  return elementwise_as<double>(a, count, b, stream);
}

}  // namespace fused_losses::cuda
