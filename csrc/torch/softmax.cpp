// Cross entropy and softmax focal loss as ops on CPU tensors, and the schemas of every device.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "torch/softmax_ops.h"

namespace fused_losses {
namespace {

constexpr int64_t kChunkElements = 16384;  // what a thread takes at a time, about
constexpr int64_t kShortRow = 32;          // classes; below it, a vector of neighbouring rows beats one row's vector

Tensor run(const Tensor& logits, const Tensor& target, const SoftmaxOptions& options, const Tensor* upstream,
           Tensor* grad) {
  SoftmaxCall call = softmax_call(logits, target, options, upstream, grad);
  SoftmaxArgs& args = call.args;
  STD_TORCH_CHECK(!args.probability || args.probability_dtype == args.dtype, "target must have the input's dtype");
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  const bool index = args.index != nullptr;
  const int64_t classes = args.classes;
  if (upstream && !none) args.grad_scale = read_scalar(*upstream);

  const auto& kernels = cpu::kernels();
  double denominator = static_cast<double>(args.positions);
  if (index) {
    int64_t invalid = -1;
    denominator = parallel_sum(args.positions, 65536, [&](int64_t begin, int64_t end) {
      int64_t found = -1;
      const double counted = kernels.count_targets(args, begin, end, &found);
      if (found >= 0) invalid = found;  // any of them will do
      return counted;
    });
    if (invalid >= 0)
      throw std::out_of_range("Target " + std::to_string(args.index[invalid]) + " is out of bounds: input has " +
                              std::to_string(classes) + " classes, so target must be in [0, " +
                              std::to_string(classes - 1) + "] or ignore_index (" + std::to_string(args.ignore_index) +
                              ")");
  }
  if (options.reduction == Reduction::mean) args.grad_scale /= denominator;

  const bool rows = args.logits_class_stride == 1 && (!grad || args.grad_class_stride == 1) &&
                    (index || args.probability_class_stride == 1) && classes >= kShortRow;
  const auto kernel = rows ? kernels.softmax_rows : kernels.softmax_columns;
  // Multiples of every level's group of positions, so that only the last group is short.
  const int64_t chunk =
      rows ? std::max<int64_t>(1, kChunkElements / classes) : std::max<int64_t>(64, kChunkElements / classes / 64 * 64);
  const double sum =
      parallel_sum(args.positions, chunk, [&](int64_t begin, int64_t end) { return kernel(args, begin, end); });
  if (!forward) return *upstream;
  if (none) return *call.value;
  // Without any weight the mean is nan, as torch's, also where label smoothing leaves a sum.
  const double mean = (denominator == 0 ? 0 : sum) / denominator;
  return scalar(options.reduction == Reduction::mean ? mean : sum, logits, args.value_dtype != args.dtype);
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) { FUSED_LOSSES_SOFTMAX(FUSED_LOSSES_DEFINE_SOFTMAX) }
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { FUSED_LOSSES_SOFTMAX(FUSED_LOSSES_IMPLEMENT_SOFTMAX) }
// clang-format on

}  // namespace fused_losses
