// scale_ on CUDA tensors: see torch/upstream.cpp.
#include "cuda/scale.h"
#include "torch/cuda_device.h"

namespace fused_losses {
namespace {

// gradient [*]; upstream: one element of its dtype, or float32 beside a narrower one, on its device
void scale_(Tensor gradient, Tensor upstream) {
  same_device(upstream, gradient, "upstream");
  const DType dtype = dtype_of(gradient, "gradient"), given = dtype_of(upstream, "upstream");
  const bool wide = given == DType::f32 && dtype != DType::f64;
  STD_TORCH_CHECK(upstream.numel() == 1 && (given == dtype || wide),
                  "upstream must be one element of the gradient's dtype, or float32 beside a narrower one");
  const OnDevice device(gradient);
  if (gradient.numel() == 0) return;
  if (!is_dense(gradient)) return multiply_(gradient, upstream);  // in place of logits that are a view
  check(cuda::scale(gradient.data_ptr(), dtype, gradient.numel(), upstream.data_ptr(), given, device.stream()),
        "scale_");
}

}  // namespace

#ifdef FUSED_LOSSES_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses_simt, m) { m.def("scale_(Tensor(a!) gradient, Tensor upstream) -> ()"); }
#endif
FUSED_LOSSES_CUDA_IMPL(m) { m.impl("scale_", TORCH_BOX(&scale_)); }

}  // namespace fused_losses
