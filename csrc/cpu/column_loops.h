// Loops over the columns of a tile: sums, centring, powers. Each one is compiled for several instruction sets.
#pragma once

#include "types.h"

namespace sslkern {

constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockCols = 512;
constexpr int64_t kFold = 128;  // contiguous narrow rows are processed together, as one row of up to this width

// Prefetches `step` rows about 4 KB ahead. If the rows of a column block are on pages of their own, the hardware
// prefetcher restarts on each page. Contiguous rows continue into the next ones.
template <class T>
SSLKERN_INLINE void prefetch_rows(const T* x, int64_t ld, int64_t left, int64_t cols, int64_t step) {
  const int64_t ahead = std::max<int64_t>(step, 4096 / static_cast<int64_t>(sizeof(T)) / cols);
  const int64_t rows = ld == cols ? step : std::min(step, left - ahead);
  for (int64_t i = ahead; i < ahead + rows; ++i)
    for (int64_t j = 0; j < cols; j += 64 / sizeof(T)) __builtin_prefetch(x + i * ld + j);
}

template <class T>
SSLKERN_INLINE void sum_rows_body(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot, T* sum) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4, x += 4 * ld) {
    prefetch_rows(x, ld, rows - i, cols, 4);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T p = pivot[j];
      sum[j] += ((x[j] - p) + (x[j + ld] - p)) + ((x[j + 2 * ld] - p) + (x[j + 3 * ld] - p));
    }
  }
  for (; i < rows; ++i, x += ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) sum[j] += x[j] - pivot[j];
  }
}

// out = x - high - low; square += out^2
template <class T>
SSLKERN_INLINE void centre_rows_body(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* high, const T* low,
                                     T* out, int64_t out_ld, T* square) {
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2, x += 2 * ld, out += 2 * out_ld) {
    prefetch_rows(x, ld, rows - i, cols, 2);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T h = high[j], l = low[j], d = (x[j] - h) - l, e = (x[j + ld] - h) - l;
      out[j] = d;
      out[j + out_ld] = e;
      square[j] += d * d + e * e;
    }
  }
  for (; i < rows; ++i, x += ld, out += out_ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T d = (x[j] - high[j]) - low[j];
      out[j] = d;
      square[j] += d * d;
    }
  }
}

template <class T>
SSLKERN_INLINE void scale_rows_body(T* x, int64_t ld, int64_t rows, int64_t cols, const T* scale) {
  for (int64_t i = 0; i < rows; ++i, x += ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) x[j] *= scale[j];
  }
}

// sum += the elementwise product of x and y, per column
template <class T>
SSLKERN_INLINE void dot_rows_body(const T* x, const T* y, int64_t ld, int64_t rows, int64_t cols, T* sum) {
  for (int64_t i = 0; i < rows; ++i, x += ld, y += ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) sum[j] += x[j] * y[j];
  }
}

// out = (alpha product + column other - z along) * scale. product, z and other have row stride ld.
template <class T>
SSLKERN_INLINE void standard_rows_body(const T* product, const T* z, const T* other, int64_t ld, int64_t rows,
                                       int64_t cols, T alpha, const T* column, const T* along, const T* scale, T* out,
                                       int64_t out_ld) {
  for (int64_t i = 0; i < rows; ++i, product += ld, z += ld, other += ld, out += out_ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j)
      out[j] = (alpha * product[j] + column[j] * other[j] - z[j] * along[j]) * scale[j];
  }
}

template <class T>
SSLKERN_INLINE T square_sum_body(const T* x, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * x[j];
  return sum;
}

template <class T>
SSLKERN_INLINE T dot_row_body(const T* x, const T* y, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
  return sum;
}

// The sums of squares and of fourth powers of a row.
template <class T>
struct Powers {
  T second, fourth;
};

template <class T>
SSLKERN_INLINE Powers<T> powers_body(const T* x, int64_t n) {
  T second = 0, fourth = 0;
#pragma omp simd reduction(+ : second, fourth)
  for (int64_t j = 0; j < n; ++j) {
    const T square = x[j] * x[j];
    second += square;
    fourth += square * square;
  }
  return {second, fourth};
}

template <class T>
SSLKERN_INLINE T distance_row_body(const T* x, const T* y, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += (x[j] - y[j]) * (x[j] - y[j]);
  return sum;
}

// sum_j += sum_i (row_sq_i z_ij - z_ij^3)
template <class T>
SSLKERN_INLINE void cubic_rows_body(const T* z, int64_t ld, int64_t rows, int64_t cols, const T* row_sq, T* sum) {
  for (int64_t i = 0; i < rows; ++i, z += ld) {
    const T r = row_sq[i];
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) sum[j] += (r - z[j] * z[j]) * z[j];
  }
}

// Clones of the loops above, for one T.
#define SSLKERN_KERNELS(T)                                                                                             \
  SSLKERN_CLONES static void sum_rows(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot, T* sum) {    \
    sum_rows_body(x, ld, rows, cols, pivot, sum);                                                                      \
  }                                                                                                                    \
  SSLKERN_CLONES static void centre_rows(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* high,            \
                                         const T* low, T* out, int64_t out_ld, T* square) {                            \
    centre_rows_body(x, ld, rows, cols, high, low, out, out_ld, square);                                               \
  }                                                                                                                    \
  SSLKERN_CLONES static void scale_rows(T* x, int64_t ld, int64_t rows, int64_t cols, const T* scale) {                \
    scale_rows_body(x, ld, rows, cols, scale);                                                                         \
  }                                                                                                                    \
  SSLKERN_CLONES static void dot_rows(const T* x, const T* y, int64_t ld, int64_t rows, int64_t cols, T* sum) {        \
    dot_rows_body(x, y, ld, rows, cols, sum);                                                                          \
  }                                                                                                                    \
  SSLKERN_CLONES static void standard_rows(const T* product, const T* z, const T* other, int64_t ld, int64_t rows,     \
                                           int64_t cols, T alpha, const T* column, const T* along, const T* scale,     \
                                           T* out, int64_t out_ld) {                                                   \
    standard_rows_body(product, z, other, ld, rows, cols, alpha, column, along, scale, out, out_ld);                   \
  }                                                                                                                    \
  SSLKERN_CLONES static T square_sum(const T* x, int64_t n) {                                                          \
    return square_sum_body(x, n);                                                                                      \
  }                                                                                                                    \
  SSLKERN_CLONES static T dot_row(const T* x, const T* y, int64_t n) {                                                 \
    return dot_row_body(x, y, n);                                                                                      \
  }                                                                                                                    \
  SSLKERN_CLONES static Powers<T> powers(const T* x, int64_t n) {                                                      \
    return powers_body(x, n);                                                                                          \
  }                                                                                                                    \
  SSLKERN_CLONES static T distance_row(const T* x, const T* y, int64_t n) {                                            \
    return distance_row_body(x, y, n);                                                                                 \
  }                                                                                                                    \
  SSLKERN_CLONES static void cubic_rows(const T* z, int64_t ld, int64_t rows, int64_t cols, const T* row_sq, T* sum) { \
    cubic_rows_body(z, ld, rows, cols, row_sq, sum);                                                                   \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

}  // namespace sslkern
