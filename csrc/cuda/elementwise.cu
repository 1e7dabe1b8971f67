// One kernel for every element-wise loss, of any size: a grid-stride loop. Each operand is moved in once and the
// gradient out once: BCE in fp32 12 bytes an element, in bf16 6.
//
// packed: input, target, gradient (and value and upstream under "none") are contiguous and 16-byte aligned; a thread
//   moves 16 bytes of each at a time, and in the plain case loads two packs before it uses the first. Weights may have
//   any strides: a pack that stays inside one run of the last dimension finds its place once.
// otherwise: one element at a time, every operand by its strides.
//
// Values are added up in packs, by each thread with compensation, by the block in double, and by finish() in the
// blocks' order: the same bits on every run.
#include "cuda/elementwise.h"

#include <algorithm>

#include "cuda/formulas.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048;       // a few for every multiprocessor there is
constexpr int64_t kElementsAThread = 8;    // at least, so that small losses have few partial sums

template <class T>
struct ElementwiseParams {
  T alpha_positive, alpha_negative, gamma;
  double gamma_double, gamma_minus_one;
};

// Where element i of the common shape is, by the operand's strides.
__device__ __forceinline__ int64_t offset_of(const ElementwiseArgs& a, const Operand& operand, int64_t i) {
  if (operand.linear) return i;
  int64_t offset = 0;
  for (int d = a.ndim - 1; d > 0; --d) {
    const int64_t rest = i / a.size[d];
    offset += (i - rest * a.size[d]) * operand.stride[d];
    i = rest;
  }
  return offset + i * operand.stride[0];
}

template <class S>
__device__ __forceinline__ typename ComputeOf<S>::T read(const ElementwiseArgs& a, const Operand& operand, int64_t i) {
  return operand.data ? widen(static_cast<const S*>(operand.data)[offset_of(a, operand, i)])
                      : typename ComputeOf<S>::T{1};
}

// The elements i, i + 1, ..., i + n - 1 of a weight, where they are `step` apart: `whole`.
template <class S>
struct WeightRun {
  const S* data = nullptr;
  int64_t step = 0;
  bool whole = true;

  __device__ __forceinline__ WeightRun(const ElementwiseArgs& a, const Operand& o, int64_t i, int n) {
    if (!o.data) return;
    const int last = a.ndim - 1;
    data = static_cast<const S*>(o.data) + offset_of(a, o, i);
    step = o.linear ? 1 : o.stride[last];
    whole = o.linear || i % a.size[last] + n <= a.size[last];
  }
  __device__ __forceinline__ typename ComputeOf<S>::T at(int k) const { return data ? widen(data[k * step]) : 1; }
};

// plain: there are neither weights nor an upstream gradient an element, and no values are wanted.
template <class Loss, class S, bool plain>
__global__ void __launch_bounds__(kThreads, plain ? 3 : 2)
    elementwise_kernel(const ElementwiseArgs a, int64_t count, bool packed, const S* scalar_upstream, double* partial) {
  using T = typename ComputeOf<S>::T;
  using V = typename FormulaOf<S>::V;
  constexpr int n = Pack<S>::size;
  const ElementwiseParams<V> params{static_cast<V>(a.alpha_positive), static_cast<V>(a.alpha_negative),
                                    static_cast<V>(a.gamma), a.gamma, a.gamma - 1};
  T scale = static_cast<T>(a.grad_scale);
  if (scalar_upstream) scale *= widen(*scalar_upstream);
  Sum<T> sum;

  // The value; *grad is its derivative, times the upstream gradient.
  const auto element = [&](T x, T t, T weight, T pos_weight, T upstream, T* grad) {
    if constexpr (std::is_same_v<Loss, Bce>) require_probability(x);
    const ValueGrad<V> loss = Loss::apply(V(x), V(t), V(pos_weight), params);
    *grad = static_cast<T>(loss.grad) * weight * scale * upstream;
    return static_cast<T>(loss.value) * weight;
  };
  const auto single = [&](int64_t i) {
    T grad;
    const T value =
        element(read<S>(a, a.input, i), read<S>(a, a.target, i), plain ? T{1} : read<S>(a, a.weight, i),
                plain ? T{1} : read<S>(a, a.pos_weight, i), plain ? T{1} : read<S>(a, a.upstream, i), &grad);
    sum.add(value);
    if (a.grad.data) static_cast<S*>(a.grad.data)[offset_of(a, a.grad, i)] = Narrow<S>::from(grad);
    if (!plain && a.value.data) static_cast<S*>(a.value.data)[offset_of(a, a.value, i)] = Narrow<S>::from(value);
  };
  const auto input_at = [&](int64_t i) { return load_pack(static_cast<const S*>(a.input.data) + i * n); };
  const auto target_at = [&](int64_t i) { return load_pack(static_cast<const S*>(a.target.data) + i * n); };
  const auto pack = [&](int64_t i, const Pack<S>& x, const Pack<S>& t) {
    const int64_t at = i * n;
    const WeightRun<S> weight(a, a.weight, at, n), pos_weight(a, a.pos_weight, at, n);
    if (!plain && !(weight.whole && pos_weight.whole)) {
#pragma unroll 1
      for (int k = 0; k < n; ++k) single(at + k);
      return;
    }
    Pack<S> upstream;
    if (!plain && a.upstream.data) upstream = load_pack(static_cast<const S*>(a.upstream.data) + at);
    T value[n], grad[n];
#pragma unroll
    for (int k = 0; k < n; ++k)
      value[k] = element(widen(x.at[k]), widen(t.at[k]), plain ? T{1} : weight.at(k), plain ? T{1} : pos_weight.at(k),
                         plain || !a.upstream.data ? T{1} : widen(upstream.at[k]), &grad[k]);
    if (a.grad.data) store_pack(static_cast<S*>(a.grad.data) + at, narrow_pack<S>(grad));
    if (!plain && a.value.data) store_pack(static_cast<S*>(a.value.data) + at, narrow_pack<S>(value));
    sum.add(pairwise_sum<n>(value));
  };

  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x, step = int64_t{gridDim.x} * kThreads;
  const int64_t packs = packed ? count / n : 0;
  int64_t i = first;
  if constexpr (plain) {
    for (; i + step < packs; i += 2 * step) {
      const Pack<S> x[2] = {input_at(i), input_at(i + step)}, t[2] = {target_at(i), target_at(i + step)};
      pack(i, x[0], t[0]);
      pack(i + step, x[1], t[1]);
    }
  }
  for (; i < packs; i += step) pack(i, input_at(i), target_at(i));
  // The elements after the last whole pack, or all of them.
  for (i = packs * n + first; i < count; i += step) single(i);
  if (partial) {
    const double total = block_sum(sum.total, reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
  }
}

template <class S>
bool can_pack(const Operand& operand) {
  return !operand.data || (operand.linear && misaligned(static_cast<const S*>(operand.data)) == 0 &&
                           reinterpret_cast<uintptr_t>(operand.data) % sizeof(S) == 0);
}

template <class Loss, class S>
cudaError_t launch_loss(const ElementwiseArgs& a, int64_t count, const void* scalar_upstream, double* partial,
                        cudaStream_t stream) {
  const bool packed = can_pack<S>(a.input) && can_pack<S>(a.target) && can_pack<S>(a.grad) && can_pack<S>(a.value) &&
                      can_pack<S>(a.upstream);
  const bool plain = !a.weight.data && !a.pos_weight.data && !a.upstream.data && !a.value.data;
  const auto kernel = plain ? elementwise_kernel<Loss, S, true> : elementwise_kernel<Loss, S, false>;
  return launch(kernel, static_cast<unsigned>(elementwise_blocks(count)), kThreads, 1,
                kThreads / kWarp * sizeof(double), stream, a, count, packed, static_cast<const S*>(scalar_upstream),
                partial);
}

// Loss64 is the formula for double.
template <class Loss, class Loss64 = Loss>
cudaError_t for_dtype(const ElementwiseArgs& a, int64_t count, const void* scalar_upstream, double* partial,
                      cudaStream_t stream) {
  switch (a.input.dtype) {
    case DType::f64: return launch_loss<Loss64, double>(a, count, scalar_upstream, partial, stream);
    case DType::bf16: return launch_loss<Loss, bf16>(a, count, scalar_upstream, partial, stream);
    case DType::f16: return launch_loss<Loss, f16>(a, count, scalar_upstream, partial, stream);
    case DType::f32: break;
  }
  return launch_loss<Loss, float>(a, count, scalar_upstream, partial, stream);
}

constexpr int kFinishThreads = 512;

template <class S>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const double* partial, int64_t blocks, double factor, S* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kFinishThreads) sum += partial[i];
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) *loss = Narrow<S>::from(static_cast<typename ComputeOf<S>::T>(sum * factor));
}

template <class S>
cudaError_t launch_finish(const double* partial, int64_t blocks, double factor, void* loss, cudaStream_t stream) {
  return launch(finish_kernel<S>, 1, kFinishThreads, 1, kFinishThreads / kWarp * sizeof(double), stream, partial,
                blocks, factor, static_cast<S*>(loss));
}

}  // namespace

int64_t elementwise_blocks(int64_t count) {
  constexpr int64_t elements = kThreads * kElementsAThread;
  return std::clamp((count + elements - 1) / elements, int64_t{1}, kMaxBlocks);
}

cudaError_t elementwise(const ElementwiseArgs& a, int64_t count, const void* scalar_upstream, double* partial,
                        cudaStream_t stream) {
  const auto with = [&](auto loss, auto loss64) {
    return for_dtype<decltype(loss), decltype(loss64)>(a, count, scalar_upstream, partial, stream);
  };
  using AnyFocal = SigmoidFocal<Focusing::above_one>;  // also where a loop of its own is not worth its code
  switch (a.loss) {
    case Elementwise::bce_with_logits: return with(BceWithLogits{}, BceWithLogits{});
    case Elementwise::bce: return with(Bce{}, Bce{});
    case Elementwise::sigmoid_focal: break;
  }
  switch (focusing_of(a.gamma)) {
    case Focusing::zero: return with(SigmoidFocal<Focusing::zero>{}, SigmoidFocal<Focusing::zero>{});
    case Focusing::below_one: return with(SigmoidFocal<Focusing::below_one>{}, SigmoidFocal<Focusing::below_one>{});
    case Focusing::three_halves: return with(SigmoidFocal<Focusing::three_halves>{}, AnyFocal{});
    case Focusing::two: return with(SigmoidFocal<Focusing::two>{}, AnyFocal{});
    case Focusing::one:
    case Focusing::above_one: break;
  }
  return with(AnyFocal{}, AnyFocal{});
}

cudaError_t finish(const double* partial, int64_t blocks, double factor, void* loss, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::f64: return launch_finish<double>(partial, blocks, factor, loss, stream);
    case DType::bf16: return launch_finish<bf16>(partial, blocks, factor, loss, stream);
    case DType::f16: return launch_finish<f16>(partial, blocks, factor, loss, stream);
    case DType::f32: break;
  }
  return launch_finish<float>(partial, blocks, factor, loss, stream);
}

}  // namespace fused_losses::cuda
