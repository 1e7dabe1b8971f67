// The element-wise losses as ops on CUDA tensors: two launches forward, one backward.
#include "cuda/elementwise.h"
#include "torch/cuda_device.h"
#include "torch/elementwise_ops.h"

namespace fused_losses {
namespace {

Tensor run(Elementwise loss, const Tensor& input, const Tensor& target, const ElementwiseOptions& options,
           const Tensor* upstream, Tensor* grad) {
  STD_TORCH_CHECK(!options.wide, "wide is for the CPU");
  same_device(target, input, "target");
  if (options.weight) same_device(*options.weight, input, "weight");
  if (options.pos_weight) same_device(*options.pos_weight, input, "pos_weight");
  if (upstream) same_device(*upstream, input, "upstream");
  const OnDevice device(input);
  ElementwiseCall call = elementwise_call(loss, input, target, options, upstream, grad);
  ElementwiseArgs& args = call.args;
  for (const Operand* operand : {&args.target, &args.weight, &args.pos_weight, &args.upstream})
    STD_TORCH_CHECK(!operand->data || operand->dtype == args.input.dtype, "all tensors must have the input's dtype");
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  const bool reduced = forward && !none;
  const int64_t count = input.numel(), blocks = cuda::elementwise_blocks(count);
  OptionalTensor partial, value = call.value;
  if (reduced) {
    partial = empty_doubles(blocks, input);
    value = empty({}, {}, input);
  }
  double* sums = reduced ? static_cast<double*>(partial->data_ptr()) : nullptr;
  const void* scalar_upstream = upstream && !none ? upstream->data_ptr() : nullptr;
  if (count > 0) check(cuda::elementwise(args, count, scalar_upstream, sums, device.stream()), "element-wise loss");
  if (reduced) {
    const double factor = options.reduction == Reduction::mean ? 1.0 / static_cast<double>(count) : 1.0;
    // The mean of nothing is 0 times infinity: nan, as in torch.
    check(cuda::finish(sums, count > 0 ? blocks : 0, factor, value->data_ptr(), args.input.dtype, device.stream()),
          "element-wise loss");
  }
  return forward ? *value : *upstream;
}

}  // namespace

// clang-format off
#ifdef FUSED_LOSSES_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses_simt, m) { FUSED_LOSSES_ELEMENTWISE(FUSED_LOSSES_DEFINE_ELEMENTWISE) }
#endif
FUSED_LOSSES_CUDA_IMPL(m) { FUSED_LOSSES_ELEMENTWISE(FUSED_LOSSES_IMPLEMENT_ELEMENTWISE) }
// clang-format on

}  // namespace fused_losses
