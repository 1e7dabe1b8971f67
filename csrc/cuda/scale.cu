// Serves gradients of any size. The factor is read on the device, so the host never waits for it; where it is 1,
// as it is whenever the loss itself is differentiated, the launch is all that this costs. Elsewhere it moves the
// gradient in once and out once. One grid-stride loop: consecutive threads touch consecutive elements.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/scale.h"

namespace fused_losses::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048;  // a few for every multiprocessor there is

template <class S>
struct ComputeOf {
  using T = float;
};
template <>
struct ComputeOf<double> {
  using T = double;
};

template <class S>
__global__ void __launch_bounds__(kThreads) scale_kernel(S* data, int64_t count, const S* upstream) {
  using T = typename ComputeOf<S>::T;
  const T factor = static_cast<T>(*upstream);
  if (factor == T{1}) return;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step)
    data[i] = static_cast<S>(static_cast<T>(data[i]) * factor);
}

template <class S>
cudaError_t launch(void* data, int64_t count, const void* upstream, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min((count + kThreads - 1) / kThreads, kMaxBlocks));
  scale_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<S*>(data), count, static_cast<const S*>(upstream));
  return cudaGetLastError();
}

}  // namespace

cudaError_t scale(void* data, DType dtype, int64_t count, const void* upstream, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  switch (dtype) {
    case DType::f64: return launch<double>(data, count, upstream, stream);
    case DType::bf16: return launch<__nv_bfloat16>(data, count, upstream, stream);
    case DType::f16: return launch<__half>(data, count, upstream, stream);
    case DType::f32: break;
  }
  return launch<float>(data, count, upstream, stream);
}

}  // namespace fused_losses::cuda
