// Shared by all CUDA kernels. Kernels and launchers use pointers and the CUDA runtime only. So a C++ compiler can build
// them too, against a runtime that is simulated on a CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sslkern::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kVectorBytes = 16;

// The type of sums: fp64 for fp64, fp32 for all others.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t power_of_two_from(int64_t x) {
  int64_t power = 1;
  while (power < x) power *= 2;
  return power;
}

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// The dynamic shared memory of the block.
__device__ inline unsigned char* shared_memory() {
#ifdef SSLKERN_SIMULATOR
  return simulator::shared_memory();
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

// Loads V elements in one access, of 16 bytes if V is more than one.
template <class T, int V>
__device__ __forceinline__ void load(const T* from, T (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = *from;
  } else {
    static_assert(sizeof(to) == kVectorBytes);
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(to, &raw, sizeof(raw));
  }
}

template <class T, int V>
__device__ __forceinline__ void store(const T (&from)[V], T* to) {
  if constexpr (V == 1) {
    *to = from[0];
  } else {
    static_assert(sizeof(from) == kVectorBytes);
    uint4 raw;
    memcpy(&raw, from, sizeof(raw));
    *reinterpret_cast<uint4*>(to) = raw;
  }
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const A&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

// Like `launch`, for a kernel that may need more shared memory than the default limit.
template <class... P, class... A>
cudaError_t launch_large(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         const A&... arguments) {
  if (shared_bytes > 48 << 10) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t e = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared_bytes))) return e;
  }
  return launch(kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace sslkern::cuda
