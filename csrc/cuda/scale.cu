// Serves gradients of any size. The factor is read on the device, so the host never waits for it; where it is 1,
// as it is whenever the loss itself is differentiated, the launch is all that this costs. Elsewhere it moves the
// gradient in once and out once, 16 bytes at a time where it is aligned.
#include "cuda/scale.h"

#include <algorithm>

#include "cuda/simt.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;  // some for every multiprocessor there is; mostly they see a 1 and end

// O: what the loss, and so the upstream gradient, is stored in.
template <class S, class O>
__global__ void __launch_bounds__(kThreads) scale_kernel(S* data, int64_t count, const O* upstream) {
  using T = typename ComputeOf<S>::T;
  constexpr int n = Pack<S>::size;
  const T factor = widen(*upstream);
  if (factor == T{1}) return;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x, step = int64_t{gridDim.x} * kThreads;
  const int64_t packs = misaligned(data) == 0 ? count / n : 0;
  for (int64_t i = first; i < packs; i += step) {
    Pack<S> pack = load_pack(data + i * n);
#pragma unroll
    for (int k = 0; k < n; ++k) pack.at[k] = Narrow<S>::from(widen(pack.at[k]) * factor);
    store_pack(data + i * n, pack);
  }
  for (int64_t i = packs * n + first; i < count; i += step) data[i] = Narrow<S>::from(widen(data[i]) * factor);
}

template <class S, class O = S>
cudaError_t launch_scale(void* data, int64_t count, const void* upstream, cudaStream_t stream) {
  const int64_t packs = count / Pack<S>::size + 1;
  const auto blocks = static_cast<unsigned>(std::min((packs + kThreads - 1) / kThreads, kMaxBlocks));
  return launch(scale_kernel<S, O>, blocks, kThreads, 1, 0, stream, static_cast<S*>(data), count,
                static_cast<const O*>(upstream));
}

}  // namespace

cudaError_t scale(void* data, DType dtype, int64_t count, const void* upstream, DType upstream_dtype,
                  cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const bool wide = upstream_dtype != dtype;
  switch (dtype) {
    case DType::f64: return launch_scale<double>(data, count, upstream, stream);
    case DType::bf16:
      return wide ? launch_scale<bf16, float>(data, count, upstream, stream)
                  : launch_scale<bf16>(data, count, upstream, stream);
    case DType::f16:
      return wide ? launch_scale<f16, float>(data, count, upstream, stream)
                  : launch_scale<f16>(data, count, upstream, stream);
    case DType::f32: break;
  }
  return launch_scale<float>(data, count, upstream, stream);
}

}  // namespace fused_losses::cuda
