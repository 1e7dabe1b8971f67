// Three kernels for every element-wise loss, of any size: grid-stride loops. Each operand is moved in once and the
// gradient out once: BCE in fp32 12 bytes an element, in bf16 6; with an index target 8 and 4.
//
// plain: a sum or a mean over a dense target, without weights but one pos_weight for all.
// anchors: a sum or a mean over an index target, packed, an anchor's classes side by side and no less than a pack,
//   without weights but pos_weight.
// The third kernel takes everything else.
// packed: input, target, gradient (and value and upstream under "none") are contiguous and 16-byte aligned; a thread
//   moves 16 bytes of each at a time, and in the first two kernels loads two packs before it uses the first. In the
//   third the weights may have any strides: a pack that stays inside one run of the last dimension finds its place
//   once; so does an index target, which is read once for the pack's anchor. A pack that crosses runs is taken element
//   by element.
// otherwise: one element at a time, every operand by its strides.
//
// Nearly all of a detector's targets are 0, and a target of 0 has a shorter formula: the anchors kernel takes it for
// packs without a positive, and the plain kernel in 16 bits, where instructions cost more time than bytes.
//
// S is what input and gradient are stored in, O the loss and its upstream gradient: S, or float beside a narrower S, as
// autocast has it. O decides how precise the formula is; beside a float O the target may be float, too.
//
// Values are added up in packs, by each thread with compensation, by the block in double, and by finish() in the
// blocks' order: the same bits on every run.
//
// One file a storage type includes this, elementwise_f32.cu and so on, for the compiler takes a minute for each.
#pragma once
#include <algorithm>

#include "cuda/elementwise.h"
#include "cuda/formulas.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct ElementwiseParams {
  using Exponent = std::conditional_t<std::is_same_v<T, double>, double, float>;
  T alpha_positive, alpha_negative, slope;
  Exponent gamma, gamma_minus_one;
  __device__ __forceinline__ explicit ElementwiseParams(const ElementwiseArgs& a)
      : alpha_positive(static_cast<T>(a.alpha_positive)),
        alpha_negative(static_cast<T>(a.alpha_negative)),
        slope(static_cast<T>(a.detach_weight ? 0 : a.gamma)),
        gamma(static_cast<Exponent>(a.gamma)),
        gamma_minus_one(static_cast<Exponent>(a.gamma - 1)) {}
};

// The formula at one element.
template <class Loss, class V, class T>
__device__ __forceinline__ ValueGrad<V> loss_of(T x, T t, ElementWeights<V> weights,
                                                const ElementwiseParams<V>& params) {
  if constexpr (std::is_same_v<Loss, Bce>) require_probability(x);
  Sigmoid<V> sigma{};
  if constexpr (Loss::on_logits) sigma = sigmoid(V(x));
  return Loss::apply(V(x), sigma, V(t), weights, params);
}

// Where element i of the common shape is in an operand.
__device__ __forceinline__ int64_t place_of(const ElementwiseArgs& a, const Operand& operand, int64_t i) {
  return operand.linear ? i : offset_of(a, operand.stride, i);
}

// A weight may be of the compute dtype beside a narrower input.
template <class S>
__device__ __forceinline__ typename ComputeOf<S>::T value_at(const Operand& operand, int64_t offset) {
  if constexpr (sizeof(S) == 2)
    if (operand.dtype == DType::f32) return static_cast<const float*>(operand.data)[offset];
  return widen(static_cast<const S*>(operand.data)[offset]);
}
template <class S>
__device__ __forceinline__ typename ComputeOf<S>::T read(const ElementwiseArgs& a, const Operand& operand, int64_t i) {
  return operand.data ? value_at<S>(operand, place_of(a, operand, i)) : typename ComputeOf<S>::T{1};
}

// As many neighbours as a pack of S holds: a pack, or (beside a wider O) numbers that were stored as S or as O.
template <class S>
struct Widened {
  typename ComputeOf<S>::T at[Pack<S>::size];
};
template <class S, class O>
using Neighbours = std::conditional_t<std::is_same_v<S, O>, Pack<S>, Widened<S>>;
template <class S, class O>
__device__ __forceinline__ Neighbours<S, O> load_neighbours(const Operand& operand, int64_t at) {
  if constexpr (std::is_same_v<S, O>) {
    return load_pack(static_cast<const S*>(operand.data) + at);
  } else {
    Widened<S> x;
    if (operand.dtype == DType::f32)
      load_packs(static_cast<const O*>(operand.data) + at, x.at);
    else
      load_packs(static_cast<const S*>(operand.data) + at, x.at);
    return x;
  }
}

// The elements i, i + 1, ... of a weight, within one run of the last dimension.
template <class S>
struct WeightRun {
  const Operand& operand;
  int64_t offset, step;

  __device__ __forceinline__ WeightRun(const ElementwiseArgs& a, const Operand& o, int64_t i)
      : operand(o), offset(o.data ? place_of(a, o, i) : 0), step(o.linear ? 1 : o.stride[a.ndim - 1]) {}
  __device__ __forceinline__ typename ComputeOf<S>::T at(int k) const {
    return operand.data ? value_at<S>(operand, offset + k * step) : typename ComputeOf<S>::T{1};
  }
};

template <class T>
struct Target {
  T t;
  bool ignored;
};

// The elements i, i + 1, ... of an index target, within one run of the last dimension.
template <class T>
struct IndexRun {
  const IndexTarget& index;
  int64_t anchor, from, anchor_step, class_step;  // from: the class of the first element

  __device__ __forceinline__ IndexRun(const ElementwiseArgs& a, int64_t i) : index(a.index) {
    if (!index.code) return;
    const int last = a.ndim - 1;
    anchor = offset_of(a, index.stride, i);
    class_step = index.class_dim == last;
    anchor_step = class_step ? 0 : index.stride[last];
    for (int d = last; d > index.class_dim; --d) i /= a.size[d];
    from = i % a.size[index.class_dim];
  }
  __device__ __forceinline__ Target<T> at(int k) const {
    const int64_t here = anchor + k * anchor_step;
    const int32_t code = index.code[here];
    if (code != from + k * class_step) return {static_cast<T>(index.negative), code == kIgnored};
    return {index.score ? static_cast<const T*>(index.score)[here] : static_cast<T>(index.positive), false};
  }
};

// What the mean divides by, the same in every thread; `scratch` holds a double a warp.
__device__ __forceinline__ double denominator_of(const ElementwiseBuffers& b, double* scratch) {
  if (b.avg_factor) return *b.avg_factor < 1 ? 1 : *b.avg_factor;  // NaN stays
  if (!b.counts) return 1;
  double count = 0;
  for (int64_t i = threadIdx.x; i < b.count_blocks; i += blockDim.x) count += b.counts[i];
  return block_sum(count, scratch) * b.classes;
}

// What every gradient is multiplied by: the mean's factor and an upstream gradient for all.
template <class T, class O>
__device__ __forceinline__ T gradient_scale(const ElementwiseArgs& a, const ElementwiseBuffers& b, double* scratch) {
  const T scale = static_cast<T>(a.grad_scale / denominator_of(b, scratch));
  return b.scalar_upstream ? scale * widen(*static_cast<const O*>(b.scalar_upstream)) : scale;
}

template <class Loss, class S, class O>
__global__ void __launch_bounds__(kThreads, 2)
    elementwise_kernel(const ElementwiseArgs a, int64_t count, bool packed, const ElementwiseBuffers b) {
  using T = typename ComputeOf<S>::T;
  using V = typename FormulaOf<O>::V;
  constexpr int n = Pack<S>::size;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const ElementwiseParams<V> params(a);
  const T scale = gradient_scale<T, O>(a, b, scratch);
  const bool indexed = a.index.code;
  Sum<T> sum;

  const auto element = [&](T x, Target<T> target, T weight, T pos_weight, T alpha, T upstream, T* grad) {
    ElementWeights<V> weights{V(pos_weight), params.alpha_positive, params.alpha_negative};
    if (a.alpha.data) {
      weights.alpha_positive = V(alpha);
      weights.alpha_negative = V(1 - alpha);
    }
    const ValueGrad<V> loss = loss_of<Loss>(x, target.t, weights, params);
    *grad = target.ignored ? T{0} : static_cast<T>(loss.grad) * weight * scale * upstream;
    return target.ignored ? T{0} : static_cast<T>(loss.value) * weight;
  };
  const auto probability_of = [](T x) {
    const T far = sigmoid(x).far;
    return x >= 0 ? 1 - far : far;
  };
  const auto pack = [&](int64_t at) {
    const Pack<S> x = load_pack(static_cast<const S*>(a.input.data) + at);
    const WeightRun<S> weight(a, a.weight, at), pos_weight(a, a.pos_weight, at), alpha(a, a.alpha, at);
    const IndexRun<T> index(a, at);
    Neighbours<S, O> t, upstream;
    if (!indexed) t = load_neighbours<S, O>(a.target, at);
    if (a.upstream.data) upstream = load_neighbours<S, O>(a.upstream, at);
    T value[n], grad[n], probability[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const Target<T> target = indexed ? index.at(k) : Target<T>{widen(t.at[k]), false};
      value[k] = element(widen(x.at[k]), target, weight.at(k), pos_weight.at(k), alpha.at(k),
                         a.upstream.data ? widen(upstream.at[k]) : T{1}, &grad[k]);
      if (a.probability.data) probability[k] = probability_of(widen(x.at[k]));
    }
    if (a.grad.data) store_pack(static_cast<S*>(a.grad.data) + at, narrow_pack<S>(grad));
    if (a.value.data) store_packs(static_cast<O*>(a.value.data) + at, value);
    if (a.probability.data) store_pack(static_cast<S*>(a.probability.data) + at, narrow_pack<S>(probability));
    sum.add(pairwise_sum<n>(value));
  };
  const auto single = [&](int64_t i) {
    T g;
    const T x = read<S>(a, a.input, i);
    const Target<T> target = indexed ? IndexRun<T>(a, i).at(0) : Target<T>{read<S>(a, a.target, i), false};
    const T v = element(x, target, read<S>(a, a.weight, i), read<S>(a, a.pos_weight, i), read<S>(a, a.alpha, i),
                        read<O>(a, a.upstream, i), &g);
    sum.add(v);
    if (a.grad.data) static_cast<S*>(a.grad.data)[place_of(a, a.grad, i)] = Narrow<S>::from(g);
    if (a.value.data) static_cast<O*>(a.value.data)[place_of(a, a.value, i)] = Narrow<O>::from(v);
    if (a.probability.data)
      static_cast<S*>(a.probability.data)[place_of(a, a.probability, i)] = Narrow<S>::from(probability_of(x));
  };
  const auto is_flat = [](const Operand& weight) { return !weight.data || weight.linear; };
  const bool flat = !indexed && is_flat(a.weight) && is_flat(a.pos_weight) && is_flat(a.alpha);
  const int64_t run = a.size[a.ndim - 1];
  const int64_t packs = packed ? count / n : 0, units = packs + (count - packs * n);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x; unit < units; unit += step) {
    const bool whole = unit < packs;
    const int64_t at = whole ? unit * n : packs * n + (unit - packs);
    if (whole && (flat || at % run + n <= run)) {
      pack(at);
    } else {  // one place for packs that cross runs and for what follows the last one: the compiler takes long for it
      for (int64_t i = at; i < at + (whole ? n : 1); ++i) single(i);
    }
  }
  if (b.partial) {
    const double total = block_sum(sum.total, scratch);
    if (threadIdx.x == 0) b.partial[blockIdx.x] = total;
  }
}

template <class Neighbours>
__device__ __forceinline__ bool all_zero(const Neighbours& x) {
  uint32_t words[sizeof x / 4], any = 0;
  memcpy(words, &x, sizeof x);
#pragma unroll
  for (const uint32_t word : words) any |= word;
  return any == 0;
}

// A pack's gradients, and the sum of its values.
template <class Loss, class V, class S, class T, int n>
__device__ __forceinline__ T pack_of(const ElementwiseParams<V>& params, ElementWeights<V> weights, const Pack<S>& x,
                                     const T (&t)[n], T scale, T (&grad)[n]) {
  T value[n];
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const ValueGrad<V> loss = loss_of<Loss>(widen(x.at[k]), t[k], weights, params);
    value[k] = static_cast<T>(loss.value);
    grad[k] = static_cast<T>(loss.grad) * scale;
  }
  return pairwise_sum<n>(value);
}

// Three blocks a multiprocessor, so that enough bytes are on their way.
template <class Loss, class S, class O>
__global__ void __launch_bounds__(kThreads, 3)
    elementwise_plain_kernel(const ElementwiseArgs a, int64_t count, bool packed, const ElementwiseBuffers b) {
  using T = typename ComputeOf<S>::T;
  using V = typename FormulaOf<O>::V;
  constexpr int n = Pack<S>::size;
  const ElementwiseParams<V> params(a);
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const T scale = gradient_scale<T, O>(a, b, scratch);
  const ElementWeights<V> weights{V(a.pos_weight.data ? value_at<S>(a.pos_weight, 0) : T{1}), params.alpha_positive,
                                  params.alpha_negative};
  Sum<T> sum;

  const auto input_at = [&](int64_t i) { return load_pack(static_cast<const S*>(a.input.data) + i * n); };
  const auto target_at = [&](int64_t i) { return load_neighbours<S, O>(a.target, i * n); };
  const auto pack = [&](int64_t i, const Pack<S>& x, const Neighbours<S, O>& neighbours, bool whole_warp) {
    T t[n], grad[n], value;
#pragma unroll
    for (int k = 0; k < n; ++k) t[k] = widen(neighbours.at[k]);
    if constexpr (sizeof(S) == 2 && Loss::on_logits)
      // The warp decides: else lanes with a positive and lanes without would wait for each other.
      value = whole_warp && !any_in_warp(!all_zero(neighbours))
                  ? pack_of<typename Loss::Negative>(params, weights, x, t, scale, grad)
                  : pack_of<Loss>(params, weights, x, t, scale, grad);
    else
      value = pack_of<Loss>(params, weights, x, t, scale, grad);
    if (a.grad.data) store_pack(static_cast<S*>(a.grad.data) + i * n, narrow_pack<S>(grad));
    sum.add(value);
  };
  const unsigned step = gridDim.x * kThreads;  // of 32 bits, which it fits: with a register more sm_100 spills
  const int64_t packs = packed ? count / n : 0;
  int64_t p = blockIdx.x * kThreads + threadIdx.x;
  const auto warp_ends_by = [&](int64_t p) { return (p | (kWarp - 1)) < packs; };
  if constexpr (std::is_same_v<S, O>) {  // elsewhere the target may be two packs itself
    for (; warp_ends_by(p + step); p += step) {
      const Pack<S> x[2] = {input_at(p), input_at(p + step)}, t[2] = {target_at(p), target_at(p + step)};
      pack(p, x[0], t[0], true);
      p += step;
      pack(p, x[1], t[1], true);
    }
  }
  for (; p < packs; p += step) pack(p, input_at(p), target_at(p), warp_ends_by(p));
  // The elements after the last whole pack, or all of them. p is beyond the packs by less than a step, another number
  // in every thread; to keep the thread's own in its place would take two registers.
  for (int64_t i = packs * n + (p - packs); i < count; i += step) {
    const ValueGrad<V> loss = loss_of<Loss>(read<S>(a, a.input, i), read<S>(a, a.target, i), weights, params);
    sum.add(static_cast<T>(loss.value));
    if (a.grad.data)
      static_cast<S*>(a.grad.data)[place_of(a, a.grad, i)] = Narrow<S>::from(static_cast<T>(loss.grad) * scale);
  }
  if (b.partial) {
    const double total = block_sum(sum.total, scratch);
    if (threadIdx.x == 0) b.partial[blockIdx.x] = total;
  }
}

// Where a pack's first element is: its anchor and class. `code` is the anchor's, `next` that of the anchor after it if
// the pack reaches so far.
struct AnchorPlace {
  int anchor, from;
  int32_t code, next;
};

template <class Loss, class S, class O>
__global__ void __launch_bounds__(kThreads, 3)
    elementwise_anchors_kernel(const ElementwiseArgs a, int64_t count, const ElementwiseBuffers b) {
  using T = typename ComputeOf<S>::T;
  using V = typename FormulaOf<O>::V;
  constexpr int n = Pack<S>::size;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const ElementwiseParams<V> params(a);
  const T scale = gradient_scale<T, O>(a, b, scratch);
  const S* input = static_cast<const S*>(a.input.data);
  S* grad = static_cast<S*>(a.grad.data);
  const int classes = static_cast<int>(a.size[1]);
  Sum<T> sum;

  // Element i, of class c and the anchor with this code.
  const auto single = [&](int64_t i, S x, int anchor, int32_t code, int c) {
    T t = 0, pos_weight = 1;
    if (code == c) {
      t = a.index.score ? static_cast<const T*>(a.index.score)[anchor] : static_cast<T>(a.index.positive);
      if (a.pos_weight.data)
        pos_weight = value_at<S>(a.pos_weight, anchor * a.pos_weight.stride[0] + c * a.pos_weight.stride[1]);
    }
    const ElementWeights<V> weights{V(pos_weight), params.alpha_positive, params.alpha_negative};
    const ValueGrad<V> loss = loss_of<Loss>(widen(x), t, weights, params);
    const bool ignored = code == kIgnored;
    if (grad) grad[i] = Narrow<S>::from(ignored ? T{0} : static_cast<T>(loss.grad) * scale);
    sum.add(ignored ? T{0} : static_cast<T>(loss.value));
  };
  const auto find = [&](AnchorPlace& place) {
    place.code = a.index.code[place.anchor];
    place.next = place.from + n > classes ? a.index.code[place.anchor + 1] : kBackground;
  };
  // All are taken for negatives, but for a few of logit -inf, whose loss is 0 then: the ignored ones, and the
  // positives, which follow.
  const auto pack = [&](int64_t p, const Pack<S>& x, const AnchorPlace& place) {
    const int left = classes - place.from;  // of the anchor's classes, from the pack's first on
    const auto is_here = [&](int k) { return static_cast<unsigned>(k) < n; };
    const int positive = place.code - place.from, next_positive = place.next < 0 ? n : place.next + left;
    unsigned others = 0;  // a bit an element
    Pack<S> negative = x;
    if (is_here(positive) || is_here(next_positive) || place.code == kIgnored || place.next == kIgnored) {
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const bool other = k == positive || k == next_positive || (k < left ? place.code : place.next) == kIgnored;
        others |= unsigned{other} << k;
        if (other) negative.at[k] = Narrow<S>::from(static_cast<T>(-__builtin_inf()));
      }
    }
    const T nothing[n] = {};
    T out[n];
    const ElementWeights<V> weights{V(1), params.alpha_positive, params.alpha_negative};
    sum.add(pack_of<typename Loss::Negative>(params, weights, negative, nothing, scale, out));
    if (others) {
#pragma unroll
      for (int k = 0; k < n; ++k) out[k] = others >> k & 1 ? T{0} : out[k];  // 0 times a scale that is not finite
    }
    if (grad) store_pack(grad + p * n, narrow_pack<S>(out));
    if (others) {
#pragma unroll 1
      for (int second = 0; second < 2; ++second) {
        const int at = second ? next_positive : positive;
        if (!is_here(at)) continue;
        S logit = x.at[0];
#pragma unroll
        for (int k = 1; k < n; ++k)
          if (k == at) logit = x.at[k];
        const int32_t code = second ? place.next : place.code;
        single(p * n + at, logit, place.anchor + second, code, code);
      }
    }
  };

  const unsigned step = gridDim.x * kThreads;
  const int64_t packs = count / n;
  int64_t p = blockIdx.x * kThreads + threadIdx.x;
  const int step_anchors = static_cast<int>(int64_t{step} * n / classes);
  const int step_classes = static_cast<int>(int64_t{step} * n % classes);
  AnchorPlace place{static_cast<int>(p * n / classes), static_cast<int>(p * n % classes), 0, 0};
  const auto after = [&](AnchorPlace at) {
    at.anchor += step_anchors;
    at.from += step_classes;
    if (at.from >= classes) {
      at.from -= classes;
      ++at.anchor;
    }
    return at;
  };
  for (; p + step < packs; p += step) {
    const Pack<S> x[2] = {load_pack(input + p * n), load_pack(input + (p + step) * n)};
    AnchorPlace second = after(place);
    find(place);
    find(second);
    pack(p, x[0], place);
    p += step;
    pack(p, x[1], second);
    place = after(second);
  }
  if (p < packs) {
    find(place);
    pack(p, load_pack(input + p * n), place);
    p += step;
  }
  // The elements after the last whole pack, as in the plain kernel, are the last anchor's.
  const int64_t i = packs * n + (p - packs);
  if (i < count) {
    const int anchor = static_cast<int>(i / classes), c = static_cast<int>(i % classes);
    single(i, input[i], anchor, a.index.code[anchor], c);
  }
  if (b.partial) {
    const double total = block_sum(sum.total, scratch);
    if (threadIdx.x == 0) b.partial[blockIdx.x] = total;
  }
}

inline bool can_pack(const Operand& operand) {
  return !operand.data || (operand.linear && reinterpret_cast<uintptr_t>(operand.data) % 16 == 0);
}

template <class Loss, class S, class O = S>
cudaError_t launch_loss(const ElementwiseArgs& a, int64_t count, const ElementwiseBuffers& b, cudaStream_t stream) {
  bool packed = true;
  for (const Operand* o : {&a.input, &a.target, &a.grad, &a.value, &a.upstream, &a.probability}) packed &= can_pack(*o);
  const auto blocks = static_cast<unsigned>(b.blocks);
  constexpr size_t shared = kThreads / kWarp * sizeof(double);
  const auto with = [&](auto kernel, auto... more) {
    return launch(kernel, blocks, kThreads, 1, shared, stream, a, count, more..., b);
  };
  bool reduced = true, one_pos_weight = true;
  for (const Operand* o : {&a.weight, &a.alpha, &a.upstream, &a.value, &a.probability}) reduced &= !o->data;
  for (int d = 0; d < a.ndim; ++d) one_pos_weight &= a.pos_weight.stride[d] == 0;
  if (reduced && one_pos_weight && !a.index.code) return with(elementwise_plain_kernel<Loss, S, O>, packed);
  if constexpr (sizeof(S) < 8 && Loss::on_logits) {
    if (reduced && packed && a.index.code && a.index.negative == 0 && a.ndim == 2 && a.index.class_dim == 1 &&
        a.index.stride[0] == 1 && a.size[1] >= Pack<S>::size && std::max(a.size[0], a.size[1]) < 1 << 30)
      return with(elementwise_anchors_kernel<Loss, S, O>);
  }
  return with(elementwise_kernel<Loss, S, O>, packed);
}

template <class S, class O = S>
cudaError_t elementwise_as(const ElementwiseArgs& a, int64_t count, const ElementwiseBuffers& b, cudaStream_t stream) {
  const auto with = [&](auto loss) { return launch_loss<decltype(loss), S, O>(a, count, b, stream); };
  // In double a power is not worth a kernel of its own.
  constexpr bool own = !std::is_same_v<S, double>;
  constexpr Focusing two = own ? Focusing::two : Focusing::above_one;
  constexpr Focusing three_halves = own ? Focusing::three_halves : Focusing::above_one;
  const Focusing focusing = focusing_of(a.gamma);
  switch (a.loss) {
    case Elementwise::bce_with_logits: return with(BceWithLogits{});
    case Elementwise::bce: return with(Bce{});
    case Elementwise::quality_focal:
      switch (focusing) {
        case Focusing::zero: return with(BceWithLogits{});
        case Focusing::below_one: return with(QualityFocal<Focusing::below_one>{});
        case Focusing::two: return with(QualityFocal<two>{});
        default: return with(QualityFocal<Focusing::above_one>{});
      }
    case Elementwise::varifocal:
      switch (focusing) {
        case Focusing::zero: return with(Varifocal<Focusing::zero>{});
        case Focusing::below_one: return with(Varifocal<Focusing::below_one>{});
        case Focusing::two: return with(Varifocal<two>{});
        default: return with(Varifocal<Focusing::above_one>{});
      }
    case Elementwise::sigmoid_focal: break;
  }
  switch (focusing) {
    case Focusing::zero: return with(SigmoidFocal<Focusing::zero>{});
    case Focusing::below_one: return with(SigmoidFocal<Focusing::below_one>{});
    case Focusing::three_halves: return with(SigmoidFocal<three_halves>{});
    case Focusing::two: return with(SigmoidFocal<two>{});
    default: return with(SigmoidFocal<Focusing::above_one>{});
  }
}

}  // namespace
}  // namespace fused_losses::cuda
