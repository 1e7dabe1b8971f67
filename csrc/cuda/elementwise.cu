// What the element-wise losses need beside their kernels, which are in elementwise.cuh: the launch's size, the labels'
// codes and their count, and the loss from the blocks' sums.
#include "cuda/elementwise.cuh"

#include <algorithm>

namespace fused_losses::cuda {
namespace {

// At most in a grid: whole waves of the two, three or four that a multiprocessor takes at a time. In a part of a wave
// the last elements would have few loads under way.
constexpr int64_t kBlocksAMultiprocessor = 12;
constexpr int64_t kElementsAThread = 8;  // at least, so that small losses have few partial sums

__global__ void __launch_bounds__(kThreads) encode_kernel(const LabelArgs a, int64_t anchors, double* counts) {
  double count = 0;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < anchors; i += step) {
    const int64_t y = a.label[i];
    if (y == a.ignore_index) {
      a.code[i] = kIgnored;
      continue;
    }
    count += 1;
    if (y == a.background || y == a.classes) {
      a.code[i] = kBackground;
    } else {
      require_target(y, a.classes);
      a.code[i] = static_cast<int32_t>(y);
    }
  }
  const double total = block_sum(count, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

constexpr int kFinishThreads = 512;

template <class S>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const ElementwiseBuffers b, double factor, S* loss) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const double denominator = denominator_of(b, scratch);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < b.blocks; i += kFinishThreads) sum += b.partial[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *loss = Narrow<S>::from(static_cast<typename ComputeOf<S>::T>(sum * factor / denominator));
}

template <class S>
cudaError_t launch_finish(const ElementwiseBuffers& b, double factor, void* loss, cudaStream_t stream) {
  return launch(finish_kernel<S>, 1, kFinishThreads, 1, kFinishThreads / kWarp * sizeof(double), stream, b, factor,
                static_cast<S*>(loss));
}

}  // namespace

int64_t elementwise_blocks(int64_t count, int multiprocessors) {
  constexpr int64_t elements = kThreads * kElementsAThread;
  return std::min((count + elements - 1) / elements, multiprocessors * kBlocksAMultiprocessor);
}
int64_t encode_blocks(int64_t anchors) {
  constexpr int64_t most = 256;  // every block of the loss adds the counts up
  return std::clamp((anchors + kThreads - 1) / kThreads, int64_t{1}, most);
}

cudaError_t encode_labels(const LabelArgs& labels, int64_t anchors, double* counts, cudaStream_t stream) {
  return launch(encode_kernel, static_cast<unsigned>(encode_blocks(anchors)), kThreads, 1,
                kThreads / kWarp * sizeof(double), stream, labels, anchors, counts);
}

cudaError_t elementwise(const ElementwiseArgs& a, int64_t count, const ElementwiseBuffers& b, cudaStream_t stream) {
  switch (a.input.dtype) {
    case DType::f64: return elementwise_f64(a, count, b, stream);
    case DType::bf16: return elementwise_bf16(a, count, b, stream);
    case DType::f16: return elementwise_f16(a, count, b, stream);
    case DType::f32: break;
  }
  return elementwise_f32(a, count, b, stream);
}

cudaError_t finish(const ElementwiseBuffers& b, double factor, void* loss, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::f64: return launch_finish<double>(b, factor, loss, stream);
    case DType::bf16: return launch_finish<bf16>(b, factor, loss, stream);
    case DType::f16: return launch_finish<f16>(b, factor, loss, stream);
    case DType::f32: break;
  }
  return launch_finish<float>(b, factor, loss, stream);
}

}  // namespace fused_losses::cuda
