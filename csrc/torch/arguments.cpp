#include "torch/arguments.h"

#include <algorithm>

namespace fused_losses {
namespace {

// Of the loss and its upstream gradient.
DType value_dtype(DType input, bool wide) {
  const bool narrow = input == DType::bf16 || input == DType::f16;
  return wide && narrow ? DType::f32 : input;
}

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

// Labels, and scores, in the order of the anchors: input's shape without its classes.
void index_target(ElementwiseCall& call, const Tensor& input, const Tensor& labels, const ElementwiseOptions& options) {
  const int64_t dim = options.class_dim, dims = input.dim();
  STD_TORCH_CHECK(dim >= 0 && dim < dims, "class_dim is ", dim, "; input has ", dims, " dimensions");
  STD_TORCH_CHECK(labels.dim() == dims - 1, "labels has ", labels.dim(), " dimensions, input ", dims);
  IndexTarget& index = call.args.index;
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (d == dim) continue;
    const int64_t size = labels.size(d < dim ? d : d - 1);
    STD_TORCH_CHECK(size == input.size(d), "labels has size ", size, " where input has ", input.size(d));
    index.stride[d] = stride;
    stride *= size;
  }
  index.class_dim = static_cast<int>(dim);
  index.positive = options.positive;
  index.negative = options.negative;
  call.anchors = labels.numel();
  call.label = torch::stable::contiguous(labels);
  call.code = empty_codes(call.anchors, input);
  index.code = static_cast<int32_t*>(call.code->data_ptr());
  call.labels = {static_cast<const int64_t*>(call.label->data_ptr()), static_cast<int32_t*>(call.code->data_ptr()),
                 input.size(dim), options.background, options.ignore_index};
  if (!options.scores) return;
  const DType compute = call.args.input.dtype == DType::f64 ? DType::f64 : DType::f32;
  STD_TORCH_CHECK(dtype_of(*options.scores, "scores") == compute && options.scores->is_contiguous() &&
                      options.scores->numel() == call.anchors,
                  "scores must be contiguous, one for each of ", call.anchors, " anchors, in the compute dtype");
  index.score = options.scores->data_ptr();
}

// Orders the dimensions by the input's strides and merges those that every operand walks through evenly. The classes of
// an index target stay a dimension of their own.
void collapse(ElementwiseArgs& args, const Tensor& input) {
  Operand* const operands[] = {&args.input,    &args.target, &args.weight, &args.pos_weight, &args.alpha,
                               &args.upstream, &args.value,  &args.grad,   &args.probability};
  std::vector<int64_t*> strides{args.index.stride};
  for (Operand* o : operands) strides.push_back(o->stride);
  const int class_dim = args.index.code ? args.index.class_dim : -1;
  std::vector<int> order;
  for (int d = 0; d < input.dim(); ++d)
    if (input.size(d) != 1 || d == class_dim) order.push_back(d);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return args.input.stride[a] > args.input.stride[b]; });

  std::vector<std::vector<int64_t>> before;
  for (const int64_t* stride : strides) before.emplace_back(stride, stride + input.dim());
  args.ndim = 0;
  bool apart = false;  // the dimension before this one holds the classes
  for (int d : order) {
    const int64_t size = input.size(d);
    bool merges = args.ndim > 0 && d != class_dim && !apart;
    for (size_t k = 0; k < strides.size() && merges; ++k) merges = strides[k][args.ndim - 1] == size * before[k][d];
    if (!merges) args.size[args.ndim++] = 1;
    args.size[args.ndim - 1] *= size;
    for (size_t k = 0; k < strides.size(); ++k) strides[k][args.ndim - 1] = before[k][d];
    apart = d == class_dim;
    if (apart) args.index.class_dim = args.ndim - 1;
  }
  if (args.ndim == 0) {
    args.ndim = 1;
    args.size[0] = 1;
    for (int64_t* stride : strides) stride[0] = 1;
  }
  for (Operand* o : operands) {
    o->linear = true;
    int64_t expected = 1;
    for (int d = args.ndim - 1; d >= 0; --d) {
      o->linear &= o->stride[d] == expected || args.size[d] == 1;
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
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;

  ElementwiseCall call{};
  ElementwiseArgs& args = call.args;
  args.loss = loss;
  args.alpha_positive = options.alpha_positive;
  args.alpha_negative = options.alpha_negative;
  args.gamma = options.gamma;
  args.detach_weight = options.detach_weight;
  args.want_sum = forward;
  args.grad_scale = 1;
  args.input = operand(input, input, "input");
  const DType own = args.input.dtype, compute = own == DType::f64 ? DType::f64 : DType::f32;
  args.value_dtype = value_dtype(own, options.wide);
  const bool indexed = options.head && target.scalar_type() == torch::headeronly::ScalarType::Long;
  if (indexed) {
    index_target(call, input, target, options);
  } else {
    args.target = operand(target, input, "target");
    STD_TORCH_CHECK(target.dim() == input.dim(), "target has ", target.dim(), " dimensions, input ", input.dim());
    for (int64_t d = 0; d < input.dim(); ++d)
      STD_TORCH_CHECK(target.size(d) == input.size(d), "target has size ", target.size(d), " in dimension ", d,
                      ", input ", input.size(d));
  }
  if (options.weight) args.weight = operand(*options.weight, input, "weight");
  if (options.pos_weight) args.pos_weight = operand(*options.pos_weight, input, "pos_weight");
  if (options.alpha) args.alpha = operand(*options.alpha, input, "alpha");
  if (options.probability) args.probability = operand(*options.probability, input, "probability");
  if (upstream && none) args.upstream = operand(*upstream, input, "upstream");
  if (forward && none) {
    // In the order torch's function has it: that of its first operand.
    const Tensor& first = loss == Elementwise::bce || indexed ? input : target;
    call.value = empty_in_order(first, args.value_dtype != own);
    args.value = operand(*call.value, input, "value");
  }
  if (grad) args.grad = operand(*grad, input, "gradient");
  STD_TORCH_CHECK(indexed || args.target.dtype == own || args.target.dtype == args.value_dtype,
                  "target must have the input's dtype, or the loss's");
  STD_TORCH_CHECK(!options.probability || args.probability.dtype == own, "probability must have the input's dtype");
  STD_TORCH_CHECK(!upstream || !none || args.upstream.dtype == args.value_dtype,
                  "the upstream gradient must have the loss's dtype");
  const auto is_weight = [&](const OptionalTensor& given, const Operand& o) {
    return !given || o.dtype == own || o.dtype == compute;
  };
  STD_TORCH_CHECK(is_weight(options.weight, args.weight) && is_weight(options.pos_weight, args.pos_weight) &&
                      is_weight(options.alpha, args.alpha),
                  "weights must have the input's dtype, or that of its arithmetic");
  if (input.numel() > 0) collapse(args, input);
  return call;
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
  args.value_dtype = value_dtype(args.dtype, options.wide);
  args.classes = classes;
  args.positions = logits.numel() / classes;
  args.logits = logits.data_ptr();
  args.logits_class_stride = classes == 1 ? 1 : logits.stride(dim);
  args.ignore_index = options.ignore_index;
  STD_TORCH_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, "label_smoothing is ",
                  options.label_smoothing, "; expected 0 to 1");
  args.label_smoothing = args.classes == 1 ? 0 : options.label_smoothing;  // which one class has no other to share with
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
    args.probability_dtype = dtype_of(target, "target");
    STD_TORCH_CHECK(args.probability_dtype == args.dtype || args.probability_dtype == args.value_dtype,
                    "target must have the input's dtype, or the loss's");
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
    STD_TORCH_CHECK(upstream->numel() == args.positions && dtype_of(*upstream, "upstream") == args.value_dtype,
                    "the upstream gradient must have the loss's shape and dtype");
    upstream_rows = torch::stable::contiguous(*upstream);
    args.upstream = upstream_rows->data_ptr();
  }
  OptionalTensor value;
  if (forward && none) {
    const bool wider = args.value_dtype != args.dtype;
    value = wider ? empty_compute(target_sizes, logits) : empty_contiguous(target_sizes, logits);
    args.value = value->data_ptr();
  }
  if (grad) {
    args.grad = grad->data_ptr();
    args.grad_class_stride = classes == 1 ? 1 : grad->stride(dim);
  }
  collapse(args, logits, grad, index ? nullptr : &target);
  return {args, target, upstream_rows, value};
}

DistributionCall distribution_call(const Tensor& logits, const Tensor& target, const DistributionOptions& options,
                                   const Tensor* upstream, Tensor* grad) {
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.dim() <= kMaxDims, "input has ", logits.dim(),
                  " dimensions; expected 1 to ", kMaxDims);
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  const int64_t dim = class_dim(logits), classes = logits.size(dim);
  STD_TORCH_CHECK(classes > 0, "input has no bins: dimension ", dim, " has size 0");
  const DType dtype = dtype_of(logits, "input"), compute = dtype == DType::f64 ? DType::f64 : DType::f32;

  DistributionCall call{{}, torch::stable::contiguous(target), {}, {}, {}};
  SoftmaxArgs& rows = call.args.rows;
  rows.dtype = dtype;
  rows.value_dtype = value_dtype(dtype, options.wide);
  rows.classes = classes;
  rows.positions = logits.numel() / classes;
  rows.logits = logits.data_ptr();
  rows.logits_class_stride = classes == 1 ? 1 : logits.stride(dim);
  rows.grad_scale = 1;
  const auto each = [&](const Tensor& tensor, DType wanted, const char* name) {
    STD_TORCH_CHECK(tensor.numel() == rows.positions && dtype_of(tensor, name) == wanted, name,
                    " must have an element for each of ", rows.positions, " positions, of the right dtype");
    return torch::stable::contiguous(tensor);
  };
  call.target = each(target, compute, "target");
  call.args.target = call.target.data_ptr();
  if (options.weight) {
    call.weight = each(*options.weight, compute, "weight");
    call.args.weight = call.weight->data_ptr();
  }
  if (upstream && none) {
    call.upstream = each(*upstream, rows.value_dtype, "upstream");
    rows.upstream = call.upstream->data_ptr();
  }
  if (forward && none) {
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < logits.dim(); ++d)
      if (d != dim) sizes.push_back(logits.size(d));
    call.value = rows.value_dtype != dtype ? empty_compute(sizes, logits) : empty_contiguous(sizes, logits);
    rows.value = call.value->data_ptr();
  }
  if (grad) {
    rows.grad = grad->data_ptr();
    rows.grad_class_stride = classes == 1 ? 1 : grad->stride(dim);
  }
  collapse(rows, logits, grad, nullptr);
  return call;
}

}  // namespace fused_losses
