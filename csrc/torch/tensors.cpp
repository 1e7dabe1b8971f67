#include "torch/tensors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <utility>

#include "torch/kept_memory.h"

namespace fused_losses {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                  "; expected float32, float64, bfloat16 or float16");
  return DType::f32;
}

static int64_t bytes_of(Sizes sizes, Sizes strides, int32_t dtype) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  const bool f64 = dtype == aoti_torch_dtype_float64(),
             half = dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16();
  return (last + 1) * (f64 ? 8 : half ? 2 : 4);
}

static Tensor empty_as(Sizes sizes, Sizes strides, int32_t dtype, const Tensor& like) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (device_type == aoti_torch_device_type_cpu()) {
    const int64_t bytes = bytes_of(sizes, strides, dtype);
    if (bytes >= kLargeBytes)
      if (const auto tensor = tensor_in_kept_memory(sizes, strides, dtype, bytes)) return *tensor;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor empty(Sizes sizes, Sizes strides, const Tensor& like) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_as(sizes, strides, dtype, like);
}

Tensor empty_doubles(int64_t count, const Tensor& like) {
  return empty_as({count}, {1}, aoti_torch_dtype_float64(), like);
}

Tensor empty_codes(int64_t count, const Tensor& like) { return empty_as({count}, {1}, aoti_torch_dtype_int32(), like); }

static std::vector<int64_t> contiguous_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

Tensor empty_contiguous(Sizes sizes, const Tensor& like) { return empty(sizes, contiguous_strides(sizes), like); }

Tensor empty_compute(Sizes sizes, const Tensor& like) {
  const bool f64 = like.scalar_type() == ScalarType::Double;
  return empty_as(sizes, contiguous_strides(sizes), f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                  like);
}

Tensor empty_in_order(const Tensor& like, bool wide) {
  if (wide) {
    const Tensor order = like.is_contiguous() ? like : torch::stable::empty_like(like);
    return empty_as(like.sizes(), order.strides(), aoti_torch_dtype_float32(), like);
  }
  if (like.is_contiguous()) return empty(like.sizes(), like.strides(), like);
  return torch::stable::empty_like(like);
}

Tensor scalar(double value, const Tensor& like, bool wide) {
  const Tensor result = wide ? empty_as({}, {}, aoti_torch_dtype_float32(), like) : empty({}, {}, like);
  void* data = result.data_ptr();
  switch (dtype_of(result, "input")) {
    case DType::f64: *static_cast<double*>(data) = value; break;
    case DType::f32: *static_cast<float*>(data) = static_cast<float>(value); break;
    case DType::bf16:
      *static_cast<torch::headeronly::BFloat16*>(data) = torch::headeronly::BFloat16(static_cast<float>(value));
      break;
    case DType::f16:
      *static_cast<torch::headeronly::Half*>(data) = torch::headeronly::Half(static_cast<float>(value));
      break;
  }
  return result;
}

double read_scalar(const Tensor& tensor) {
  const void* data = tensor.data_ptr();
  switch (dtype_of(tensor, "upstream")) {
    case DType::f64: return *static_cast<const double*>(data);
    case DType::bf16: return *static_cast<const torch::headeronly::BFloat16*>(data);
    case DType::f16: return *static_cast<const torch::headeronly::Half*>(data);
    case DType::f32: break;
  }
  return *static_cast<const float*>(data);
}

bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

void multiply_(const Tensor& tensor, const Tensor& factor) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor), torch::stable::detail::from(factor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // gives the result's handle back
}

}  // namespace fused_losses
