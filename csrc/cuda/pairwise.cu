// One launch for any A, C and G (see math/pairwise.h). A block takes 32 anchors at a time:
//   its warps add up the classes, each of some of the anchors, a lane every 32nd class;
//   then a warp takes a ground truth and a lane an anchor, so the cost is written 128 bytes at a time.
// Bytes: the logits in once and the cost out once. A pair's own logit is read again, from L1 or L2, and its z computed
// again: that is less than keeping z would take.
#include "cuda/pairwise.h"

#include <algorithm>

#include "cuda/formulas.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 4096;

template <class Pair, class S>
struct Anchor {
  using T = typename ComputeOf<S>::T;
  const S* logits;
  Objectness<T> objectness;
  __device__ __forceinline__ Anchor(const PairwiseArgs& a, int64_t i)
      : logits(static_cast<const S*>(a.logits) + i * a.anchor_stride),
        objectness(
            objectness_of(a.objectness ? widen(static_cast<const S*>(a.objectness)[i * a.objectness_stride]) : T{0})) {}
  __device__ __forceinline__ PairLogit<T> at(const PairwiseArgs& a, int64_t c) const {
    return Pair::apply(widen(logits[c * a.class_stride]), objectness);
  }
};

template <class Pair, class S>
__global__ void __launch_bounds__(kThreads) pairwise_kernel(const PairwiseArgs a) {
  using T = typename ComputeOf<S>::T;
  // Apart and in double: where the target's z is most of `positive`, subtracting it leaves the others' digits.
  auto* positive = reinterpret_cast<double*>(shared_memory());  // [32] sums over the classes of max(z, 0) ...
  double* tail = positive + kWarp;                              // [32] ... and of log1p(exp(-|z|))
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t first = int64_t{blockIdx.x} * kWarp; first < a.anchors; first += int64_t{gridDim.x} * kWarp) {
    for (int i = warp; i < kWarp; i += kWarps) {
      double positive_sum = 0, tail_sum = 0;
      if (first + i < a.anchors) {
        const Anchor<Pair, S> anchor(a, first + i);
        for (int64_t c = lane; c < a.classes; c += kWarp) {
          const PairLogit<T> logit = anchor.at(a, c);
          positive_sum += at_least(logit.z, T{0});
          tail_sum += logit.tail;
        }
      }
      for (int width = kWarp / 2; width > 0; width /= 2) {
        positive_sum += shuffle_xor(positive_sum, width);
        tail_sum += shuffle_xor(tail_sum, width);
      }
      if (lane == 0) {
        positive[i] = positive_sum;
        tail[i] = tail_sum;
      }
    }
    __syncthreads();  // every anchor's sums are there
    if (first + lane < a.anchors) {
      const Anchor<Pair, S> anchor(a, first + lane);
      for (int64_t g = warp; g < a.truths; g += kWarps) {
        const int64_t y = a.index[g];
        require_target(y, a.classes);
        static_cast<T*>(a.cost)[g * a.anchors + first + lane] =
            static_cast<T>((positive[lane] - anchor.at(a, y).z) + tail[lane]);
      }
    }
    __syncthreads();  // the next anchors take the shared memory
  }
}

template <class S>
cudaError_t launch_pairwise(const PairwiseArgs& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min((a.anchors + kWarp - 1) / kWarp, kMaxBlocks));
  const auto kernel = a.objectness ? pairwise_kernel<ProductPair, S> : pairwise_kernel<SigmoidPair, S>;
  return launch(kernel, blocks, kThreads, 1, 2 * kWarp * sizeof(double), stream, a);
}

}  // namespace

cudaError_t pairwise(const PairwiseArgs& a, cudaStream_t stream) {
  if (a.anchors == 0 || a.truths == 0) return cudaSuccess;
  switch (a.dtype) {
    case DType::f64: return launch_pairwise<double>(a, stream);
    case DType::bf16: return launch_pairwise<bf16>(a, stream);
    case DType::f16: return launch_pairwise<f16>(a, stream);
    case DType::f32: break;
  }
  return launch_pairwise<float>(a, stream);
}

}  // namespace fused_losses::cuda
