// The element-wise losses as ops on CPU tensors, and the schemas of every device.
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "torch/elementwise_ops.h"

namespace fused_losses {
namespace {

constexpr int64_t kChunk = 16384;  // elements a thread takes at a time

Tensor run(Elementwise loss, const Tensor& input, const Tensor& target, const ElementwiseOptions& options,
           const Tensor* upstream, Tensor* grad) {
  ElementwiseCall call = elementwise_call(loss, input, target, options, upstream, grad);
  ElementwiseArgs& args = call.args;
  for (const Operand* operand : {&args.target, &args.weight, &args.pos_weight, &args.upstream})
    STD_TORCH_CHECK(!operand->data || operand->dtype == args.input.dtype, "all tensors must have the input's dtype");
  const int64_t count = input.numel();
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  if (upstream && !none) args.grad_scale *= read_scalar(*upstream);
  const auto& kernels = cpu::kernels();
  const double sum =
      parallel_sum(count, kChunk, [&](int64_t begin, int64_t end) { return kernels.elementwise(args, begin, end); });
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
  if (none) return *call.value;
  return scalar(options.reduction == Reduction::mean ? sum / count : sum, input);
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) { FUSED_LOSSES_ELEMENTWISE(FUSED_LOSSES_DEFINE_ELEMENTWISE) }
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { FUSED_LOSSES_ELEMENTWISE(FUSED_LOSSES_IMPLEMENT_ELEMENTWISE) }
// clang-format on

}  // namespace fused_losses
