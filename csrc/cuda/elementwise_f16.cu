#include "cuda/elementwise.cuh"

namespace fused_losses::cuda {

cudaError_t elementwise_f16(const ElementwiseArgs& a, int64_t count, const ElementwiseBuffers& b, cudaStream_t stream) {
  return a.value_dtype == DType::f32 ? elementwise_as<f16, float>(a, count, b, stream)
                                     : elementwise_as<f16>(a, count, b, stream);
}

}  // namespace fused_losses::cuda
