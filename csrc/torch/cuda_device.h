// The current device and stream of a tensor, and the library its ops are registered in. Under test the same source is
// built for the host (tests/cuda_on_cpu) and registered beside the real one.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include "torch/tensors.h"

#ifdef FUSED_LOSSES_SIMT
#define FUSED_LOSSES_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fused_losses_simt, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>
#define FUSED_LOSSES_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m)
#endif

namespace fused_losses {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Makes the tensor's device current for the scope, and knows its current stream.
class OnDevice {
 public:
#ifdef FUSED_LOSSES_SIMT
  explicit OnDevice(const Tensor&) {}
  int index() const { return 0; }
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(tensor.get_device_index()) {
    check(cudaSetDevice(index_), "cudaSetDevice");  // for our CUDA runtime: the guard speaks to PyTorch's
  }
  int index() const { return index_; }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;

 public:
#endif
  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index()), "cudaDeviceGetAttribute");
    return count;
  }
};

// `tensor`, if there is one, is where `like` is: a kernel that reads the host's memory takes the process down.
inline void same_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  " is on another device than input");
}

// A scalar upstream gradient as a kernel reads it: one element of `dtype`.
inline const void* one_element(const Tensor& upstream, DType dtype) {
  STD_TORCH_CHECK(upstream.numel() == 1 && dtype_of(upstream, "upstream") == dtype,
                  "the upstream gradient must be one element of the loss's dtype");
  return upstream.data_ptr();
}

}  // namespace fused_losses
