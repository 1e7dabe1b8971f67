// pairwise_bce_cost (logits [A, C], gt_classes [G] int64, objectness [A] or none) -> cost [G, A] in the compute dtype:
// its schema, and its arguments for every device.
#pragma once
#include "kernel_args.h"
#include "torch/tensors.h"

namespace fused_losses {
namespace {

constexpr const char* kPairwiseSchema =
    "pairwise_bce_cost(Tensor logits, Tensor gt_classes, Tensor? objectness) -> Tensor";

// What a kernel is asked, and the tensors that its pointers need alive.
struct PairwiseCall {
  PairwiseArgs args;
  Tensor classes, cost;
};
PairwiseCall pairwise_call(const Tensor& logits, const Tensor& gt_classes, const OptionalTensor& objectness) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits must be (A, C) with C > 0");
  STD_TORCH_CHECK(gt_classes.dim() == 1 && gt_classes.scalar_type() == torch::headeronly::ScalarType::Long,
                  "gt_classes must be (G) of int64");
  PairwiseArgs args{};
  args.dtype = dtype_of(logits, "logits");
  args.anchors = logits.size(0);
  args.classes = logits.size(1);
  args.truths = gt_classes.size(0);
  args.logits = logits.data_ptr();
  args.anchor_stride = logits.stride(0);
  args.class_stride = logits.stride(1);
  if (objectness) {
    STD_TORCH_CHECK(objectness->dim() == 1 && objectness->size(0) == args.anchors &&
                        dtype_of(*objectness, "objectness") == args.dtype,
                    "objectness must be (A) of the logits' dtype");
    args.objectness = objectness->data_ptr();
    args.objectness_stride = objectness->stride(0);
  }
  const Tensor classes = torch::stable::contiguous(gt_classes);
  const Tensor cost = empty_compute({args.truths, args.anchors}, logits);
  args.index = static_cast<const int64_t*>(classes.data_ptr());
  args.cost = cost.data_ptr();
  return {args, classes, cost};
}

}  // namespace
}  // namespace fused_losses
