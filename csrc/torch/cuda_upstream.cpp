// scale_ on CUDA tensors: see torch/upstream.cpp.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/scale.h"

namespace fused_losses {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "gradient has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()),
                  "; expected float32, float64, bfloat16 or float16");
  return DType::f32;
}

// gradient [*], dense; upstream: one element of its dtype, on its device
void scale_(Tensor gradient, Tensor upstream) {
  STD_TORCH_CHECK(upstream.is_cuda() && upstream.get_device_index() == gradient.get_device_index(),
                  "upstream must be on the gradient's device");
  STD_TORCH_CHECK(upstream.numel() == 1 && upstream.scalar_type() == gradient.scalar_type(),
                  "upstream must be one element of the gradient's dtype");
  const auto device = gradient.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t error = cuda::scale(gradient.data_ptr(), dtype_of(gradient), gradient.numel(), upstream.data_ptr(),
                                        static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "scale_: ", cudaGetErrorString(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) { m.impl("scale_", TORCH_BOX(&scale_)); }

}  // namespace fused_losses
