// pairwise_bce_cost on CUDA tensors: one launch.
#include "cuda/pairwise.h"
#include "torch/cuda_device.h"
#include "torch/pairwise_ops.h"

namespace fused_losses {
namespace {

Tensor pairwise_bce_cost(Tensor logits, Tensor gt_classes, OptionalTensor objectness) {
  same_device(gt_classes, logits, "gt_classes");
  if (objectness) same_device(*objectness, logits, "objectness");
  const OnDevice device(logits);
  const PairwiseCall call = pairwise_call(logits, gt_classes, objectness);
  check(cuda::pairwise(call.args, device.stream()), "pairwise_bce_cost");
  return call.cost;
}

}  // namespace

#ifdef FUSED_LOSSES_SIMT
STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses_simt, m) { m.def(kPairwiseSchema); }
#endif
FUSED_LOSSES_CUDA_IMPL(m) { m.impl("pairwise_bce_cost", TORCH_BOX(&pairwise_bce_cost)); }

}  // namespace fused_losses
