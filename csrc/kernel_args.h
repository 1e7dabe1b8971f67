// What a kernel is asked to do, on a CPU or on a GPU: plain pointers, sizes and strides, read by value.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fused_losses {

// One operand of an element-wise loss, seen over the common (broadcast) shape. data == nullptr: absent.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool linear = false;            // element i of the common shape is data[i]
  int64_t stride[kMaxDims] = {};  // in elements, 0 along a broadcast dimension
};

enum class Elementwise : int { bce_with_logits, bce, sigmoid_focal, quality_focal, varifocal };

// A class an anchor in place of a dense target: `negative` everywhere, at the anchor's class `positive` or its score.
// Ignored anchors have no loss and an exactly zero gradient.
constexpr int32_t kBackground = -1, kIgnored = -2;  // an anchor's code; any other is its class
struct IndexTarget {
  const int32_t* code = nullptr;  // one an anchor; nullptr: the target is dense
  const void* score = nullptr;    // of the compute dtype, beside code; nullptr: positive
  int64_t stride[kMaxDims] = {};  // of both, over the common shape; 0 along the classes
  int class_dim = 0;              // of the common shape
  double positive = 1, negative = 0;
};

// From labels to codes.
struct LabelArgs {
  const int64_t* label;  // [N]
  int32_t* code;         // [N]
  int64_t classes, background, ignore_index;
};

struct ElementwiseArgs {
  Elementwise loss;
  DType value_dtype;        // of the loss and its upstream gradient: the input's, or f32 beside a narrower one
  int ndim;                 // of the common shape, collapsed; the last dimension runs fastest
  int64_t size[kMaxDims];   //
  Operand input;            // [...]
  Operand target;           // [...] absent where there is an index target
  IndexTarget index;        //
  Operand weight;           // [...] absent: 1
  Operand pos_weight;       // [...] absent: 1
  Operand alpha;            // [...] absent: alpha_positive and alpha_negative; else those are alpha and 1 - alpha
  Operand upstream;         // [...] absent: 1
  Operand value, grad;      // [...] absent: not wanted
  Operand probability;      // [...] absent: not wanted; sigmoid(input)
  bool want_sum;            // the values are summed up and returned
  double grad_scale;        // multiplies every gradient: 1 / count, and a scalar upstream gradient
  double alpha_positive, alpha_negative, gamma;  // focal losses only
  bool detach_weight;       // varifocal: the gradient does not go through its weight
};

// A loss over the softmax of a row: cross entropy, and softmax focal loss where gamma > 0.
// Position p of `positions` has its C logits at offset(p) + c * class_stride.
struct SoftmaxArgs {
  DType dtype;
  DType value_dtype;                 // as in ElementwiseArgs
  int64_t classes, positions;
  int ndim;                          // dimensions of the positions, collapsed; the last runs fastest
  int64_t size[kMaxDims];            //
  const void* logits;                // [positions, C] by the strides below
  int64_t logits_stride[kMaxDims], logits_class_stride;
  void* grad;                        // [positions, C] by the strides below; nullptr: not wanted
  int64_t grad_stride[kMaxDims], grad_class_stride;
  const int64_t* index;              // [positions] class indices, or nullptr
  const void* probability;           // [positions, C] soft targets, or nullptr
  DType probability_dtype;           // the logits', or that of the value
  int64_t probability_stride[kMaxDims], probability_class_stride;
  const void* weight;                // [C] of the compute dtype (float, or double for f64), or nullptr
  const void* upstream;              // [positions] of value_dtype, or nullptr
  void* value;                       // [positions] of value_dtype, or nullptr
  double grad_scale;                 // 1 / denominator, and a scalar upstream gradient
  int64_t ignore_index;
  bool count_weights;                // the mean divides by the targets' weights, not by their number
  double label_smoothing, gamma;
};

// The classification cost of an assigner: every ground truth with every anchor.
struct PairwiseArgs {
  DType dtype;
  int64_t anchors, classes, truths;
  const void* logits;                // [A, C] by the strides below
  int64_t anchor_stride, class_stride;
  const void* objectness;            // [A] of the logits' dtype, or nullptr
  int64_t objectness_stride;
  const int64_t* index;              // [G] classes of the ground truths
  void* cost;                        // [G, A] contiguous, of the compute dtype
};

// Distribution focal loss: rows.index, rows.probability and rows.weight are not looked at.
struct DistributionArgs {
  SoftmaxArgs rows;
  const void* target;  // [positions] in [0, C - 1], of the compute dtype
  const void* weight;  // [positions] of the compute dtype, or nullptr
};

}  // namespace fused_losses
