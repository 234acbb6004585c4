// Streaming passes over the columns of a matrix: sums, centring, powers. Sums run in T over blocks of 256 rows and in
// fp64 across blocks, in a fixed order, so their bits do not depend on the number of threads.
#pragma once

#include "../common.h"

namespace sslkern {

constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockCols = 128;

template <class T>
SSLKERN_INLINE void sum_rows_body(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot, T* sum) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4, x += 4 * ld) {
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

// out = (x - high - low) * scale; square += out^2
template <class T>
SSLKERN_INLINE void centre_rows_body(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* high, const T* low,
                                     T* out, int64_t out_ld, T* square) {
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2, x += 2 * ld, out += 2 * out_ld) {
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

#define SSLKERN_KERNELS(T)                                                                                        \
  SSLKERN_CLONES static void sum_rows(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot, T* sum) { \
    sum_rows_body(x, ld, rows, cols, pivot, sum);                                                                 \
  }                                                                                                               \
  SSLKERN_CLONES static void centre_rows(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* high,       \
                                         const T* low, T* out, int64_t out_ld, T* square) {                       \
    centre_rows_body(x, ld, rows, cols, high, low, out, out_ld, square);                                          \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

template <class From, class T>
void convert_tile(const Matrix& m, int64_t i0, int64_t i1, int64_t j0, int64_t j1, T* out, int64_t ld) {
  const From* x = reinterpret_cast<const From*>(m.at(i0, j0));
  const int64_t rows = i1 - i0, cols = j1 - j0, rs = m.row_stride, cs = m.col_stride;
  if (cs == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) out[i * ld + j] = static_cast<T>(x[i * rs + j]);
  } else {  // walk a transposed matrix along its own rows
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = 0; i < rows; ++i) out[i * ld + j] = static_cast<T>(x[i * rs + j * cs]);
  }
}

// The tile [i0, i1) x [j0, j1) as T with unit column stride: in place where it already is that, in `scratch` otherwise.
template <class T>
const T* tile(const Matrix& m, int64_t i0, int64_t i1, int64_t j0, int64_t j1, std::vector<T>& scratch, int64_t& ld) {
  if (m.dtype == dtype_of<T>() && m.col_stride == 1) {
    ld = m.row_stride;
    return reinterpret_cast<const T*>(m.at(i0, j0));
  }
  ld = j1 - j0;
  scratch.resize((i1 - i0) * ld);
  switch (m.dtype) {
    case ScalarType::BFloat16: convert_tile<torch::headeronly::BFloat16>(m, i0, i1, j0, j1, scratch.data(), ld); break;
    case ScalarType::Half: convert_tile<torch::headeronly::Half>(m, i0, i1, j0, j1, scratch.data(), ld); break;
    case ScalarType::Float: convert_tile<float>(m, i0, i1, j0, j1, scratch.data(), ld); break;
    default: convert_tile<double>(m, i0, i1, j0, j1, scratch.data(), ld);
  }
  return scratch.data();
}

// The column means as an unevaluated sum high + low: at |mu|/sigma = 1e4 one fp32 number would miss the mean by
// 6e-4 sigma. `pivot` is the first row, so that only differences are ever summed.
template <class T>
void split_mean(const T* pivot, const double* sum, int64_t cols, int64_t n, T* high, T* low) {
  for (int64_t j = 0; j < cols; ++j) {
    const double mean = static_cast<double>(pivot[j]) + sum[j] / n;
    high[j] = static_cast<T>(mean);
    low[j] = static_cast<T>((static_cast<double>(pivot[j]) - high[j]) + sum[j] / n);
  }
}

// Means, unbiased variances and the centred values of up to kBlockCols columns, all rows. `out` is their (N, ld) home.
template <class T>
void centre_columns(const Matrix& m, int64_t j0, int64_t j1, T* high, T* low, T* variance, T* out, int64_t out_ld) {
  const int64_t n = m.rows, cols = j1 - j0;
  std::vector<T> scratch;
  T pivot[kBlockCols], part[kBlockCols];
  double total[kBlockCols] = {};
  int64_t ld = 0;
  std::copy_n(tile(m, 0, 1, j0, j1, scratch, ld), cols, pivot);
  for (int64_t i0 = 0; i0 < n; i0 += kBlockRows) {
    const int64_t i1 = std::min(n, i0 + kBlockRows);
    const T* x = tile(m, i0, i1, j0, j1, scratch, ld);
    std::fill_n(part, cols, T(0));
    sum_rows(x, ld, i1 - i0, cols, pivot, part);
    for (int64_t j = 0; j < cols; ++j) total[j] += part[j];
  }
  split_mean(pivot, total, cols, n, high, low);
  std::fill_n(total, cols, 0.);
  for (int64_t i0 = 0; i0 < n; i0 += kBlockRows) {
    const int64_t i1 = std::min(n, i0 + kBlockRows);
    const T* x = tile(m, i0, i1, j0, j1, scratch, ld);
    std::fill_n(part, cols, T(0));
    centre_rows(x, ld, i1 - i0, cols, high, low, out + i0 * out_ld, out_ld, part);
    for (int64_t j = 0; j < cols; ++j) total[j] += part[j];
  }
  for (int64_t j = 0; j < cols; ++j) variance[j] = static_cast<T>(total[j] / (n - 1));
}

}  // namespace sslkern
