// The element-wise losses as ops on CUDA tensors: two launches forward, one backward; one more for an index target.
#include "cuda/elementwise.h"

#include <utility>

#include "torch/cuda_device.h"
#include "torch/elementwise_ops.h"

namespace fused_losses {
namespace {

Tensor run(Elementwise loss, const Tensor& input, const Tensor& target, const ElementwiseOptions& options,
           const Tensor* upstream, Tensor* grad) {
  same_device(target, input, "target");
  const std::pair<const OptionalTensor&, const char*> others[] = {
      {options.weight, "weight"}, {options.pos_weight, "pos_weight"}, {options.alpha, "alpha"},
      {options.scores, "scores"}, {options.avg_factor, "avg_factor"}, {options.probability, "probability"}};
  for (const auto& [tensor, name] : others)
    if (tensor) same_device(*tensor, input, name);
  if (upstream) same_device(*upstream, input, "upstream");
  const OnDevice device(input);
  ElementwiseCall call = elementwise_call(loss, input, target, options, upstream, grad);
  ElementwiseArgs& args = call.args;
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  const bool mean = options.reduction == Reduction::mean, reduced = forward && !none;
  const int64_t count = input.numel(), blocks = cuda::elementwise_blocks(count, device.multiprocessors());
  const bool indexed = args.index.code, by_avg_factor = mean && options.avg_factor && options.divisor == 0;
  const bool by_count = mean && indexed && !by_avg_factor && options.divisor == 0;
  cuda::ElementwiseBuffers buffers{};
  buffers.blocks = blocks;
  OptionalTensor doubles, value = call.value;
  const int64_t counts = indexed ? cuda::encode_blocks(call.anchors) : 0;
  if (reduced || indexed) doubles = empty_doubles(blocks + counts, input);
  auto* room = doubles ? static_cast<double*>(doubles->data_ptr()) : nullptr;
  if (reduced) {
    buffers.partial = room;
    value = args.value_dtype == args.input.dtype ? empty({}, {}, input) : empty_compute({}, input);
  }
  if (upstream && !none) buffers.scalar_upstream = one_element(*upstream, args.value_dtype);
  if (by_avg_factor) {
    STD_TORCH_CHECK(dtype_of(*options.avg_factor, "avg_factor") == DType::f64 && options.avg_factor->numel() == 1,
                    "avg_factor must be one double");
    buffers.avg_factor = static_cast<const double*>(options.avg_factor->data_ptr());
  }
  if (indexed) {
    if (by_count) {
      buffers.counts = room + blocks;
      buffers.count_blocks = counts;
      buffers.classes = static_cast<double>(call.labels.classes);
    }
    check(cuda::encode_labels(call.labels, call.anchors, room + blocks, device.stream()), "element-wise loss");
  }
  double factor = 1;
  if (mean && options.divisor != 0) factor = 1 / options.divisor;
  if (mean && options.divisor == 0 && !by_avg_factor && !by_count) factor = 1.0 / static_cast<double>(count);
  args.grad_scale = factor;
  if (count > 0) check(cuda::elementwise(args, count, buffers, device.stream()), "element-wise loss");
  if (reduced) {
    // The mean of nothing is 0 times infinity, or 0 by 0: nan, as in torch.
    check(cuda::finish(buffers, factor, value->data_ptr(), args.value_dtype, device.stream()), "element-wise loss");
  }
  return forward ? *value : *upstream;
}

}  // namespace

// clang-format off
#ifdef FUSED_LOSSES_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses_simt, m) {
  FUSED_LOSSES_ELEMENTWISE(FUSED_LOSSES_DEFINE_ELEMENTWISE)
  FUSED_LOSSES_ANCHORS(FUSED_LOSSES_DEFINE_ANCHORS)
}
#endif
FUSED_LOSSES_CUDA_IMPL(m) {
  FUSED_LOSSES_ELEMENTWISE(FUSED_LOSSES_IMPLEMENT_ELEMENTWISE)
  FUSED_LOSSES_ANCHORS(FUSED_LOSSES_IMPLEMENT_ANCHORS)
}
// clang-format on

}  // namespace fused_losses
