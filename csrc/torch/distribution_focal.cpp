// Distribution focal loss as ops on CPU tensors, and the schemas of every device.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "torch/distribution_focal_ops.h"

namespace fused_losses {
namespace {

constexpr int64_t kChunkElements = 16384;  // what a thread takes at a time, about

void require_targets(const DistributionCall& call) {
  std::atomic<int64_t> outside{-1};
  parallel_sum(call.args.rows.positions, 65536, [&](int64_t begin, int64_t end) {
    const int64_t found = cpu::kernels().find_outside_bins(call.args, begin, end);
    if (found >= 0) outside = found;  // any of them will do
    return 0.0;
  });
  if (outside < 0) return;
  const int64_t p = outside, bins = call.args.rows.classes;
  const double value = call.args.rows.dtype == DType::f64 ? static_cast<const double*>(call.args.target)[p]
                                                          : static_cast<const float*>(call.args.target)[p];
  throw std::out_of_range("Target " + std::to_string(value) + " is out of bounds: input has " + std::to_string(bins) +
                          " bins, so target must be in [0, " + std::to_string(bins - 1) + "]");
}

Tensor run(const Tensor& logits, const Tensor& target, const DistributionOptions& options, const Tensor* upstream,
           Tensor* grad) {
  DistributionCall call = distribution_call(logits, target, options, upstream, grad);
  SoftmaxArgs& rows = call.args.rows;
  require_targets(call);
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  double divisor = 1;
  if (options.reduction == Reduction::mean) {
    divisor = static_cast<double>(rows.positions);
    if (options.divisor != 0) {
      divisor = options.divisor;
    } else if (options.avg_factor) {
      const double factor = read_scalar(*options.avg_factor);
      divisor = factor < 1 ? 1 : factor;  // NaN stays
    }
  }
  rows.grad_scale = (upstream && !none ? read_scalar(*upstream) : 1) / divisor;
  // Multiples of every level's group of positions, so that only the last group is short.
  const int64_t chunk = std::max<int64_t>(64, kChunkElements / rows.classes / 64 * 64);
  const double sum = parallel_sum(rows.positions, chunk, [&](int64_t begin, int64_t end) {
    return cpu::kernels().distribution_focal(call.args, begin, end);
  });
  if (!forward) return *upstream;
  if (none) return *call.value;
  return scalar(sum / divisor, logits, rows.value_dtype != rows.dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m){
    FUSED_LOSSES_DEFINE_DISTRIBUTION_FOCAL(m)} STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  FUSED_LOSSES_IMPLEMENT_DISTRIBUTION_FOCAL(m)
}

}  // namespace fused_losses
