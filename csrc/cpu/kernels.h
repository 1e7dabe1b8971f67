// What the CPU kernels offer to csrc/torch: plain pointers, sizes and strides, one table of functions an
// instruction-set level. Nothing here knows of torch, and nothing behind it allocates more than a scratch row.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "dtype.h"

namespace fused_losses::cpu {

// One operand of an element-wise loss, seen over the common (broadcast) shape. data == nullptr: absent.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool linear = false;            // element i of the common shape is data[i]
  int64_t stride[kMaxDims] = {};  // in elements, 0 along a broadcast dimension
};

enum class Elementwise : int { bce_with_logits, bce, sigmoid_focal };

struct ElementwiseArgs {
  Elementwise loss;
  int ndim;                 // of the common shape, collapsed; the last dimension runs fastest
  int64_t size[kMaxDims];   //
  Operand input, target;    // [...]
  Operand weight;           // [...] absent: 1
  Operand pos_weight;       // [...] absent: 1
  Operand upstream;         // [...] absent: 1
  Operand value, grad;      // [...] absent: not wanted
  bool want_sum;            // the values are summed up and returned
  double grad_scale;        // multiplies every gradient: 1 / count, and a scalar upstream gradient
  double alpha_positive, alpha_negative, gamma;  // focal only
};

// A loss over the softmax of a row: cross entropy, and softmax focal loss where gamma > 0.
// Position p of `positions` has its C logits at offset(p) + c * class_stride.
struct SoftmaxArgs {
  DType dtype;
  int64_t classes, positions;
  int ndim;                          // dimensions of the positions, collapsed; the last runs fastest
  int64_t size[kMaxDims];            //
  const void* logits;                // [positions, C] by the strides below
  int64_t logits_stride[kMaxDims], logits_class_stride;
  void* grad;                        // [positions, C] by the strides below; nullptr: not wanted
  int64_t grad_stride[kMaxDims], grad_class_stride;
  const int64_t* index;              // [positions] class indices, or nullptr
  const void* probability;           // [positions, C] soft targets of the logits' dtype, or nullptr
  int64_t probability_stride[kMaxDims], probability_class_stride;
  const void* weight;                // [C] of the compute dtype (float, or double for f64), or nullptr
  const void* upstream;              // [positions] of the logits' dtype, or nullptr
  void* value;                       // [positions] of the logits' dtype, or nullptr
  double grad_scale;                 // 1 / denominator, and a scalar upstream gradient
  int64_t ignore_index;
  bool count_weights;                // the mean divides by the targets' weights, not by their number
  double label_smoothing, gamma;
};

// One implementation of every kernel. The sums are over a fixed range and come out the same on every call.
struct Kernels {
  const char* name;
  double (*elementwise)(const ElementwiseArgs&, int64_t begin, int64_t end);  // elements
  // Whether an element of `operand` in [0, count) is outside [0, 1] (NaN is), and one that is.
  bool (*find_outside_unit)(const ElementwiseArgs&, const Operand& operand, int64_t count, double* value);
  double (*softmax_rows)(const SoftmaxArgs&, int64_t begin, int64_t end);     // class stride 1
  double (*softmax_columns)(const SoftmaxArgs&, int64_t begin, int64_t end);  // any strides
  // The sum of weight[target] (or the number of targets) without ignore_index; `invalid` is the lowest position whose
  // target is neither ignored nor in [0, classes), or -1.
  double (*count_targets)(const SoftmaxArgs&, int64_t begin, int64_t end, int64_t* invalid);
  void (*scale)(void* data, DType dtype, int64_t count, double factor);  // data *= factor
  bool (*evaluate)(const char* function, const void* x, void* y, int64_t count, DType dtype, double parameter);
};

extern const Kernels baseline, avx2, avx512;

// The level in use: the best this CPU runs, or the lower one FUSED_LOSSES_CPU_LEVEL names. Read once.
// Throws std::invalid_argument where the variable names no level, or one this CPU lacks.
const Kernels& kernels();
std::vector<const Kernels*> runnable();  // slowest first

}  // namespace fused_losses::cpu
