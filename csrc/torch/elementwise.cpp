// The element-wise losses as ops on CPU tensors, and the schemas of every device.
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "torch/elementwise_ops.h"

namespace fused_losses {
namespace {

constexpr int64_t kChunk = 16384;  // elements a thread takes at a time

// Fills the call's codes. Returns the number of anchors not ignored.
double encode(const ElementwiseCall& call) {
  const LabelArgs& labels = call.labels;
  std::atomic<int64_t> invalid{-1};
  const double kept = parallel_sum(call.anchors, 16384, [&](int64_t begin, int64_t end) {
    int64_t found = -1;
    const int64_t count = cpu::kernels().encode_labels(labels, begin, end, &found);
    if (found >= 0) invalid = found;  // any of them will do
    return static_cast<double>(count);
  });
  if (invalid >= 0)
    throw std::out_of_range("Label " + std::to_string(labels.label[invalid]) + " is out of bounds: input has " +
                            std::to_string(labels.classes) + " classes, so a label must be in [0, " +
                            std::to_string(labels.classes - 1) + "], background (" + std::to_string(labels.background) +
                            " or " + std::to_string(labels.classes) + ") or ignore_index (" +
                            std::to_string(labels.ignore_index) + ")");
  return kept;
}

// What the mean divides by.
double denominator(const ElementwiseOptions& options, double elements) {
  if (options.divisor != 0) return options.divisor;
  if (!options.avg_factor) return elements;
  const double factor = read_scalar(*options.avg_factor);
  return factor < 1 ? 1 : factor;  // NaN stays
}

Tensor run(Elementwise loss, const Tensor& input, const Tensor& target, const ElementwiseOptions& options,
           const Tensor* upstream, Tensor* grad) {
  ElementwiseCall call = elementwise_call(loss, input, target, options, upstream, grad);
  ElementwiseArgs& args = call.args;
  const int64_t count = input.numel();
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  double elements = static_cast<double>(count);
  if (args.index.code) elements = encode(call) * static_cast<double>(call.labels.classes);
  const double divisor = options.reduction == Reduction::mean ? denominator(options, elements) : 1;
  args.grad_scale = 1 / divisor;
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
  return scalar(sum / divisor, input, args.value_dtype != args.input.dtype);
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) {
  FUSED_LOSSES_ELEMENTWISE(FUSED_LOSSES_DEFINE_ELEMENTWISE)
  FUSED_LOSSES_ANCHORS(FUSED_LOSSES_DEFINE_ANCHORS)
}
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  FUSED_LOSSES_ELEMENTWISE(FUSED_LOSSES_IMPLEMENT_ELEMENTWISE)
  FUSED_LOSSES_ANCHORS(FUSED_LOSSES_IMPLEMENT_ANCHORS)
}
// clang-format on

}  // namespace fused_losses
