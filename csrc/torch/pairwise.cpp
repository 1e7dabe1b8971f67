// pairwise_bce_cost on CPU tensors, and its schema.
#include "torch/pairwise_ops.h"

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fused_losses {
namespace {

constexpr int64_t kChunk = 256;  // anchors a thread takes at a time

Tensor pairwise_bce_cost(Tensor logits, Tensor gt_classes, OptionalTensor objectness) {
  const PairwiseCall call = pairwise_call(logits, gt_classes, objectness);
  const PairwiseArgs& args = call.args;
  for (int64_t g = 0; g < args.truths; ++g)
    if (args.index[g] < 0 || args.index[g] >= args.classes)
      throw std::out_of_range("gt_classes holds " + std::to_string(args.index[g]) + ": logits has " +
                              std::to_string(args.classes) + " classes, so it must be in [0, " +
                              std::to_string(args.classes - 1) + "]");
  if (args.truths == 0) return call.cost;
  parallel_sum(args.anchors, kChunk, [&](int64_t begin, int64_t end) {
    cpu::kernels().pairwise(args, begin, end);
    return 0.0;
  });
  return call.cost;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) { m.def(kPairwiseSchema); }
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { m.impl("pairwise_bce_cost", TORCH_BOX(&pairwise_bce_cost)); }

}  // namespace fused_losses
