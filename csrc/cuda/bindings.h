// Connects torch's tensors to the launchers: streams, devices and errors, through the stable ABI. The binary must load
// in a torch without CUDA, so nothing here links against torch's CUDA library.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include "../common.h"

namespace sslkern::cuda {

inline void check_cuda(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a CUDA tensor: this is sslkern's CUDA kernel");
}

inline void check(cudaError_t error, const char* kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, "sslkern's CUDA kernel ", kernel, " failed: ", cudaGetErrorString(error));
}

// torch's current stream on the device of a tensor. The function is looked up in the CUDA library that torch has
// loaded.
inline cudaStream_t current_stream(const Tensor& t) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(lookup != nullptr, "sslkern found no libtorch_cuda.so with the current CUDA stream in it");
  void* stream = nullptr;
  STD_TORCH_CHECK(lookup(t.get_device_index(), &stream) == AOTI_TORCH_SUCCESS, "torch gave no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Calls f(T()), where T is the dtype of a tensor.
template <class F>
void as_stored(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16());
    case ScalarType::Half: return f(torch::headeronly::Half());
    case ScalarType::Double: return f(double());
    default: return f(float());
  }
}

}  // namespace sslkern::cuda
