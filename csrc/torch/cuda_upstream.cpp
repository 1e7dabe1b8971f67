// scale_ on CUDA tensors: see torch/upstream.cpp.
#include "cuda/scale.h"
#include "torch/cuda_device.h"

namespace fused_losses {
namespace {

// gradient [*], dense; upstream: one element of its dtype, on its device
void scale_(Tensor gradient, Tensor upstream) {
  same_device(upstream, gradient, "upstream");
  STD_TORCH_CHECK(upstream.numel() == 1 && upstream.scalar_type() == gradient.scalar_type(),
                  "upstream must be one element of the gradient's dtype");
  const OnDevice device(gradient);
  if (gradient.numel() == 0) return;
  check(cuda::scale(gradient.data_ptr(), dtype_of(gradient, "gradient"), gradient.numel(), upstream.data_ptr(),
                    device.stream()),
        "scale_");
}

}  // namespace

#ifdef FUSED_LOSSES_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses_simt, m) { m.def("scale_(Tensor(a!) gradient, Tensor upstream) -> ()"); }
#endif
FUSED_LOSSES_CUDA_IMPL(m) { m.impl("scale_", TORCH_BOX(&scale_)); }

}  // namespace fused_losses
