#include "cuda/elementwise.cuh"

namespace fused_losses::cuda {

cudaError_t elementwise_bf16(const ElementwiseArgs& a, int64_t count, const ElementwiseBuffers& b,
                             cudaStream_t stream) {
  return a.value_dtype == DType::f32 ? elementwise_as<bf16, float>(a, count, b, stream)
                                     : elementwise_as<bf16>(a, count, b, stream);
}

}  // namespace fused_losses::cuda
