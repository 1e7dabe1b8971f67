// Cross entropy and softmax focal loss. The formulas are those of cpu/softmax.h: with e_j = exp(x_j - m), an index y of
// weight A and a dense part q_j = w_j (keep t_j + smooth),
//   value = A (log sum + m - x_y) + D + Q log sum,  grad = (A + Q) p_j - q_j - A 1_y.
//
// kernel    rows it serves                              bytes for N x C logits, gradient included
// lanes     contiguous, C <= 1024 (see lanes_items)     in once, out once: the row stays in registers
// staged    contiguous, C > 1024, row (or its share     in once, out once: the row stays in shared memory
//           in a cluster) fits shared memory
// reread    contiguous, longer                          in twice (the second mostly from L2), out once
// columns   any strides; a thread a position, so        in once from memory where the C rows that are in flight
//           (N, C, d1, ...) is read coalesced           fit L2, out once
//
// What it takes to move that at the memory's speed: loads in flight (asynchronous copies of a whole row's share, or
// several loads of a thread before the first is used), and, for 16-bit logits, less than 30 instructions an element.
//
// S is what logits and gradient are stored in, O the loss and its upstream gradient: S, or float beside a narrower S,
// as autocast has it. O decides how precise the loss's terms are; beside a float O soft targets may be float, too.
//
// The mean's denominator is counted on the device: by every block for few targets (they are in L2 after the first),
// else by a launch of its own. Nothing is allocated here and the host waits for nothing.
#include "cuda/softmax.h"

#include <algorithm>
#include <type_traits>

#include "cuda/formulas.cuh"

namespace fused_losses::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int64_t kBlocksAMultiprocessor = 32;  // at most in a grid (or clusters): what is more takes turns
// Of the lanes kernel, a row's classes in one lane: as many as leave registers enough to spill none.
constexpr int lanes_items(size_t element, bool dense) { return element == 8 ? 8 : dense ? 16 : 32; }
constexpr int64_t kCountHere = 1024;  // targets that every block counts itself
constexpr unsigned kCountBlocks = 256;
constexpr int64_t kRun = 32;  // classes that one thread adds up before it starts a new sum
constexpr int kChunk = 8;  // of them, loaded before the first is used
// Packs that a thread of the reread kernel loads before it uses the first: as many as leave registers enough.
template <bool dense, bool wide>
constexpr int kPacksAhead = dense && wide ? 2 : 4;
constexpr int kBlocksAtOnce = 3;  // of the staged kernel on a multiprocessor: one's loads beside another's arithmetic
constexpr int kReserved = 1024;  // bytes of shared memory that the system takes for each block
constexpr unsigned kMaxCluster = 8;  // what every sm_90 grants

template <class T>
constexpr T infinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T lowest = sizeof(T) == 8 ? static_cast<T>(-1.7976931348623157e308) : static_cast<T>(-3.4028234663852886e38);

// ---- one row ---------------------------------------------------------------------------------------------------

// R, what the sum of terms is kept in. Without an index a confident row's sum is 1 and little more, and its loss the
// little: for a float loss none of it is rounded away. A loss of 16 bits has no use for that, and fp64 no better
// reference than torch's own sum.
template <class T, class R>
struct alignas(16) RowStats {
  T maximum;
  R rest;  // without the target's term
  T q_sum, q_distance;  // sums of q_j and q_j (maximum - x_j)
};
template <class O, bool dense, class T>
using RowStatsOf = RowStats<T, std::conditional_t<dense && std::is_same_v<O, float>, Pair<T>, T>>;
template <class Stats>
__device__ __forceinline__ Stats no_stats() {
  return {lowest<decltype(Stats::maximum)>, 0, 0, 0};
}
template <class T, class R>
__device__ __forceinline__ RowStats<T, R> relative_to(RowStats<T, R> s, T maximum) {
  const T distance = maximum - s.maximum;
  return {maximum, s.rest * exp(-distance), s.q_sum, s.q_distance + s.q_sum * distance};
}
template <class T, class R>
__device__ __forceinline__ void add(RowStats<T, R>& s, RowStats<T, R> other) {  // of the same maximum
  s.rest = s.rest + other.rest;
  s.q_sum += other.q_sum;
  s.q_distance += other.q_distance;
}
// Those of a group of `lanes` neighbouring lanes in one, the same bits in each lane: the maximum first, so that each
// costs one exponential. Every lane of the warp takes part.
template <bool dense, class T, class R>
__device__ __forceinline__ RowStats<T, R> merge_lanes(RowStats<T, R> s, int lanes) {
  T maximum = s.maximum;
  for (int width = lanes / 2; width > 0; width /= 2) maximum = larger(maximum, shuffle_xor(maximum, width));
  s = relative_to(s, maximum);
  for (int width = lanes / 2; width > 0; width /= 2) {
    s.rest = s.rest + shuffle_xor(s.rest, width);
    if constexpr (dense) {
      s.q_sum += shuffle_xor(s.q_sum, width);
      s.q_distance += shuffle_xor(s.q_distance, width);
    }
  }
  return s;
}

// Row p's target: y >= 0 an index of weight A, or y = -1 and a dense part only.
template <class T>
struct RowTarget {
  int64_t y;
  bool live;  // not ignored
  T x_y;  // the target's logit. Read before any gradient is written: that may be the same memory
  T weight;  // A
};
template <class S>
__device__ __forceinline__ RowTarget<typename ComputeOf<S>::T> row_target(const SoftmaxArgs& a, int64_t p,
                                                                          const S* row) {
  using T = typename ComputeOf<S>::T;
  RowTarget<T> target{-1, true, 0, 0};
  if (!a.index) return target;
  target.y = a.index[p];
  if (target.y == a.ignore_index) {
    target.live = false;
    return target;
  }
  require_target(target.y, a.classes);
  target.x_y = widen(row[target.y * a.logits_class_stride]);
  target.weight = (a.weight ? static_cast<const T*>(a.weight)[target.y] : T{1}) * static_cast<T>(1 - a.label_smoothing);
  return target;
}

template <class T>
struct DenseWeights {
  const T* weight;  // [C] or nullptr
  T keep, smooth;  // 1 - label_smoothing, label_smoothing / C
  __device__ __forceinline__ DenseWeights(const SoftmaxArgs& a)
      : weight(static_cast<const T*>(a.weight)),
        keep(static_cast<T>(a.probability ? 1 - a.label_smoothing : 0)),
        smooth(static_cast<T>(a.label_smoothing / static_cast<double>(a.classes))) {}
  __device__ __forceinline__ T q(int64_t j, T t) const {
    const T q = keep * t + smooth;
    return weight ? weight[j] * q : q;
  }
};

// A position's soft targets: from here on, or nullptr for none.
template <class S, class O>
struct SoftTarget {
  const void* data = nullptr;
  bool wide = false;  // they are O's
  SoftTarget() = default;
  __device__ __forceinline__ SoftTarget(const SoftmaxArgs& a, int64_t offset) : wide(a.probability_dtype != a.dtype) {
    if (!a.probability) return;
    data = wide ? static_cast<const void*>(static_cast<const O*>(a.probability) + offset)
                : static_cast<const void*>(static_cast<const S*>(a.probability) + offset);
  }
  __device__ __forceinline__ typename ComputeOf<S>::T at(int64_t j) const {
    if (!data) return 0;
    if constexpr (!std::is_same_v<S, O>)
      if (wide) return static_cast<const O*>(data)[j];
    return widen(static_cast<const S*>(data)[j]);
  }
};

// Takes x[0 .. count) in, the target's at x[at] where at is in the range: all of them before one exponential is spent
// on a new maximum. The others are -inf.
template <class O, bool dense, int n, class T, class R, class Index>
__device__ __forceinline__ void accumulate(RowStats<T, R>& s, const T (&x)[n], const T (&q)[n], Index at,
                                           int count = n) {
  T highest = x[0];
#pragma unroll
  for (int k = 1; k < n; ++k) highest = larger(highest, x[k]);
  if (highest > s.maximum) s = relative_to(s, highest);
  R term[n];
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const T distance = s.maximum - x[k];
    term[k] = exp_term<O>(-distance);
    if constexpr (dense) {
      if (k < count) {
        s.q_sum += q[k];
        s.q_distance += q[k] * distance;
      }
    }
  }
  if (at >= 0 && at < n) {
#pragma unroll
    for (int k = 0; k < n; ++k) term[k] = k == at ? R{0} : term[k];
  }
  s.rest = s.rest + pairwise_sum<n>(term);
}

// What every gradient of the row takes.
template <class T>
struct RowGradient {
  T maximum;
  Pair<T> softmax;  // p_j (A + Q) = exp(x_j - maximum) softmax; without a dense part times the scale, and rounded
  T scale, at_target;  // the target's own, without -q; the same holds for its scale
  // out = the gradient of n logits, the target's at x[at].
  template <class S, bool dense, int n, class Index>
  __device__ __forceinline__ void of(const T (&x)[n], const T (&q)[n], Index at, T (&out)[n]) const {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const T term = exp_term<S>(x[k] - maximum);
      out[k] = term * softmax.high;
      if constexpr (dense) {
        out[k] = fma(term, softmax.high, -q[k]);  // the large numbers' difference first: it is small, and may be exact
        if constexpr (sizeof(S) > 2) out[k] += term * softmax.low;
        out[k] *= scale;
      }
    }
    if (at >= 0 && at < n) {
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const T all = dense ? (at_target - q[k]) * scale : at_target;  // 0 where the difference is, fma or not
        out[k] = k == at ? all : out[k];
      }
    }
  }
};

// The mean's factor times the upstream gradient. Beside a dense part its own rounding is one of several.
template <class T, bool dense>
using Scale = std::conditional_t<dense, T, Pair<T>>;
template <bool dense, class T, class R>
__device__ __forceinline__ T finish_row(const SoftmaxArgs& a, RowStats<T, R> s, RowTarget<T> target,
                                        Scale<T, dense> scale, RowGradient<T>* gradient) {
  const bool indexed = a.index != nullptr;
  const T distance = indexed ? s.maximum - target.x_y : T{0};
  const Pair<T> rest = s.rest;
  const RowSums<T> sums{distance, indexed ? exp(-distance) : T{0}, rest.high};
  RowLoss<T> loss{0, 0, 0};
  if (indexed)
    loss = a.gamma > 0 ? softmax_focal_row(sums, target.weight, a.gamma) : cross_entropy_row(sums, target.weight);
  const Pair<T> sum = rest + sums.target_term;
  gradient->maximum = s.maximum;
  if constexpr (dense) {
    gradient->softmax = (Pair<T>(loss.softmax) + s.q_sum) / sum;
    gradient->scale = scale;
    gradient->at_target = loss.target + s.q_sum * sums.target_term / sum.high;
  } else {
    // Rounded once: where a wrong class has all of the sum, its gradient is the scale itself.
    gradient->softmax = (scale * loss.softmax / sum).rounded();
    gradient->at_target = loss.target * scale.rounded();
  }
  T value = loss.value;
  if constexpr (dense) value += s.q_distance + s.q_sum * log_sum(sums, rest.low);
  return value;
}

// ---- the mean's denominator ------------------------------------------------------------------------------------

// What this block's threads count of the targets from `first` on, in steps of `step` threads.
__device__ __forceinline__ double count_targets(const SoftmaxArgs& a, int64_t first, int64_t step) {
  double count = 0;
  for (int64_t p = first; p < a.positions; p += step) {
    const int64_t y = a.index[p];
    if (y == a.ignore_index) continue;
    require_target(y, a.classes);
    if (!a.weight || !a.count_weights)
      count += 1;
    else
      count += a.dtype == DType::f64 ? static_cast<const double*>(a.weight)[y] : static_cast<const float*>(a.weight)[y];
  }
  return count;
}

// The same in every thread and in every block. `scratch`: a double a warp.
__device__ __forceinline__ double denominator_of(const SoftmaxArgs& a, const SoftmaxBuffers& b, double* scratch) {
  if (!b.mean) return 1;
  if (!a.index) return static_cast<double>(a.positions);
  double count = 0;
  if (b.count_blocks == 0) {
    count = count_targets(a, threadIdx.x, blockDim.x);
  } else {
    for (unsigned i = threadIdx.x; i < b.count_blocks; i += blockDim.x) count += b.counts[i];
  }
  return block_sum(count, scratch);
}

__global__ void __launch_bounds__(kThreads) count_kernel(const SoftmaxArgs a, double* counts) {
  const double count = count_targets(a, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads);
  const double total = block_sum(count, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

template <class T, bool dense>
__device__ __forceinline__ Scale<T, dense> gradient_scale(const SoftmaxArgs& a, double denominator) {
  const Pair<T> scale = Pair<T>::of(a.grad_scale / denominator);
  if constexpr (dense)
    return scale.high;
  else
    return scale;
}
template <class O>
__device__ __forceinline__ typename ComputeOf<O>::T upstream_of(const SoftmaxArgs& a, const SoftmaxBuffers& b,
                                                                int64_t p) {
  if (b.scalar_upstream) return widen(*static_cast<const O*>(b.scalar_upstream));
  return a.upstream ? widen(static_cast<const O*>(a.upstream)[p]) : typename ComputeOf<O>::T{1};
}

__device__ __forceinline__ void write_partial(const SoftmaxBuffers& b, double value, unsigned place, double* scratch) {
  if (!b.partial) return;
  const double total = block_sum(value, scratch);
  if (threadIdx.x == 0) b.partial[place] = total;
}

// ---- lanes: some threads of a warp a row -----------------------------------------------------------------------

template <class S, class O, bool dense, int items>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 2)
    softmax_lanes_kernel(const SoftmaxArgs a, const SoftmaxBuffers b, int planned_lanes) {
  using T = typename ComputeOf<S>::T;
  using Stats = RowStatsOf<O, dense, T>;
  // With more than 4 classes a lane the plan takes a whole warp. As a constant, it is part of the instructions: the
  // places of a lane's classes take no registers.
  const int lanes = items > 4 ? kWarp : planned_lanes;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Scale<T, dense> mean_scale = gradient_scale<T, dense>(a, denominator_of(a, b, scratch));
  const DenseWeights<T> weights(a);
  const int lane = threadIdx.x % lanes, classes = static_cast<int>(a.classes);
  const int64_t rows = kThreads / lanes, step = rows * gridDim.x;
  Sum<T> sum;
  for (int64_t first = rows * blockIdx.x; first < a.positions; first += step) {
    // A group without a row stays: every lane of its warp takes part in the shuffles.
    const int64_t p = first + threadIdx.x / lanes;
    const bool inside = p < a.positions;
    const S* row = static_cast<const S*>(a.logits) + (inside ? offset_of(a, a.logits_stride, p) : 0);
    SoftTarget<S, O> t;
    if (dense && inside && a.probability) t = {a, offset_of(a, a.probability_stride, p)};
    RowTarget<T> target{-1, false, 0, 0};
    if (inside) target = row_target<S>(a, p, row);
    // This lane's classes: lane, lane + lanes, ... The loads do not wait for each other.
    T x[items], q[items];
    int count = 0, at = -1;
#pragma unroll
    for (int k = 0; k < items; ++k) {
      const int j = lane + k * lanes;
      x[k] = -infinity<T>;
      q[k] = 0;
      if (target.live && j < classes) {
        x[k] = widen(row[j]);
        if constexpr (dense) q[k] = weights.q(j, t.at(j));
        count = k + 1;
        if (j == target.y) at = k;
      }
    }
    __syncwarp();  // in place: every lane has read the target's logit
    Stats s = no_stats<Stats>();
    if (target.live) accumulate<O, dense>(s, x, q, at, count);
    s = merge_lanes<dense>(s, lanes);
    if (!inside) continue;
    RowGradient<T> gradient{};
    T value = 0;
    if (target.live) value = finish_row<dense>(a, s, target, mean_scale * upstream_of<O>(a, b, p), &gradient);
    if (lane == 0) {
      sum.add(value);
      if (a.value) static_cast<O*>(a.value)[p] = Narrow<O>::from(value);
    }
    if (!a.grad) continue;
    S* g = static_cast<S*>(a.grad) + offset_of(a, a.grad_stride, p);
    T grad[items]{};
    if (target.live) gradient.template of<S, dense>(x, q, at, grad);
#pragma unroll
    for (int k = 0; k < items; ++k)
      if (lane + k * lanes < classes) g[lane + k * lanes] = Narrow<S>::from(grad[k]);
  }
  write_partial(b, sum.total, blockIdx.x, scratch);
}

// ---- staged, reread: a block, or a cluster of them, a row ------------------------------------------------------

// This block's share of a row, cut where 16-byte accesses begin and end: a head and a tail of single elements.
template <class S>
struct Slice {
  int64_t begin, count;
  int head;
  int64_t packs;
  __device__ __forceinline__ Slice(const S* row, int64_t classes, unsigned rank, unsigned blocks) {
    const int64_t share = (classes + blocks - 1) / blocks;
    begin = share * rank < classes ? share * rank : classes;
    count = begin + share < classes ? share : classes - begin;
    const int past = misaligned(row + begin), until = past ? Pack<S>::size - past : 0;
    head = count < until ? static_cast<int>(count) : until;
    packs = (count - head) / Pack<S>::size;
  }
};

// Shared memory: scratch (a double and a RowStats a warp, one RowStats for the cluster), then the staged packs.
constexpr size_t kScratch = kThreads / kWarp * (sizeof(double) + 6 * sizeof(double)) + 6 * sizeof(double);

template <class S, class O, bool dense, bool staged>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 2 : kBlocksAtOnce)
    softmax_block_kernel(const SoftmaxArgs a, const SoftmaxBuffers b) {
  using T = typename ComputeOf<S>::T;
  using Stats = RowStatsOf<O, dense, T>;
  using Index = std::conditional_t<staged, int, int64_t>;  // what shared memory holds is counted in an int
  constexpr int n = Pack<S>::size;
  constexpr unsigned warps = kThreads / kWarp;
  constexpr int ahead_count = kPacksAhead<dense, !std::is_same_v<S, O>>;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  Stats* warp_stats = reinterpret_cast<Stats*>(scratch + warps);
  Stats* block_stats = warp_stats + warps;
  S* stage = reinterpret_cast<S*>(shared_memory() + kScratch);

  const DenseWeights<T> weights(a);
  const unsigned blocks = cluster_size(), rank = cluster_rank();
  const Index thread = static_cast<Index>(threadIdx.x);
  const int64_t first = blockIdx.x / blocks;
  Scale<T, dense> mean_scale{};
  Sum<T> sum;
  for (int64_t p = first; p < a.positions; p += gridDim.x / blocks) {
    const S* row = static_cast<const S*>(a.logits) + offset_of(a, a.logits_stride, p);
    SoftTarget<S, O> t;
    if (dense && a.probability) t = {a, offset_of(a, a.probability_stride, p)};
    const RowTarget<T> target = row_target<S>(a, p, row);
    const Slice<S> slice(row, a.classes, rank, blocks);
    const S* x = row + slice.begin;
    const Index count = static_cast<Index>(slice.count), packs = static_cast<Index>(slice.packs), head = slice.head;
    const Index tail = head + packs * n;
    const bool mine = target.y >= slice.begin && target.y < slice.begin + slice.count;
    const Index y = mine ? static_cast<Index>(target.y - slice.begin) : -1;  // in this slice
    if (staged && target.live)
      for (Index k = thread; k < packs; k += kThreads) copy_16_bytes(stage + k * n, x + head + k * n);
    // While the first row is on its way.
    if (p == first) mean_scale = gradient_scale<T, dense>(a, denominator_of(a, b, scratch));

    const auto q_of = [&](Index i) -> T {
      if constexpr (!dense) return 0;
      const int64_t j = slice.begin + i;
      return weights.q(j, t.at(j));
    };
    // Calls visit(i, one) for the single elements of the slice, and visit_pack(i, pack) for its packs. A thread is
    // asked for the same packs every time: it reads nothing of the stage that another one has copied.
    const auto for_slice = [&](auto visit, auto visit_pack) {
      if (thread < head) visit(thread, x[thread]);
      if (tail + thread < count) visit(tail + thread, x[tail + thread]);
      Index k = thread;
      if constexpr (staged) {
        for (; k < packs; k += kThreads) visit_pack(head + k * n, load_pack(stage + k * n));
      } else {
        for (; k + (ahead_count - 1) * kThreads < packs; k += ahead_count * kThreads) {
          Pack<S> ahead[ahead_count];
#pragma unroll
          for (int u = 0; u < ahead_count; ++u) ahead[u] = load_pack(x + head + (k + u * kThreads) * n);
#pragma unroll
          for (int u = 0; u < ahead_count; ++u) visit_pack(head + (k + u * kThreads) * n, ahead[u]);
        }
        for (; k < packs; k += kThreads) visit_pack(head + k * n, load_pack(x + head + k * n));
      }
    };

    Stats s = no_stats<Stats>();
    if (target.live) {
      wait_for_copies();
      for_slice(
          [&](Index i, S logit) {
            const T one[1] = {widen(logit)}, q[1] = {q_of(i)};
            accumulate<O, dense>(s, one, q, y - i);
          },
          [&](Index i, Pack<S> pack) {
            T wide[n], q[n];
#pragma unroll
            for (int k = 0; k < n; ++k) {
              wide[k] = widen(pack.at[k]);
              q[k] = q_of(i + k);
            }
            accumulate<O, dense>(s, wide, q, y - i);
          });
    }
    s = merge_lanes<dense>(s, kWarp);
    const unsigned lane = threadIdx.x % kWarp;
    if (lane == 0) warp_stats[threadIdx.x / kWarp] = s;
    __syncthreads();  // every warp's sums are there, and (in place) every thread has read the target's logit
    s = warp_stats[lane % warps];  // not as an argument: ThreadSanitizer does not see what is copied for one
    s = merge_lanes<dense>(s, warps);
    if (blocks > 1) {
      if (threadIdx.x == 0) *block_stats = s;
      cluster_arrive();
      cluster_wait();  // every block's sums are there
      s = *in_block(block_stats, lane % blocks);
      cluster_arrive();  // has read the others', and touches from here on what is its own
      s = merge_lanes<dense>(s, static_cast<int>(blocks));
    }

    RowGradient<T> gradient{};
    T value = 0;
    if (target.live) value = finish_row<dense>(a, s, target, mean_scale * upstream_of<O>(a, b, p), &gradient);
    if (threadIdx.x == 0 && rank == 0) {
      sum.add(value);
      if (a.value) static_cast<O*>(a.value)[p] = Narrow<O>::from(value);
    }
    if (a.grad) {
      S* g = static_cast<S*>(a.grad) + offset_of(a, a.grad_stride, p) + slice.begin;
      const bool aligned = misaligned(g) == misaligned(x);
      if (!target.live) {
        for (Index i = thread; i < count; i += kThreads) g[i] = Narrow<S>::from(T{0});
      } else {
        for_slice(
            [&](Index i, S logit) {
              const T one[1] = {widen(logit)}, q[1] = {q_of(i)};
              T grad[1];
              gradient.template of<S, dense>(one, q, y - i, grad);
              g[i] = Narrow<S>::from(grad[0]);
            },
            [&](Index i, Pack<S> pack) {
              T wide[n], q[n], grad[n];
#pragma unroll
              for (int k = 0; k < n; ++k) {
                wide[k] = widen(pack.at[k]);
                q[k] = q_of(i + k);
              }
              gradient.template of<S, dense>(wide, q, y - i, grad);
              const Pack<S> out = narrow_pack<S>(grad);
              if (aligned) {
                store_pack(g + i, out);
              } else {
#pragma unroll
                for (int k = 0; k < n; ++k) g[i + k] = out.at[k];
              }
            });
      }
    }
    // The next row overwrites what other threads, and other blocks of the cluster, may still be reading; and a block
    // that ends takes its shared memory along.
    if (blocks > 1) {
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  if (rank == 0) write_partial(b, sum.total, static_cast<unsigned>(first), scratch);
}

// ---- columns: a thread a position ------------------------------------------------------------------------------

template <class S, class O, bool dense>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 3)
    softmax_columns_kernel(const SoftmaxArgs a, const SoftmaxBuffers b) {
  using T = typename ComputeOf<S>::T;
  using Stats = RowStatsOf<O, dense, T>;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const Scale<T, dense> mean_scale = gradient_scale<T, dense>(a, denominator_of(a, b, scratch));
  const DenseWeights<T> weights(a);
  Sum<T> sum;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x; p < a.positions; p += step) {
    const S* x = static_cast<const S*>(a.logits) + offset_of(a, a.logits_stride, p);
    SoftTarget<S, O> t;
    if (dense && a.probability) t = {a, offset_of(a, a.probability_stride, p)};
    const RowTarget<T> target = row_target<S>(a, p, x);
    const auto q_of = [&](int64_t j) -> T { return dense ? weights.q(j, t.at(j * a.probability_class_stride)) : T{0}; };
    const int64_t y = target.y;
    // Classes j, j + 1, ...: their loads do not wait for each other.
    const auto load = [&](int64_t j, T(&wide)[kChunk], T(&q)[kChunk]) {
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        wide[k] = -infinity<T>;
        q[k] = 0;
        if (j + k < a.classes) {
          wide[k] = widen(x[(j + k) * a.logits_class_stride]);
          q[k] = q_of(j + k);
        }
      }
      return a.classes - j < kChunk ? static_cast<int>(a.classes - j) : kChunk;
    };
    RowGradient<T> gradient{};
    T value = 0, wide[kChunk], q[kChunk];
    if (target.live) {
      Stats s = no_stats<Stats>();
      for (int64_t first = 0; first < a.classes; first += kRun) {  // short runs: a long sum loses digits
        Stats run = no_stats<Stats>();
        for (int64_t j = first; j < first + kRun && j < a.classes; j += kChunk) {
          const int count = load(j, wide, q);
          accumulate<O, dense>(run, wide, q, y - j, count);
        }
        const T maximum = larger(s.maximum, run.maximum);
        s = relative_to(s, maximum);
        add(s, relative_to(run, maximum));
      }
      value = finish_row<dense>(a, s, target, mean_scale * upstream_of<O>(a, b, p), &gradient);
    }
    sum.add(value);
    if (a.value) static_cast<O*>(a.value)[p] = Narrow<O>::from(value);
    if (!a.grad) continue;
    S* g = static_cast<S*>(a.grad) + offset_of(a, a.grad_stride, p);
    for (int64_t j = 0; j < a.classes; j += kChunk) {
      T grad[kChunk]{};
      if (target.live) {
        load(j, wide, q);
        gradient.template of<S, dense>(wide, q, y - j, grad);
      }
#pragma unroll
      for (int k = 0; k < kChunk; ++k)
        if (j + k < a.classes) g[(j + k) * a.grad_class_stride] = Narrow<S>::from(grad[k]);
    }
  }
  write_partial(b, sum.total, blockIdx.x, scratch);
}

// ---- the loss --------------------------------------------------------------------------------------------------

constexpr unsigned kFinishThreads = 1024;

template <class S>
__global__ void __launch_bounds__(kFinishThreads)
    softmax_finish_kernel(const SoftmaxArgs a, const SoftmaxBuffers b, unsigned count, S* loss) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const double denominator = denominator_of(a, b, scratch);
  double sum = 0;
  for (unsigned i = threadIdx.x; i < count; i += kFinishThreads) sum += b.partial[i];
  sum = block_sum(sum, scratch);
  if (denominator == 0) sum = 0;  // the mean is nan, as torch's, also where label smoothing leaves a sum
  if (threadIdx.x == 0) *loss = Narrow<S>::from(static_cast<typename ComputeOf<S>::T>(sum / denominator));
}

template <class S, class O, bool dense>
cudaError_t launch_softmax(const SoftmaxArgs& a, const SoftmaxPlan& plan, const SoftmaxBuffers& b,
                           cudaStream_t stream) {
  switch (plan.kernel) {
    case SoftmaxKernel::lanes: {
      const auto with = [&](auto items) {
        return launch(softmax_lanes_kernel<S, O, dense, items>, plan.blocks, plan.threads, 1, plan.shared, stream, a, b,
                      static_cast<int>(plan.lanes));
      };
      const int64_t items = (a.classes + plan.lanes - 1) / plan.lanes;
      constexpr int most = lanes_items(sizeof(S), dense);
      if (items <= 4) return with(std::integral_constant<int, 4>{});
      if (items <= 8 || most == 8) return with(std::integral_constant<int, 8>{});
      if (items <= 16 || most == 16) return with(std::integral_constant<int, std::min(most, 16)>{});
      return with(std::integral_constant<int, most>{});
    }
    case SoftmaxKernel::staged:
      return launch(softmax_block_kernel<S, O, dense, true>, plan.blocks, plan.threads, plan.cluster, plan.shared,
                    stream, a, b);
    case SoftmaxKernel::reread:
      return launch(softmax_block_kernel<S, O, dense, false>, plan.blocks, plan.threads, plan.cluster, plan.shared,
                    stream, a, b);
    case SoftmaxKernel::columns: break;
  }
  return launch(softmax_columns_kernel<S, O, dense>, plan.blocks, plan.threads, 1, plan.shared, stream, a, b);
}

bool is_dense(const SoftmaxArgs& a) { return a.probability || a.label_smoothing != 0; }

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

cudaError_t plan_softmax(const SoftmaxArgs& a, bool needs_count, int device, SoftmaxPlan* plan) {
  const int64_t element = a.dtype == DType::f64 ? 8 : a.dtype == DType::f32 ? 4 : 2;
  const bool dense = is_dense(a);
  const int64_t classes = a.classes, positions = a.positions, row_bytes = classes * element;
  int major = 0, optin = 0, multiprocessor = 0, multiprocessors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;

  const int64_t most = multiprocessors * kBlocksAMultiprocessor;
  const auto blocks_for = [&](int64_t rows_a_block) {
    return static_cast<unsigned>(std::clamp((positions + rows_a_block - 1) / rows_a_block, int64_t{1}, most));
  };
  *plan = {SoftmaxKernel::columns, 0, kThreads, 0, 1, kThreads / kWarp * sizeof(double), 0};
  if (needs_count && a.index && positions > kCountHere)
    plan->count_blocks = static_cast<unsigned>(std::min<int64_t>(kCountBlocks, (positions + 1023) / 1024));

  const bool contiguous = a.logits_class_stride == 1 && (!a.grad || a.grad_class_stride == 1) &&
                          (!a.probability || a.probability_class_stride == 1);
  if (!contiguous) {
    plan->blocks = blocks_for(kThreads);
  } else if (classes <= kWarp * lanes_items(static_cast<size_t>(element), dense)) {
    plan->kernel = SoftmaxKernel::lanes;
    plan->lanes = 4;  // a whole warp, or at most 4 classes a lane
    while (plan->lanes < kWarp && plan->lanes * 4 < classes) plan->lanes *= 2;
    plan->blocks = blocks_for(kThreads / plan->lanes);
  } else {
    // A row's share that leaves room for other blocks; on sm_90 and later a cluster makes it small enough.
    const int64_t share = multiprocessor / kBlocksAtOnce - kReserved - static_cast<int64_t>(kScratch);
    unsigned cluster = 1;
    bool clusters = major >= 9;
    if (clusters) error = knows_clusters(count_kernel, &clusters);
    if (error != cudaSuccess) return error;
    if (clusters)
      while (cluster < kMaxCluster && row_bytes > share * cluster) cluster *= 2;
    const size_t stage = static_cast<size_t>((classes + cluster - 1) / cluster * element + 15) / 16 * 16;
    plan->cluster = cluster;
    plan->shared = kScratch;
    plan->kernel = SoftmaxKernel::reread;
    if (stage + kScratch <= static_cast<size_t>(optin)) {
      plan->kernel = SoftmaxKernel::staged;
      plan->shared += stage;
    }
    plan->blocks = static_cast<unsigned>(std::min(positions, most)) * cluster;
  }
  return cudaSuccess;
}

cudaError_t softmax(const SoftmaxArgs& a, const SoftmaxPlan& plan, const SoftmaxBuffers& b, cudaStream_t stream) {
  if (plan.count_blocks > 0) {
    const cudaError_t error =
        launch(count_kernel, plan.count_blocks, kThreads, 1, kThreads / kWarp * sizeof(double), stream, a, b.counts);
    if (error != cudaSuccess) return error;
  }
  return for_dtype(a.dtype, [&](auto type) {
    using S = decltype(type);
    using Wide = typename ComputeOf<S>::T;
    const auto with = [&](auto dense) {
      return a.value_dtype != a.dtype ? launch_softmax<S, Wide, dense>(a, plan, b, stream)
                                      : launch_softmax<S, S, dense>(a, plan, b, stream);
    };
    return is_dense(a) ? with(std::true_type{}) : with(std::false_type{});
  });
}

cudaError_t finish_softmax(const SoftmaxArgs& a, const SoftmaxPlan& plan, const SoftmaxBuffers& b, void* loss,
                           cudaStream_t stream) {
  return for_dtype(a.value_dtype, [&](auto type) {
    using S = decltype(type);
    return launch(softmax_finish_kernel<S>, 1, kFinishThreads, 1, kFinishThreads / kWarp * sizeof(double), stream, a, b,
                  plan.blocks / plan.cluster, static_cast<S*>(loss));
  });
}

}  // namespace fused_losses::cuda
