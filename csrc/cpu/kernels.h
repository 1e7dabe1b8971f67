// What the CPU kernels offer to csrc/torch: plain pointers, sizes and strides, one table of functions an
// instruction-set level. Nothing here knows of torch, and nothing behind it allocates more than a scratch row.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernel_args.h"

namespace fused_losses::cpu {

// One implementation of every kernel. The sums are over a fixed range and come out the same on every call.
struct Kernels {
  const char* name;
  double (*elementwise)(const ElementwiseArgs&, int64_t begin, int64_t end);  // elements
  // Writes code[begin, end). Returns how many anchors are not ignored; `invalid`: one whose label is no class, or -1.
  int64_t (*encode_labels)(const LabelArgs&, int64_t begin, int64_t end, int64_t* invalid);
  // Whether an element of `operand` in [0, count) is outside [0, 1] (NaN is), and one that is.
  bool (*find_outside_unit)(const ElementwiseArgs&, const Operand& operand, int64_t count, double* value);
  double (*softmax_rows)(const SoftmaxArgs&, int64_t begin, int64_t end);  // class stride 1
  double (*softmax_columns)(const SoftmaxArgs&, int64_t begin, int64_t end);  // any strides
  double (*distribution_focal)(const DistributionArgs&, int64_t begin, int64_t end);  // positions, any strides
  // The lowest position whose target is not in [0, classes - 1], or -1.
  int64_t (*find_outside_bins)(const DistributionArgs&, int64_t begin, int64_t end);
  // The sum of weight[target] (or the number of targets) without ignore_index; `invalid` is the lowest position whose
  // target is neither ignored nor in [0, classes), or -1.
  double (*count_targets)(const SoftmaxArgs&, int64_t begin, int64_t end, int64_t* invalid);
  void (*pairwise)(const PairwiseArgs&, int64_t begin, int64_t end);  // anchors
  void (*scale)(void* data, DType dtype, int64_t count, double factor);  // data *= factor
  bool (*evaluate)(const char* function, const void* x, void* y, int64_t count, DType dtype, double parameter);
};

extern const Kernels baseline, avx2, avx512;

// The level in use: the best this CPU runs, or the lower one FUSED_LOSSES_CPU_LEVEL names. Read once.
// Throws std::invalid_argument where the variable names no level, or one this CPU lacks.
const Kernels& kernels();
std::vector<const Kernels*> runnable();  // slowest first

}  // namespace fused_losses::cpu
