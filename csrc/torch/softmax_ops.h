// The five ops of cross entropy and softmax focal loss, by way of run(), which the including file defines for its
// device: NAME, NAME_train, NAME_train_, NAME_backward, NAME_backward_ (see torch/elementwise_ops.h).
// Shapes: logits [C], [N, C] or [N, C, d1, ...]; target of the same shape without C (int64 class indices) or of the
// logits' shape (probabilities, cross entropy only); weight [C] in the compute dtype.
#pragma once
#include <tuple>

#include "torch/arguments.h"

namespace fused_losses {
namespace {

// The loss (in a backward pass: nothing of use), with the gradient written to *grad where that is wanted.
Tensor run(const Tensor& logits, const Tensor& target, const SoftmaxOptions& options, const Tensor* upstream,
           Tensor* grad);

struct CrossEntropy {
  static SoftmaxOptions options(const OptionalTensor& weight, int64_t reduction, int64_t ignore_index, double smoothing,
                                bool wide) {
    return {weight, ignore_index, smoothing, 0, true, static_cast<Reduction>(reduction), wide};
  }
};
struct SoftmaxFocal {
  static SoftmaxOptions options(const OptionalTensor& alpha, int64_t reduction, int64_t ignore_index, double gamma,
                                bool wide) {
    return {alpha, ignore_index, 0, gamma, false, static_cast<Reduction>(reduction), wide};
  }
};

#define OPTION_PARAMETERS OptionalTensor weight, int64_t reduction, int64_t ignore_index, double parameter, bool wide
#define OPTIONS Loss::options(weight, reduction, ignore_index, parameter, wide)

template <class Loss>
Tensor forward(Tensor logits, Tensor target, OPTION_PARAMETERS) {
  return run(logits, target, OPTIONS, nullptr, nullptr);
}
template <class Loss>
std::tuple<Tensor, Tensor> train(Tensor logits, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(logits);
  Tensor value = run(logits, target, OPTIONS, nullptr, &grad);
  return {value, grad};
}
template <class Loss>
Tensor train_(Tensor logits, Tensor target, OPTION_PARAMETERS) {
  return run(logits, target, OPTIONS, nullptr, &logits);
}
template <class Loss>
Tensor backward(Tensor upstream, Tensor logits, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(logits);
  run(logits, target, OPTIONS, &upstream, &grad);
  return grad;
}
template <class Loss>
void backward_(Tensor upstream, Tensor logits, Tensor target, OPTION_PARAMETERS) {
  run(logits, target, OPTIONS, &upstream, &logits);
}

}  // namespace

#define FUSED_LOSSES_SOFTMAX(X)                                       \
  X(cross_entropy, CrossEntropy, "Tensor? weight", "label_smoothing") \
  X(softmax_focal, SoftmaxFocal, "Tensor? alpha", "gamma")

#define DEFINE_ONE(name, arguments, weight, parameter, result)                                              \
  m.def(name "(" arguments ", Tensor target, " weight ", int reduction, int ignore_index, float " parameter \
             ", bool wide=False) -> " result);
#define FUSED_LOSSES_DEFINE_SOFTMAX(name, loss, weight, parameter)                            \
  DEFINE_ONE(#name, "Tensor input", weight, parameter, "Tensor")                              \
  DEFINE_ONE(#name "_train", "Tensor input", weight, parameter, "(Tensor, Tensor)")           \
  DEFINE_ONE(#name "_train_", "Tensor(a!) input", weight, parameter, "Tensor")                \
  DEFINE_ONE(#name "_backward", "Tensor upstream, Tensor input", weight, parameter, "Tensor") \
  DEFINE_ONE(#name "_backward_", "Tensor upstream, Tensor(a!) input", weight, parameter, "()")

#define FUSED_LOSSES_IMPLEMENT_SOFTMAX(name, loss, weight, parameter) \
  m.impl(#name, TORCH_BOX(&forward<loss>));                           \
  m.impl(#name "_train", TORCH_BOX(&train<loss>));                    \
  m.impl(#name "_train_", TORCH_BOX(&train_<loss>));                  \
  m.impl(#name "_backward", TORCH_BOX(&backward<loss>));              \
  m.impl(#name "_backward_", TORCH_BOX(&backward_<loss>));

}  // namespace fused_losses
