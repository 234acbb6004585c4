// Shared by all kernels: the stable-ABI includes, tensor allocation, and access to the slices of a stack.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "loops.h"

namespace sslkern {

namespace stable = torch::stable;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

// Asks for huge pages for a large allocation. With small pages, touching 51 MB takes 12 ms, and the pass that fills it
// takes 1.8 ms. Each thread touches the pages that it writes, so they are in its cache. This is only advice to the
// kernel: a failure is harmless.
inline void prepare_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, huge = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(page - 1);
  if (end >= begin + 2 * huge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Uninitialised scratch memory.
template <class T>
std::unique_ptr<T[]> room_for(int64_t numbers) {
  return std::unique_ptr<T[]>(new T[numbers]);
}

// Calls f(first, last) over parts of [begin, end), each of at least `grain` items. There are a few parts for every
// thread, and a free thread takes the next one: if another process uses a core, the threads on the other cores take
// over. Runs serially inside another parallel region, or if there are no more items than `grain`.
template <class F>
void in_turns(int64_t begin, int64_t end, int64_t grain, const F& f) {
  constexpr int64_t turns = 4;
  const int64_t count = end - begin, threads = stable::get_num_threads();
  if (count <= 0) return;
  const int64_t step = threads == 1 ? count : std::max({int64_t{1}, grain, ceil_div(count, turns * threads)});
  const int64_t parts = ceil_div(count, step);
  if (parts == 1) return f(begin, end);
  std::atomic<int64_t> next{0};
  stable::parallel_for(0, std::min(threads, parts), 1, [&](int64_t, int64_t) {
    for (int64_t part = next++; part < parts; part = next++)
      f(begin + part * step, std::min(end, begin + (part + 1) * step));
  });
}

// The same over [0, count), where each item costs `work` multiplications and waking the threads costs as much as 2^18.
template <class F>
void in_parallel(int64_t count, int64_t work, const F& f) {
  in_turns(0, count, (1 << 18) / std::max<int64_t>(1, work), f);
}

inline double sum_of(const std::vector<double>& x) {
  double total = 0;
  for (double value : x) total += value;
  return total;
}

// A new, uninitialised tensor. The caller writes all of it.
inline Tensor fresh(const Tensor& like, const Shape& shape, ScalarType dtype) {
  Tensor out = stable::new_empty(like, shape, dtype);
  prepare_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  return out;
}

// The same, with the shape, dtype and strides of `like`.
inline Tensor fresh_like(const Tensor& like) {
  Tensor out = stable::empty_like(like);
  prepare_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  return out;
}

// Pointer to the elements of a tensor. Kernels write only to new tensors, so the const access is safe: it never
// materialises a lazy copy of an input.
template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

template <class T>
constexpr ScalarType dtype_of() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

inline bool is_double(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double;
}

// fp64 for fp64 inputs, fp32 for all others.
inline ScalarType accumulation_dtype(const Tensor& t) {
  return is_double(t) ? ScalarType::Double : ScalarType::Float;
}

// One (N, D) matrix of a stack, with any strides and any of the four dtypes.
struct Matrix {
  char* data;
  int64_t rows, cols, row_stride, col_stride;
  ScalarType dtype;
  int64_t element_size;

  char* at(int64_t i, int64_t j) const {
    return data + (i * row_stride + j * col_stride) * element_size;
  }
};

// x (N, C, ...) in memory order. A channels-last x has one row per position and a length of 1.
struct Channels {
  int64_t rows, channels, length;  // each row holds `length` elements of every channel
};

inline Channels channels_of(const Tensor& x) {
  int64_t positions = 1;
  for (int64_t k = 2; k < x.dim(); ++k) positions *= x.size(k);
  if (x.is_contiguous()) return {x.size(0), x.size(1), positions};
  int64_t stride = 1;
  bool channels_last = true;
  const auto next = [&](int64_t k) {
    channels_last = channels_last && (x.size(k) == 1 || x.stride(k) == stride);
    stride *= x.size(k);
  };
  next(1);
  for (int64_t k = x.dim() - 1; k > 1; --k) next(k);
  next(0);
  STD_TORCH_CHECK(channels_last, "x must be contiguous or channels-last");
  return {x.size(0) * positions, x.size(1), 1};
}

// Number of (N, D) matrices in a tensor (..., N, D).
inline int64_t stack_size(const Tensor& t) {
  int64_t count = 1;
  for (int64_t k = 0; k + 2 < t.dim(); ++k) count *= t.size(k);
  return count;
}

inline Matrix slice(const Tensor& t, int64_t index) {
  const int64_t dims = t.dim();
  int64_t offset = 0;
  for (int64_t k = dims - 3; k >= 0; --k) {
    offset += (index % t.size(k)) * t.stride(k);
    index /= t.size(k);
  }
  const int64_t element = t.element_size();
  char* base = data<char>(t) + offset * element;
  return {base, t.size(dims - 2), t.size(dims - 1), t.stride(dims - 2), t.stride(dims - 1), t.scalar_type(), element};
}

// Calls f(index) for every slice of a stack. Small slices run one per thread, and the products inside each one run
// serially: 16 slices of (128, 192) take half the time. A single small slice runs in the same parallel region, beside
// an idle thread, so that its bits are the same as in a stack.
template <class F>
void for_slices(int64_t count, int64_t numbers, const F& f) {
  constexpr int64_t small = 1 << 16;
  if (numbers > small) {
    for (int64_t s = 0; s < count; ++s) f(s);
    return;
  }
  in_turns(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < std::min(end, count); ++s) f(s);
  });
}

// Shape with the leading dimensions of t (..., N, D), `front` before them and `tail` after them.
inline Shape stacked(const Tensor& t, const Shape& tail, const Shape& front = {}) {
  Shape shape = front;
  for (int64_t k = 0; k + 2 < t.dim(); ++k) shape.push_back(t.size(k));
  shape.insert(shape.end(), tail.begin(), tail.end());
  return shape;
}

}  // namespace sslkern
