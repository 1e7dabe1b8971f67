// The five ops of each element-wise loss, by way of run(), which the including file defines for its device:
//   NAME            (input, target, ...) -> loss              no gradient wanted
//   NAME_train      (input, target, ...) -> (loss, gradient)  both from one pass over the input
//   NAME_train_     the same, the gradient overwrites the input
//   NAME_backward   (upstream, input, target, ...) -> gradient
//   NAME_backward_  the same, the gradient overwrites the input
// Shapes: input, target and every gradient [*]; weights and alpha broadcast to [*].
//
// NAME_anchors, NAME_anchors_train, ... are the same of a detector's head: target is dense, [*], or int64 labels, [*]
// without dimension class_dim, with scores of their shape; avg_factor is one double. NAME_anchors.probability, and the
// same of the two train forms, write sigmoid(input) to probability [*], too: overloads, since torch.compile takes an op
// apart that may write to one of its arguments.
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

ElementwiseOptions options(const OptionalTensor& scores, const OptionalTensor& weight, const OptionalTensor& pos_weight,
                           const OptionalTensor& alpha, const OptionalTensor& avg_factor, double divisor,
                           double positive, double negative, int64_t background, int64_t ignore_index,
                           int64_t class_dim, double alpha_positive, double alpha_negative, double gamma,
                           bool detach_weight, int64_t reduction, bool wide, const OptionalTensor& probability = {}) {
  ElementwiseOptions all = options(weight, pos_weight, alpha_positive, alpha_negative, gamma, reduction, wide);
  all.head = true;
  all.scores = scores;
  all.alpha = alpha;
  all.avg_factor = avg_factor;
  all.divisor = divisor;
  all.positive = positive;
  all.negative = negative;
  all.background = background;
  all.ignore_index = ignore_index;
  all.class_dim = class_dim;
  all.detach_weight = detach_weight;
  all.probability = probability;
  return all;
}

// Options: the types of what follows the target in the schema.
template <Elementwise loss, class... Options>
struct FiveOps {
  static Tensor forward(Tensor input, Tensor target, Options... rest) {
    return run(loss, input, target, options(rest...), nullptr, nullptr);
  }
  static std::tuple<Tensor, Tensor> train(Tensor input, Tensor target, Options... rest) {
    Tensor grad = empty_in_order(input);
    Tensor value = run(loss, input, target, options(rest...), nullptr, &grad);
    return {value, grad};
  }
  static Tensor train_(Tensor input, Tensor target, Options... rest) {
    return run(loss, input, target, options(rest...), nullptr, &input);
  }
  static Tensor backward(Tensor upstream, Tensor input, Tensor target, Options... rest) {
    Tensor grad = empty_in_order(input);
    run(loss, input, target, options(rest...), &upstream, &grad);
    return grad;
  }
  static void backward_(Tensor upstream, Tensor input, Tensor target, Options... rest) {
    run(loss, input, target, options(rest...), &upstream, &input);
  }
};
template <Elementwise loss>
using Plain = FiveOps<loss, OptionalTensor, OptionalTensor, double, double, double, int64_t, bool>;
template <Elementwise loss, class... Probability>
using Anchors =
    FiveOps<loss, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, double, double,
            double, int64_t, int64_t, int64_t, double, double, double, bool, int64_t, bool, Probability...>;

}  // namespace

#define FUSED_LOSSES_ELEMENTWISE(X) X(bce_with_logits) X(bce) X(sigmoid_focal)
#define FUSED_LOSSES_ANCHORS(X) X(bce_with_logits) X(sigmoid_focal) X(quality_focal) X(varifocal)

#define PLAIN_SCHEMA                                                                                             \
  "Tensor target, Tensor? weight, Tensor? pos_weight, float alpha_positive, float alpha_negative, float gamma, " \
  "int reduction, bool wide=False)"
#define ANCHORS_SCHEMA                                                                                     \
  "Tensor target, Tensor? scores, Tensor? weight, Tensor? pos_weight, Tensor? alpha, Tensor? avg_factor, " \
  "float divisor, float positive, float negative, int background, int ignore_index, int class_dim, "       \
  "float alpha_positive, float alpha_negative, float gamma, bool detach_weight, int reduction, "           \
  "bool wide=False"

#define DEFINE_FIVE(name, SCHEMA)                                              \
  m.def(name "(Tensor input, " SCHEMA " -> Tensor");                           \
  m.def(name "_train(Tensor input, " SCHEMA " -> (Tensor, Tensor)");           \
  m.def(name "_train_(Tensor(a!) input, " SCHEMA " -> Tensor");                \
  m.def(name "_backward(Tensor upstream, Tensor input, " SCHEMA " -> Tensor"); \
  m.def(name "_backward_(Tensor upstream, Tensor(a!) input, " SCHEMA " -> ()");
#define FUSED_LOSSES_DEFINE_ELEMENTWISE(name) DEFINE_FIVE(#name, PLAIN_SCHEMA)
#define PROBABILITY_SCHEMA ANCHORS_SCHEMA ", *, Tensor(b!) probability)"
#define FUSED_LOSSES_DEFINE_ANCHORS(name)                                                             \
  DEFINE_FIVE(#name "_anchors", ANCHORS_SCHEMA ")")                                                   \
  m.def(#name "_anchors.probability(Tensor input, " PROBABILITY_SCHEMA " -> Tensor");                 \
  m.def(#name "_anchors_train.probability(Tensor input, " PROBABILITY_SCHEMA " -> (Tensor, Tensor)"); \
  m.def(#name "_anchors_train_.probability(Tensor(a!) input, " PROBABILITY_SCHEMA " -> Tensor");

#define IMPLEMENT_FIVE(name, OPS)                      \
  m.impl(name, TORCH_BOX(&OPS::forward));              \
  m.impl(name "_train", TORCH_BOX(&OPS::train));       \
  m.impl(name "_train_", TORCH_BOX(&OPS::train_));     \
  m.impl(name "_backward", TORCH_BOX(&OPS::backward)); \
  m.impl(name "_backward_", TORCH_BOX(&OPS::backward_));
#define FUSED_LOSSES_IMPLEMENT_ELEMENTWISE(name) IMPLEMENT_FIVE(#name, Plain<Elementwise::name>)
#define FUSED_LOSSES_IMPLEMENT_ANCHORS(name)                                             \
  IMPLEMENT_FIVE(#name "_anchors", Anchors<Elementwise::name>)                           \
  using WithProbability_##name = Anchors<Elementwise::name, Tensor>;                     \
  m.impl(#name "_anchors.probability", TORCH_BOX(&WithProbability_##name::forward));     \
  m.impl(#name "_anchors_train.probability", TORCH_BOX(&WithProbability_##name::train)); \
  m.impl(#name "_anchors_train_.probability", TORCH_BOX(&WithProbability_##name::train_));

}  // namespace fused_losses
