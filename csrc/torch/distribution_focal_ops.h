// The five ops of distribution focal loss, by way of run(), which the including file defines for its device (see
// torch/elementwise_ops.h). Shapes: input [C], [N, C] or [N, C, d1, ...]; target and weight of the same shape without
// C, in the compute dtype.
#pragma once
#include <tuple>

#include "torch/arguments.h"

namespace fused_losses {
namespace {

// The loss (in a backward pass: nothing of use), with the gradient written to *grad where that is wanted.
Tensor run(const Tensor& logits, const Tensor& target, const DistributionOptions& options, const Tensor* upstream,
           Tensor* grad);

#define OPTION_PARAMETERS OptionalTensor weight, OptionalTensor avg_factor, double divisor, int64_t reduction, bool wide
#define OPTIONS \
  DistributionOptions { weight, avg_factor, divisor, static_cast<Reduction>(reduction), wide }

Tensor forward(Tensor logits, Tensor target, OPTION_PARAMETERS) {
  return run(logits, target, OPTIONS, nullptr, nullptr);
}
std::tuple<Tensor, Tensor> train(Tensor logits, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(logits);
  Tensor value = run(logits, target, OPTIONS, nullptr, &grad);
  return {value, grad};
}
Tensor train_(Tensor logits, Tensor target, OPTION_PARAMETERS) {
  return run(logits, target, OPTIONS, nullptr, &logits);
}
Tensor backward(Tensor upstream, Tensor logits, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(logits);
  run(logits, target, OPTIONS, &upstream, &grad);
  return grad;
}
void backward_(Tensor upstream, Tensor logits, Tensor target, OPTION_PARAMETERS) {
  run(logits, target, OPTIONS, &upstream, &logits);
}

}  // namespace

#define OPTION_SCHEMA \
  "Tensor target, Tensor? weight, Tensor? avg_factor, float divisor, int reduction, bool wide=False)"
#define FUSED_LOSSES_DEFINE_DISTRIBUTION_FOCAL(m)                                                  \
  m.def("distribution_focal(Tensor input, " OPTION_SCHEMA " -> Tensor");                           \
  m.def("distribution_focal_train(Tensor input, " OPTION_SCHEMA " -> (Tensor, Tensor)");           \
  m.def("distribution_focal_train_(Tensor(a!) input, " OPTION_SCHEMA " -> Tensor");                \
  m.def("distribution_focal_backward(Tensor upstream, Tensor input, " OPTION_SCHEMA " -> Tensor"); \
  m.def("distribution_focal_backward_(Tensor upstream, Tensor(a!) input, " OPTION_SCHEMA " -> ()");
#define FUSED_LOSSES_IMPLEMENT_DISTRIBUTION_FOCAL(m)           \
  m.impl("distribution_focal", TORCH_BOX(&forward));           \
  m.impl("distribution_focal_train", TORCH_BOX(&train));       \
  m.impl("distribution_focal_train_", TORCH_BOX(&train_));     \
  m.impl("distribution_focal_backward", TORCH_BOX(&backward)); \
  m.impl("distribution_focal_backward_", TORCH_BOX(&backward_));

}  // namespace fused_losses
