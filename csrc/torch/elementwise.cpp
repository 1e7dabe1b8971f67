// The element-wise losses as ops on CPU tensors. For each loss of the table at the end:
//   NAME            (input, target, ...) -> loss              no gradient wanted
//   NAME_train      (input, target, ...) -> (loss, gradient)  both from one pass over the input
//   NAME_train_     the same, the gradient overwrites the input
//   NAME_backward   (upstream, input, target, ...) -> gradient
//   NAME_backward_  the same, the gradient overwrites the input
// Shapes: input, target and every gradient [*]; weight and pos_weight broadcast to [*].
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>

#include "torch/tensors.h"

namespace fused_losses {
namespace {

using cpu::Elementwise;
using cpu::ElementwiseArgs;
using cpu::Operand;

constexpr int64_t kChunk = 16384;  // elements a thread takes at a time

struct Options {
  OptionalTensor weight, pos_weight;
  double alpha_positive, alpha_negative, gamma;
  Reduction reduction;
};

// `tensor` seen over the shape of `input`.
Operand operand(const Tensor& tensor, const Tensor& input, const char* name) {
  Operand result;
  result.data = tensor.data_ptr();
  result.dtype = dtype_of(tensor, name);
  const int64_t lead = input.dim() - tensor.dim();
  STD_TORCH_CHECK(lead >= 0, name, " has ", tensor.dim(), " dimensions, more than input's ", input.dim());
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d), wanted = input.size(lead + d);
    STD_TORCH_CHECK(size == wanted || size == 1, name, " has size ", size, " in dimension ", d,
                    ", which does not broadcast to input's ", wanted);
    result.stride[lead + d] = size == 1 ? 0 : tensor.stride(d);
  }
  return result;
}

// Orders the dimensions by the input's strides and merges those that every operand walks through evenly.
void collapse(ElementwiseArgs& args, const Tensor& input) {
  Operand* operands[] = {&args.input,    &args.target, &args.weight, &args.pos_weight,
                         &args.upstream, &args.value,  &args.grad};
  std::vector<int> order;
  for (int d = 0; d < input.dim(); ++d)
    if (input.size(d) != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return args.input.stride[a] > args.input.stride[b]; });

  const ElementwiseArgs before = args;
  const Operand* from[] = {&before.input,    &before.target, &before.weight, &before.pos_weight,
                           &before.upstream, &before.value,  &before.grad};
  constexpr int count = 7;
  args.ndim = 0;
  for (int d : order) {
    const int64_t size = input.size(d);
    bool merges = args.ndim > 0;
    for (int k = 0; k < count && merges; ++k) merges = operands[k]->stride[args.ndim - 1] == size * from[k]->stride[d];
    if (!merges) args.size[args.ndim++] = 1;
    args.size[args.ndim - 1] *= size;
    for (int k = 0; k < count; ++k) operands[k]->stride[args.ndim - 1] = from[k]->stride[d];
  }
  if (args.ndim == 0) {
    args.ndim = 1;
    args.size[0] = 1;
    for (Operand* o : operands) o->stride[0] = 1;
  }
  for (Operand* o : operands) {
    o->linear = true;
    int64_t expected = 1;
    for (int d = args.ndim - 1; d >= 0; --d) {
      o->linear &= o->stride[d] == expected;
      expected *= args.size[d];
    }
  }
}

// The loss (undefined in a backward pass), with the gradient written to *grad where that is wanted.
Tensor run(Elementwise loss, const Tensor& input, const Tensor& target, const Options& options, const Tensor* upstream,
           Tensor* grad) {
  STD_TORCH_CHECK(input.dim() <= kMaxDims, "input has ", input.dim(), " dimensions; at most ", kMaxDims);
  const int64_t count = input.numel();
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;

  ElementwiseArgs args{};
  args.loss = loss;
  args.alpha_positive = options.alpha_positive;
  args.alpha_negative = options.alpha_negative;
  args.gamma = options.gamma;
  args.want_sum = forward;
  args.grad_scale = options.reduction == Reduction::mean ? 1.0 / count : 1.0;
  args.input = operand(input, input, "input");
  args.target = operand(target, input, "target");
  if (options.weight) args.weight = operand(*options.weight, input, "weight");
  if (options.pos_weight) args.pos_weight = operand(*options.pos_weight, input, "pos_weight");
  if (upstream) {
    if (none)
      args.upstream = operand(*upstream, input, "upstream");
    else
      args.grad_scale *= read_scalar(*upstream);
  }
  OptionalTensor value;
  if (forward && none) {
    value = empty_in_order(input);
    args.value = operand(*value, input, "value");
  }
  if (grad) args.grad = operand(*grad, input, "gradient");

  double sum = 0;
  if (count > 0) {
    collapse(args, input);
    const auto& kernels = cpu::kernels();
    sum =
        parallel_sum(count, kChunk, [&](int64_t begin, int64_t end) { return kernels.elementwise(args, begin, end); });
  }
  if (!forward) return *upstream;
  if (loss == Elementwise::bce && std::isnan(sum)) {
    // What is outside [0, 1] has made its loss NaN: so only a NaN is worth a look for one.
    const auto& find = cpu::kernels().find_outside_unit;
    double outside;
    const char* name = find(args, args.input, count, &outside)    ? "input"
                       : find(args, args.target, count, &outside) ? "target"
                                                                  : nullptr;
    if (name)
      throw std::runtime_error("all elements of " + std::string(name) + " should be between 0 and 1, one is " +
                               std::to_string(outside));
  }
  if (none) return *value;
  return scalar(options.reduction == Reduction::mean ? sum / count : sum, input);
}

Options options(const OptionalTensor& weight, const OptionalTensor& pos_weight, double alpha_positive,
                double alpha_negative, double gamma, int64_t reduction) {
  return {weight, pos_weight, alpha_positive, alpha_negative, gamma, static_cast<Reduction>(reduction)};
}

#define OPTION_PARAMETERS                                                                                       \
  OptionalTensor weight, OptionalTensor pos_weight, double alpha_positive, double alpha_negative, double gamma, \
      int64_t reduction
#define OPTIONS options(weight, pos_weight, alpha_positive, alpha_negative, gamma, reduction)

template <Elementwise loss>
Tensor forward(Tensor input, Tensor target, OPTION_PARAMETERS) {
  return run(loss, input, target, OPTIONS, nullptr, nullptr);
}
template <Elementwise loss>
std::tuple<Tensor, Tensor> train(Tensor input, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(input);
  Tensor value = run(loss, input, target, OPTIONS, nullptr, &grad);
  return {value, grad};
}
template <Elementwise loss>
Tensor train_(Tensor input, Tensor target, OPTION_PARAMETERS) {
  return run(loss, input, target, OPTIONS, nullptr, &input);
}
template <Elementwise loss>
Tensor backward(Tensor upstream, Tensor input, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(input);
  run(loss, input, target, OPTIONS, &upstream, &grad);
  return grad;
}
template <Elementwise loss>
void backward_(Tensor upstream, Tensor input, Tensor target, OPTION_PARAMETERS) {
  run(loss, input, target, OPTIONS, &upstream, &input);
}

}  // namespace

#define FUSED_LOSSES_ELEMENTWISE(X) X(bce_with_logits) X(bce) X(sigmoid_focal)

#define OPTION_SCHEMA                                                                                            \
  "Tensor target, Tensor? weight, Tensor? pos_weight, float alpha_positive, float alpha_negative, float gamma, " \
  "int reduction)"

#define DEFINE(name)                                                                   \
  m.def(#name "(Tensor input, " OPTION_SCHEMA " -> Tensor");                           \
  m.def(#name "_train(Tensor input, " OPTION_SCHEMA " -> (Tensor, Tensor)");           \
  m.def(#name "_train_(Tensor(a!) input, " OPTION_SCHEMA " -> Tensor");                \
  m.def(#name "_backward(Tensor upstream, Tensor input, " OPTION_SCHEMA " -> Tensor"); \
  m.def(#name "_backward_(Tensor upstream, Tensor(a!) input, " OPTION_SCHEMA " -> ()");

#define IMPLEMENT(name)                                               \
  m.impl(#name, TORCH_BOX(&forward<Elementwise::name>));              \
  m.impl(#name "_train", TORCH_BOX(&train<Elementwise::name>));       \
  m.impl(#name "_train_", TORCH_BOX(&train_<Elementwise::name>));     \
  m.impl(#name "_backward", TORCH_BOX(&backward<Elementwise::name>)); \
  m.impl(#name "_backward_", TORCH_BOX(&backward_<Elementwise::name>));

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m){FUSED_LOSSES_ELEMENTWISE(DEFINE)} STABLE_TORCH_LIBRARY_IMPL(fused_losses,
                                                                                                           CPU, m) {
  FUSED_LOSSES_ELEMENTWISE(IMPLEMENT)
}

}  // namespace fused_losses
