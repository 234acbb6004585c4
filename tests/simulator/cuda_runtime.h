// The part of CUDA's runtime and language that the package's kernels take, for a C++ compiler and a CPU. This folder
// comes first on the include path, so a kernel's <cuda_runtime.h> is this one. A launch returns when the kernel is
// through; streams are ignored. Of stray accesses, only writes just past the shared memory are noticed.
#pragma once

#include <math.h>  // the global ones: sqrt(float), fmaf and so on

#include <concepts>
#include <map>
#include <tuple>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ \
  _Pragma("GCC error \"the simulator cannot poison static shared memory: use simulator::shared_memory()\"")

inline const uint3& threadIdx = simulator::machine.thread_index;
inline const uint3& blockIdx = simulator::machine.block_index;
inline const dim3& blockDim = simulator::machine.block;
inline const dim3& gridDim = simulator::machine.grid;
inline constexpr int warpSize = simulator::kWarp;

// Barriers and warp operations. `at` is the line of the call, for messages and to tell one barrier from another.

namespace simulator {

template <class T, class... Types>
concept OneOf = (std::same_as<T, Types> || ...);
template <class A, class B>
concept OfOneKind = (std::integral<A> && std::integral<B>) || (std::floating_point<A> && std::floating_point<B>);

// What a shuffle may read from: the lane's `width` lanes.
struct Segment {
  int lane, begin, end;

  Segment(int width, const Place& at) : lane(machine.self().lane()), begin(lane & -width), end(begin + width) {
    if (width < 1 || width > warpSize || (width & (width - 1)))
      throw machine.failure(machine.self(), at.text() + " has a width that is no power of two up to 32");
  }
};

template <class T>
T exchange(const Place& at, unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = machine.meet(at, mask, source, bits).received;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simulator

inline void __syncthreads(simulator::Place at = {}) {
  simulator::machine.barrier(at.of(__func__));
}
inline void __syncwarp(unsigned mask = ~0u, simulator::Place at = {}) {
  simulator::machine.meet(at.of(__func__), mask);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simulator::Place at = {}) {
  return simulator::machine.meet(at.of(__func__), mask, -1, predicate != 0).ballot;
}
inline int __any_sync(unsigned mask, int predicate, simulator::Place at = {}) {
  return simulator::machine.meet(at.of(__func__), mask, -1, predicate != 0).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, simulator::Place at = {}) {
  return simulator::machine.meet(at.of(__func__), mask, -1, predicate == 0).ballot == 0;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, simulator::Place at = {}) {
  const simulator::Segment s(width, at.of(__func__));
  return simulator::exchange(at.of(__func__), mask, value, s.begin + (source & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, simulator::Place at = {}) {
  const simulator::Segment s(width, at.of(__func__));
  const int64_t source = int64_t(s.lane) - delta;
  return simulator::exchange(at.of(__func__), mask, value, source < s.begin ? s.lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, simulator::Place at = {}) {
  const simulator::Segment s(width, at.of(__func__));
  const int64_t source = int64_t(s.lane) + delta;
  return simulator::exchange(at.of(__func__), mask, value, source < s.end ? source : s.lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, simulator::Place at = {}) {
  const simulator::Segment s(width, at.of(__func__));
  const int source = s.lane ^ lanes;
  return simulator::exchange(at.of(__func__), mask, value, source >= 0 && source < s.end ? source : s.lane);
}

// Memory. One thread runs at a time: what it does is atomic, and seen by the next one.

inline void __threadfence() {}
inline void __threadfence_block() {}

template <simulator::OneOf<int, unsigned, unsigned long long, float, double> T>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  return std::exchange(*to, *to + value);
}
template <simulator::OneOf<int, unsigned, long long, unsigned long long> T>
T atomicMax(T* to, std::type_identity_t<T> value) {
  return std::exchange(*to, *to < value ? value : *to);
}
template <simulator::OneOf<int, unsigned, unsigned long long> T>
T atomicCAS(T* to, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return std::exchange(*to, *to == compare ? value : *to);
}

#define SIMULATOR_LOAD(name) \
  template <class T>         \
  T name(const T* from) {    \
    return *from;            \
  }
#define SIMULATOR_STORE(name)                       \
  template <class T>                                \
  void name(T* to, std::type_identity_t<T> value) { \
    *to = value;                                    \
  }
SIMULATOR_LOAD(__ldg)
SIMULATOR_LOAD(__ldca)
SIMULATOR_LOAD(__ldcg)
SIMULATOR_LOAD(__ldcs)
SIMULATOR_LOAD(__ldlu)
SIMULATOR_LOAD(__ldcv)
SIMULATOR_STORE(__stwb)
SIMULATOR_STORE(__stcg)
SIMULATOR_STORE(__stcs)
SIMULATOR_STORE(__stwt)
#undef SIMULATOR_LOAD
#undef SIMULATOR_STORE

// Arithmetic.

#if !defined(__GLIBC__) || !__GLIBC_PREREQ(2, 42)  // which has C23's
inline float rsqrtf(float x) {
  return 1.0f / sqrtf(x);
}
inline double rsqrt(double x) {
  return 1.0 / ::sqrt(x);
}
#endif
inline float __fmaf_rn(float x, float y, float z) {
  return fmaf(x, y, z);
}
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32);
}

template <class A, simulator::OfOneKind<A> B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::floating_point<T>) return ::fmin(T(a), T(b));  // a number where one of them is NaN
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, simulator::OfOneKind<A> B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::floating_point<T>) return ::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

// The host's side.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;  // none is supported

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace simulator {

inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, size_t> shared_limits;  // of the kernels that may use more than 48 KB

inline cudaError_t check(const cudaLaunchConfig_t& c, const void* kernel) {
  const dim3 &grid = c.gridDim, &block = c.blockDim;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = uint64_t(block.x) * block.y * block.z;
  const auto limit = shared_limits.find(kernel);
  const size_t shared = limit == shared_limits.end() ? 48 << 10 : limit->second;
  if (c.numAttrs) return cudaErrorNotSupported;
  return blocks > 0 && grid.x < 1u << 31 && grid.y <= 65535 && grid.z <= 65535 && threads > 0 && threads <= 1024 &&
                 block.x <= 1024 && block.y <= 1024 && block.z <= 64 && c.dynamicSmemBytes <= shared
             ? cudaSuccess
             : cudaErrorInvalidConfiguration;
}

}  // namespace simulator

inline cudaError_t cudaGetLastError() {
  return std::exchange(simulator::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    default: return "operation not supported";
  }
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > 227 << 10) return simulator::last_error = cudaErrorInvalidValue;
  simulator::shared_limits[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  static_assert((std::is_trivially_copyable_v<P> && ...), "a kernel's parameters are copied as bytes");
  const cudaError_t error = simulator::check(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return simulator::last_error = error;
  const std::tuple<P...> parameters{std::forward<A>(arguments)...};
  simulator::machine.launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                            [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}
