// Cross entropy and softmax focal loss as ops on CUDA tensors: two launches forward (three where there are many
// targets to count), one backward.
#include "cuda/softmax.h"
#include "torch/cuda_device.h"
#include "torch/softmax_ops.h"

namespace fused_losses {
namespace {

Tensor run(const Tensor& logits, const Tensor& target, const SoftmaxOptions& options, const Tensor* upstream,
           Tensor* grad) {
  same_device(target, logits, "target");
  if (options.weight) same_device(*options.weight, logits, "weight");
  if (upstream) same_device(*upstream, logits, "upstream");
  const OnDevice device(logits);
  SoftmaxCall call = softmax_call(logits, target, options, upstream, grad);
  const SoftmaxArgs& args = call.args;
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  const bool mean = options.reduction == Reduction::mean;

  cuda::SoftmaxPlan plan;
  check(cuda::plan_softmax(args, mean, device.index(), &plan), "softmax loss");
  const bool reduced = forward && !none;
  OptionalTensor value = call.value;
  if (reduced) value = args.value_dtype == args.dtype ? empty({}, {}, logits) : empty_compute({}, logits);
  const Tensor doubles = empty_doubles(plan.count_blocks + (reduced ? plan.blocks : 0) + 1, logits);
  auto* counts = static_cast<double*>(doubles.data_ptr());
  const cuda::SoftmaxBuffers buffers{upstream && !none ? one_element(*upstream, args.value_dtype) : nullptr,
                                     reduced ? counts + plan.count_blocks : nullptr, counts, plan.count_blocks, mean};
  if (args.positions == 0) plan.blocks = 0;
  if (args.positions > 0) check(cuda::softmax(args, plan, buffers, device.stream()), "softmax loss");
  if (reduced) check(cuda::finish_softmax(args, plan, buffers, value->data_ptr(), device.stream()), "softmax loss");
  return forward ? *value : *upstream;
}

}  // namespace

// clang-format off
#ifdef FUSED_LOSSES_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses_simt, m) { FUSED_LOSSES_SOFTMAX(FUSED_LOSSES_DEFINE_SOFTMAX) }
#endif
FUSED_LOSSES_CUDA_IMPL(m) { FUSED_LOSSES_SOFTMAX(FUSED_LOSSES_IMPLEMENT_SOFTMAX) }
// clang-format on

}  // namespace fused_losses
