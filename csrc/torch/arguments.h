// From the arguments of an op to the arguments of a kernel: checks, shapes and strides. The same for every device.
#pragma once
#include <optional>
#include <vector>

#include "kernel_args.h"
#include "torch/tensors.h"

namespace fused_losses {

struct ElementwiseOptions {
  OptionalTensor weight, pos_weight;
  double alpha_positive, alpha_negative, gamma;
  Reduction reduction;
  bool wide = false;  // beside a float16 or bfloat16 input the loss is float32, as autocast wants it
  // What a detector's head asks besides. Its target may be labels, int64.
  bool head = false;
  OptionalTensor scores = {}, alpha = {}, probability = {};
  double positive = 1, negative = 0;
  int64_t background = -1, ignore_index = -2, class_dim = 0;
  bool detach_weight = false;
  OptionalTensor avg_factor = {};  // one double; the mean divides by the greater of it and 1
  double divisor = 0;              // the same as a number; 0: the mean's own
};

// What a kernel is asked, and the tensors that its pointers need alive. A scalar upstream gradient is left to the
// device's own code.
struct ElementwiseCall {
  ElementwiseArgs args;
  OptionalTensor value;          // for Reduction::none
  LabelArgs labels;              // what fills args.index.code, `anchors` of them
  int64_t anchors = 0;
  OptionalTensor label, code;
};
ElementwiseCall elementwise_call(Elementwise loss, const Tensor& input, const Tensor& target,
                                 const ElementwiseOptions& options, const Tensor* upstream, Tensor* grad);

struct SoftmaxOptions {
  OptionalTensor weight;  // [C]
  int64_t ignore_index;
  double label_smoothing, gamma;
  bool count_weights;
  Reduction reduction;
  bool wide;  // as in ElementwiseOptions
};

struct SoftmaxCall {
  SoftmaxArgs args;
  Tensor target;
  OptionalTensor upstream, value;  // for Reduction::none
};
SoftmaxCall softmax_call(const Tensor& logits, const Tensor& target, const SoftmaxOptions& options,
                         const Tensor* upstream, Tensor* grad);

struct DistributionOptions {
  OptionalTensor weight;      // [positions]
  OptionalTensor avg_factor;  // one double; the mean divides by the greater of it and 1
  double divisor;             // the same as a number; 0: the mean's own
  Reduction reduction;
  bool wide;  // as in ElementwiseOptions
};

struct DistributionCall {
  DistributionArgs args;
  Tensor target;
  OptionalTensor weight, upstream, value;  // value for Reduction::none
};
DistributionCall distribution_call(const Tensor& logits, const Tensor& target, const DistributionOptions& options,
                                   const Tensor* upstream, Tensor* grad);

}  // namespace fused_losses
