// Distribution focal loss as ops on CUDA tensors: two launches forward, one backward.
#include "cuda/distribution_focal.h"
#include "torch/cuda_device.h"
#include "torch/distribution_focal_ops.h"

namespace fused_losses {
namespace {

Tensor run(const Tensor& logits, const Tensor& target, const DistributionOptions& options, const Tensor* upstream,
           Tensor* grad) {
  same_device(target, logits, "target");
  if (options.weight) same_device(*options.weight, logits, "weight");
  if (options.avg_factor) same_device(*options.avg_factor, logits, "avg_factor");
  if (upstream) same_device(*upstream, logits, "upstream");
  const OnDevice device(logits);
  DistributionCall call = distribution_call(logits, target, options, upstream, grad);
  SoftmaxArgs& rows = call.args.rows;
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none, reduced = forward && !none;
  const int64_t blocks = cuda::distribution_focal_blocks(call.args);
  cuda::DistributionBuffers buffers{};
  double factor = 1;
  if (options.reduction == Reduction::mean) {
    if (options.divisor != 0) {
      factor = 1 / options.divisor;
    } else if (options.avg_factor) {
      STD_TORCH_CHECK(dtype_of(*options.avg_factor, "avg_factor") == DType::f64 && options.avg_factor->numel() == 1,
                      "avg_factor must be one double");
      buffers.avg_factor = static_cast<const double*>(options.avg_factor->data_ptr());
    } else {
      factor = 1.0 / static_cast<double>(rows.positions);
    }
  }
  rows.grad_scale = factor;
  if (upstream && !none) buffers.scalar_upstream = one_element(*upstream, rows.value_dtype);
  OptionalTensor partial, value = call.value;
  if (reduced) {
    partial = empty_doubles(blocks, logits);
    buffers.partial = static_cast<double*>(partial->data_ptr());
    value = rows.value_dtype == rows.dtype ? empty({}, {}, logits) : empty_compute({}, logits);
  }
  const char* what = "distribution focal loss";
  if (rows.positions > 0) check(cuda::distribution_focal(call.args, buffers, device.stream()), what);
  if (reduced) {
    // The mean of nothing is 0 times infinity: nan, as in torch.
    const int64_t summed = rows.positions > 0 ? blocks : 0;
    check(cuda::finish_distribution_focal(call.args, buffers, summed, factor, value->data_ptr(), device.stream()),
          what);
  }
  return forward ? *value : *upstream;
}

}  // namespace

#ifdef FUSED_LOSSES_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses_simt, m){FUSED_LOSSES_DEFINE_DISTRIBUTION_FOCAL(m)}
#endif
FUSED_LOSSES_CUDA_IMPL(m) {
  FUSED_LOSSES_IMPLEMENT_DISTRIBUTION_FOCAL(m)
}

}  // namespace fused_losses
