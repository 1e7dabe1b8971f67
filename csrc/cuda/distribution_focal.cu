// Distribution focal loss. Some neighbouring threads of a warp share a position's bins, about four each (16 bins: 4
// threads), so contiguous rows are read whole cache lines at a time; any other strides work as well. Each logit comes
// from memory once (the second and third read of a row are in L1), each gradient goes out once.
//
// A target out of range ends the kernel. Values are added up by each thread with compensation, by the block in double,
// and by the finish in the blocks' order: the same bits on every run.
#include "cuda/distribution_focal.h"

#include <algorithm>

#include "cuda/formulas.cuh"

namespace fused_losses::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

unsigned lanes_for(int64_t bins) {
  unsigned lanes = 1;
  while (lanes < kWarp && lanes * 4 < bins) lanes *= 2;
  return lanes;
}

__device__ __forceinline__ double denominator_of(const DistributionBuffers& b) {
  if (!b.avg_factor) return 1;
  return *b.avg_factor < 1 ? 1 : *b.avg_factor;  // NaN stays
}

// The target of a position, where it lies between two bins.
template <class T>
__device__ __forceinline__ T require_place(T t, int64_t bins) {
  if (!(t >= 0 && t <= static_cast<T>(bins - 1))) require_target(t > 0 ? bins : -1, bins);
  return t;
}

// S: storage of logits and gradient, O: of the loss and its upstream gradient. Where no number of blocks is asked for,
// ptxas spills a register to fit one more.
template <class S, class O>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 2 : 4)
    distribution_focal_kernel(const DistributionArgs d, const DistributionBuffers b, unsigned lanes) {
  using T = typename ComputeOf<S>::T;
  constexpr T lowest =
      sizeof(T) == 8 ? static_cast<T>(-1.7976931348623157e308) : static_cast<T>(-3.4028234663852886e38);
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const SoftmaxArgs& a = d.rows;
  Pair<T> mean_scale = Pair<T>::of(a.grad_scale / denominator_of(b));
  if (b.scalar_upstream) mean_scale = mean_scale * widen(*static_cast<const O*>(b.scalar_upstream));
  const unsigned lane = threadIdx.x % lanes, rows = kThreads / lanes, step = rows * gridDim.x;
  Sum<T> sum;
  for (int64_t first = int64_t{rows} * blockIdx.x; first < a.positions; first += step) {
    // A group without a row stays: every lane of its warp takes part in the shuffles.
    const int64_t p = first + threadIdx.x / lanes;
    const bool inside = p < a.positions;
    const S* x = static_cast<const S*>(a.logits) + (inside ? offset_of(a, a.logits_stride, p) : 0);
    const T t = inside ? require_place(static_cast<const T*>(d.target)[p], a.classes) : T{0};
    const T weight = inside && d.weight ? static_cast<const T*>(d.weight)[p] : T{1};

    T highest = lowest;
    for (int64_t j = lane; inside && j < a.classes; j += lanes)
      highest = at_least(widen(x[j * a.logits_class_stride]), highest);
    for (unsigned width = lanes / 2; width > 0; width /= 2) highest = at_least(shuffle_xor(highest, width), highest);

    // The last bin is a right neighbour, where it is not the only one. Every lane of a group has its neighbours' terms.
    const int64_t below = static_cast<int64_t>(t) < a.classes - 1 ? static_cast<int64_t>(t) : a.classes - 2;
    const int64_t left = below > 0 ? below : 0, right = left + 1;
    NeighbourSums<T> row{static_cast<T>(right) - t, t - static_cast<T>(left), 0, 0, 0, 0, 0};
    if (inside) {
      row.left_logit = widen(x[left * a.logits_class_stride]) - highest;
      row.right_logit =
          right < a.classes ? widen(x[right * a.logits_class_stride]) - highest : static_cast<T>(-INFINITY);
      row.left = exp(row.left_logit);
      row.right = exp(row.right_logit);
    }
    for (int64_t j = lane; inside && j < a.classes; j += lanes)
      if (j != left && j != right) row.others += exp(widen(x[j * a.logits_class_stride]) - highest);
    for (unsigned width = lanes / 2; width > 0; width /= 2) row.others += shuffle_xor(row.others, width);
    __syncwarp();  // in place, the gradient overwrites a neighbour's logit that other lanes have read
    if (!inside) continue;
    if (lane == 0) {
      const T value = weight * distribution_focal_value(row);
      sum.add(value);
      if (a.value) static_cast<O*>(a.value)[p] = Narrow<O>::from(value);
    }
    if (!a.grad) continue;
    Pair<T> scale = mean_scale * weight;
    if (a.upstream) scale = scale * widen(static_cast<const O*>(a.upstream)[p]);
    const Pair<T> left_term = row.left, right_term = row.right, others = row.others;
    const Pair<T> inverse = scale / (others + (left_term + right_term));
    S* g = static_cast<S*>(a.grad) + offset_of(a, a.grad_stride, p);
    for (int64_t j = lane; j < a.classes; j += lanes) {
      Pair<T> slope;
      if (j == left)
        slope = neighbour_slope<Pair<T>>(row.left_weight, left_term, row.right_weight, right_term, others);
      else if (j == right)
        slope = neighbour_slope<Pair<T>>(row.right_weight, right_term, row.left_weight, left_term, others);
      else
        slope = exp(widen(x[j * a.logits_class_stride]) - highest);
      g[j * a.grad_class_stride] = Narrow<S>::from((slope * inverse).rounded());
    }
  }
  if (b.partial) {
    const double total = block_sum(sum.total, scratch);
    if (threadIdx.x == 0) b.partial[blockIdx.x] = total;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    finish_distribution_kernel(const DistributionBuffers b, int64_t blocks, double factor, S* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += b.partial[i];
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0)
    *loss = Narrow<S>::from(static_cast<typename ComputeOf<S>::T>(sum * factor / denominator_of(b)));
}

// f(S{}) for the storage type.
template <class F>
cudaError_t for_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f32: break;
  }
  return f(float{});
}

}  // namespace

int64_t distribution_focal_blocks(const DistributionArgs& d) {
  const int64_t rows = kThreads / lanes_for(d.rows.classes);
  return std::clamp((d.rows.positions + rows - 1) / rows, int64_t{1}, kMaxBlocks);
}

cudaError_t distribution_focal(const DistributionArgs& d, const DistributionBuffers& b, cudaStream_t stream) {
  const bool wide = d.rows.value_dtype != d.rows.dtype;
  return for_dtype(d.rows.dtype, [&](auto type) {
    using S = decltype(type);
    using Wide = typename ComputeOf<S>::T;
    return launch(wide ? distribution_focal_kernel<S, Wide> : distribution_focal_kernel<S, S>,
                  static_cast<unsigned>(distribution_focal_blocks(d)), kThreads, 1, kThreads / kWarp * sizeof(double),
                  stream, d, b, lanes_for(d.rows.classes));
  });
}

cudaError_t finish_distribution_focal(const DistributionArgs& d, const DistributionBuffers& b, int64_t blocks,
                                      double factor, void* loss, cudaStream_t stream) {
  return for_dtype(d.rows.value_dtype, [&](auto type) {
    using S = decltype(type);
    return launch(finish_distribution_kernel<S>, 1, kThreads, 1, kThreads / kWarp * sizeof(double), stream, b, blocks,
                  factor, static_cast<S*>(loss));
  });
}

}  // namespace fused_losses::cuda
