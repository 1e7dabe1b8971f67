// The five ops of each element-wise loss, by way of run(), which the including file defines for its device. For each
// loss of the table at the end:
//   NAME            (input, target, ...) -> loss              no gradient wanted
//   NAME_train      (input, target, ...) -> (loss, gradient)  both from one pass over the input
//   NAME_train_     the same, the gradient overwrites the input
//   NAME_backward   (upstream, input, target, ...) -> gradient
//   NAME_backward_  the same, the gradient overwrites the input
// Shapes: input, target and every gradient [*]; weight and pos_weight broadcast to [*].
#pragma once
#include <tuple>

#include "torch/arguments.h"

namespace fused_losses {
namespace {

// The loss (in a backward pass: nothing of use), with the gradient written to *grad where that is wanted.
Tensor run(Elementwise loss, const Tensor& input, const Tensor& target, const ElementwiseOptions& options,
           const Tensor* upstream, Tensor* grad);

ElementwiseOptions options(const OptionalTensor& weight, const OptionalTensor& pos_weight, double alpha_positive,
                           double alpha_negative, double gamma, int64_t reduction, bool wide) {
  return {weight, pos_weight, alpha_positive, alpha_negative, gamma, static_cast<Reduction>(reduction), wide};
}

#define OPTION_PARAMETERS                                                                                       \
  OptionalTensor weight, OptionalTensor pos_weight, double alpha_positive, double alpha_negative, double gamma, \
      int64_t reduction, bool wide
#define OPTIONS options(weight, pos_weight, alpha_positive, alpha_negative, gamma, reduction, wide)

template <Elementwise loss>
Tensor forward(Tensor input, Tensor target, OPTION_PARAMETERS) {
  return run(loss, input, target, OPTIONS, nullptr, nullptr);
}
template <Elementwise loss>
std::tuple<Tensor, Tensor> train(Tensor input, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(input);
  Tensor value = run(loss, input, target, OPTIONS, nullptr, &grad);
  return {value, grad};
}
template <Elementwise loss>
Tensor train_(Tensor input, Tensor target, OPTION_PARAMETERS) {
  return run(loss, input, target, OPTIONS, nullptr, &input);
}
template <Elementwise loss>
Tensor backward(Tensor upstream, Tensor input, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(input);
  run(loss, input, target, OPTIONS, &upstream, &grad);
  return grad;
}
template <Elementwise loss>
void backward_(Tensor upstream, Tensor input, Tensor target, OPTION_PARAMETERS) {
  run(loss, input, target, OPTIONS, &upstream, &input);
}

}  // namespace

#define FUSED_LOSSES_ELEMENTWISE(X) X(bce_with_logits) X(bce) X(sigmoid_focal)

#define OPTION_SCHEMA                                                                                            \
  "Tensor target, Tensor? weight, Tensor? pos_weight, float alpha_positive, float alpha_negative, float gamma, " \
  "int reduction, bool wide=False)"

#define FUSED_LOSSES_DEFINE_ELEMENTWISE(name)                                          \
  m.def(#name "(Tensor input, " OPTION_SCHEMA " -> Tensor");                           \
  m.def(#name "_train(Tensor input, " OPTION_SCHEMA " -> (Tensor, Tensor)");           \
  m.def(#name "_train_(Tensor(a!) input, " OPTION_SCHEMA " -> Tensor");                \
  m.def(#name "_backward(Tensor upstream, Tensor input, " OPTION_SCHEMA " -> Tensor"); \
  m.def(#name "_backward_(Tensor upstream, Tensor(a!) input, " OPTION_SCHEMA " -> ()");

#define FUSED_LOSSES_IMPLEMENT_ELEMENTWISE(name)                      \
  m.impl(#name, TORCH_BOX(&forward<Elementwise::name>));              \
  m.impl(#name "_train", TORCH_BOX(&train<Elementwise::name>));       \
  m.impl(#name "_train_", TORCH_BOX(&train_<Elementwise::name>));     \
  m.impl(#name "_backward", TORCH_BOX(&backward<Elementwise::name>)); \
  m.impl(#name "_backward_", TORCH_BOX(&backward_<Elementwise::name>));

}  // namespace fused_losses
