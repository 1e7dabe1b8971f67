// Between torch's tensors and the torch-free kernels. The LibTorch stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "dtype.h"

namespace fused_losses {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& tensor, const char* name);

// A new tensor, uninitialised.
Tensor empty(Sizes sizes, Sizes strides, const Tensor& like);
Tensor empty_contiguous(Sizes sizes, const Tensor& like);
// Dense, with the dimensions in `like`'s order of memory: its own strides where it is dense itself.
// wide: in float32.
Tensor empty_in_order(const Tensor& like, bool wide = false);
Tensor scalar(double value, const Tensor& like, bool wide = false);  // on the CPU; wide: float32
Tensor empty_doubles(int64_t count, const Tensor& like);  // on its device
Tensor empty_codes(int64_t count, const Tensor& like);    // int32, on its device
// On its device and contiguous: float64 for float64, float32 for any other.
Tensor empty_compute(Sizes sizes, const Tensor& like);

double read_scalar(const Tensor& tensor);  // a tensor of one element, on the CPU

bool is_dense(const Tensor& tensor);  // each element in a place of its own, and none between them, in any order
void multiply_(const Tensor& tensor, const Tensor& factor);  // torch's own, for any strides

// f(begin, end) over fixed chunks of [0, count), summed in their order: the result depends neither on the number of
// threads nor on chance.
template <class F>
double parallel_sum(int64_t count, int64_t chunk, const F& f) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  if (chunks <= 1) return count > 0 ? f(int64_t{0}, count) : 0.0;
  std::vector<double> partial(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) partial[i] = f(i * chunk, (i + 1) * chunk < count ? (i + 1) * chunk : count);
  });
  double sum = 0;
  for (double value : partial) sum += value;
  return sum;
}

}  // namespace fused_losses
