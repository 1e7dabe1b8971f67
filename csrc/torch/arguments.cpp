#include "torch/arguments.h"

#include <algorithm>

namespace fused_losses {
namespace {

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

int64_t class_dim(const Tensor& logits) { return logits.dim() > 1 ? 1 : 0; }

// Fills the position strides of every [.., C, ..] tensor, merging dimensions that all of them walk through evenly.
// The order stays: positions are numbered as the target is.
void collapse(SoftmaxArgs& args, const Tensor& logits, const Tensor* grad, const Tensor* probability) {
  const Tensor* tensors[] = {&logits, grad, probability};
  int64_t* strides[] = {args.logits_stride, args.grad_stride, args.probability_stride};
  args.ndim = 0;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    const int64_t size = logits.size(d);
    if (d == class_dim(logits) || size == 1) continue;
    bool merges = args.ndim > 0;
    for (int k = 0; k < 3; ++k)
      if (tensors[k] && merges) merges = strides[k][args.ndim - 1] == size * tensors[k]->stride(d);
    if (!merges) args.size[args.ndim++] = 1;
    args.size[args.ndim - 1] *= size;
    for (int k = 0; k < 3; ++k)
      if (tensors[k]) strides[k][args.ndim - 1] = tensors[k]->stride(d);
  }
  if (args.ndim == 0) {
    args.ndim = 1;
    args.size[0] = 1;
  }
}

}  // namespace

ElementwiseCall elementwise_call(Elementwise loss, const Tensor& input, const Tensor& target,
                                 const ElementwiseOptions& options, const Tensor* upstream, Tensor* grad) {
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
  STD_TORCH_CHECK(target.dim() == input.dim(), "target has ", target.dim(), " dimensions, input ", input.dim());
  for (int64_t d = 0; d < input.dim(); ++d)
    STD_TORCH_CHECK(target.size(d) == input.size(d), "target has size ", target.size(d), " in dimension ", d,
                    ", input ", input.size(d));
  if (options.weight) args.weight = operand(*options.weight, input, "weight");
  if (options.pos_weight) args.pos_weight = operand(*options.pos_weight, input, "pos_weight");
  if (upstream && none) args.upstream = operand(*upstream, input, "upstream");
  OptionalTensor value;
  if (forward && none) {
    value = empty_in_order(input);
    args.value = operand(*value, input, "value");
  }
  if (grad) args.grad = operand(*grad, input, "gradient");
  if (count > 0) collapse(args, input);
  return {args, value};
}

SoftmaxCall softmax_call(const Tensor& logits, const Tensor& given_target, const SoftmaxOptions& options,
                         const Tensor* upstream, Tensor* grad) {
  Tensor target = given_target;
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.dim() <= kMaxDims, "input has ", logits.dim(),
                  " dimensions; expected 1 to ", kMaxDims);
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  const int64_t dim = class_dim(logits), classes = logits.size(dim);
  STD_TORCH_CHECK(classes > 0, "input has no classes: dimension ", dim, " has size 0");

  SoftmaxArgs args{};
  args.dtype = dtype_of(logits, "input");
  args.classes = classes;
  args.positions = logits.numel() / classes;
  args.logits = logits.data_ptr();
  args.logits_class_stride = classes == 1 ? 1 : logits.stride(dim);
  args.ignore_index = options.ignore_index;
  STD_TORCH_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, "label_smoothing is ",
                  options.label_smoothing, "; expected 0 to 1");
  args.label_smoothing = options.label_smoothing;
  args.gamma = options.gamma;
  args.count_weights = options.count_weights;

  std::vector<int64_t> target_sizes;
  for (int64_t d = 0; d < logits.dim(); ++d)
    if (d != dim) target_sizes.push_back(logits.size(d));
  const bool index = target.scalar_type() == torch::headeronly::ScalarType::Long;
  if (index) {
    STD_TORCH_CHECK(target.dim() == logits.dim() - 1, "target has ", target.dim(), " dimensions, input ", logits.dim());
    for (int64_t d = 0; d < target.dim(); ++d)
      STD_TORCH_CHECK(target.size(d) == target_sizes[d], "target has size ", target.size(d), " in dimension ", d,
                      "; expected ", target_sizes[d]);
    if (!target.is_contiguous()) target = torch::stable::contiguous(target);
    args.index = static_cast<const int64_t*>(target.data_ptr());
  } else {
    STD_TORCH_CHECK(options.ignore_index < 0, "ignore_index is ", options.ignore_index, ", but target has no indices");
    STD_TORCH_CHECK(dtype_of(target, "target") == args.dtype, "target's dtype differs from input's");
    STD_TORCH_CHECK(target.dim() == logits.dim(), "target has ", target.dim(), " dimensions, input ", logits.dim());
    for (int64_t d = 0; d < logits.dim(); ++d)
      STD_TORCH_CHECK(target.size(d) == logits.size(d), "target has size ", target.size(d), " in dimension ", d,
                      ", input ", logits.size(d));
    args.probability = target.data_ptr();
    args.probability_class_stride = classes == 1 ? 1 : target.stride(dim);
  }
  if (options.weight) {
    const DType compute = args.dtype == DType::f64 ? DType::f64 : DType::f32;
    STD_TORCH_CHECK(dtype_of(*options.weight, "weight") == compute && options.weight->is_contiguous() &&
                        options.weight->dim() == 1 && options.weight->numel() == classes,
                    "weight must be contiguous, (", classes, "), in the compute dtype");
    args.weight = options.weight->data_ptr();
  }
  OptionalTensor upstream_rows;
  args.grad_scale = 1;
  if (upstream && none) {
    STD_TORCH_CHECK(upstream->numel() == args.positions && dtype_of(*upstream, "upstream") == args.dtype,
                    "the upstream gradient must have the loss's shape and dtype");
    upstream_rows = torch::stable::contiguous(*upstream);
    args.upstream = upstream_rows->data_ptr();
  }
  OptionalTensor value;
  if (forward && none) {
    value = empty_contiguous(target_sizes, logits);
    args.value = value->data_ptr();
  }
  if (grad) {
    args.grad = grad->data_ptr();
    args.grad_class_stride = classes == 1 ? 1 : grad->stride(dim);
  }
  collapse(args, logits, grad, index ? nullptr : &target);
  return {args, target, upstream_rows, value};
}

}  // namespace fused_losses
