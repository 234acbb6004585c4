// Operations of one block of threads on the small matrices of a rank-k update: loops, sums, products; and their memory.
#pragma once

#include "launch.cuh"

namespace sslkern::cuda {

// Calls f(0), ..., f(count - 1), shared by all threads.
template <class F>
__device__ void each(int count, const F& f) {
  for (int index = threadIdx.x; index < count; index += blockDim.x) f(index);
  __syncthreads();
}

// f(0) + ... + f(count - 1). kAtOnce terms are loaded at a time.
template <int kAtOnce, class F>
__device__ double sum_of(int count, const F& f) {
  double sum = 0;
  for (int first = 0; first < count; first += kAtOnce) {
    double terms[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) terms[e] = first + e < count ? static_cast<double>(f(first + e)) : 0.;
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) sum += terms[e];
  }
  return sum;
}

// Calls put(i, j, sum over q of x(i, q) y(q, j)). A thread has (S, S) of these sums at a time, in rows and columns that
// lie far apart: adjacent threads read adjacent columns, which lie in different banks of shared memory. S divides rows
// and columns.
template <int S, class X, class Y, class Put>
__device__ void products(int rows, int columns, int depth, const X& x, const Y& y, const Put& put) {
  const int down = rows / S, across = columns / S;
  each(down * across, [&](int tile) {
    const int i = tile / across, j = tile % across;
    double sums[S][S] = {};
#pragma unroll 2
    for (int q = 0; q < depth; ++q) {
      double left[S], right[S];
#pragma unroll
      for (int s = 0; s < S; ++s) left[s] = x(i + s * down, q), right[s] = y(q, j + s * across);
#pragma unroll
      for (int s = 0; s < S; ++s)
#pragma unroll
        for (int t = 0; t < S; ++t) sums[s][t] += left[s] * right[t];
    }
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
      for (int t = 0; t < S; ++t) put(i + s * down, j + t * across, sums[s][t]);
  });
}

// The same for an even number n of rows and columns.
template <class X, class Y, class Put>
__device__ void square_products(int n, int depth, const X& x, const Y& y, const Put& put) {
  if (n >= 64 && n % 4 == 0)
    products<4>(n, n, depth, x, y, put);
  else
    products<2>(n, n, depth, x, y, put);
}

// Memory for the small matrices of an update of rank k, counted in real columns.
struct SmallMatrices {
  double *gram, *outer;  // K (2k, 2k) and A (k, k)
  double* free[5];       // (2k, 2k)
  double* scratch;

  static __host__ __device__ int64_t numbers(int64_t k) {
    return 6 * 4 * k * k + k * k + 4 * k + 16;
  }
  __device__ SmallMatrices(double* memory, int k) : gram(memory) {
    for (double*& each : free) each = memory += 4 * k * k;
    outer = memory + 4 * k * k;
    scratch = outer + k * k;
  }
};

}  // namespace sslkern::cuda
