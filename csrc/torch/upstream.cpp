// scale_(gradient, upstream): what backward has left to do where the forward pass has made the gradient.
#include "cpu/kernels.h"
#include "torch/tensors.h"

namespace fused_losses {
namespace {

// gradient [*]; upstream: one element
void scale_(Tensor gradient, Tensor upstream) {
  const double factor = read_scalar(upstream);
  if (factor == 1) return;
  if (!is_dense(gradient)) return multiply_(gradient, upstream);  // in place of logits that are a view
  const DType dtype = dtype_of(gradient, "gradient");
  const int64_t size = static_cast<int64_t>(gradient.element_size());
  char* data = static_cast<char*>(gradient.data_ptr());
  parallel_sum(gradient.numel(), 65536, [&](int64_t begin, int64_t end) {
    cpu::kernels().scale(data + begin * size, dtype, end - begin, factor);
    return 0.0;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) { m.def("scale_(Tensor(a!) gradient, Tensor upstream) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { m.impl("scale_", TORCH_BOX(&scale_)); }

}  // namespace fused_losses
