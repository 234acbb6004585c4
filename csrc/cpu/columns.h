// Streaming passes over the columns of a matrix: sums, centring, powers. Sums run in T over blocks of 256 rows and in
// fp64 across blocks, in a fixed order, so their bits do not depend on the number of threads.
#pragma once

#include "../common.h"
#include "column_loops.h"

namespace sslkern {

// Number of rows of `cols` elements that are processed as one: more than 1 only for contiguous narrow rows.
inline int64_t rows_in_fold(int64_t rows, int64_t cols, bool side_by_side) {
  return side_by_side && 2 * cols <= kFold ? std::min(rows, kFold / cols) : 1;
}

// A vector of `cols` elements, repeated for every row of a fold.
template <class T>
struct Repeated {
  T values[kFold] = {};

  Repeated(const T* x, int64_t cols, int64_t fold) {
    for (int64_t f = 0; f < fold; ++f) std::copy_n(x, cols, values + f * cols);
  }
};

template <class T>
void unfold(const T* part, int64_t cols, int64_t fold, T* sum) {
  for (int64_t f = 0; f < fold; ++f)
    for (int64_t j = 0; j < cols; ++j) sum[j] += part[f * cols + j];
}

// sum += column sums of x - pivot, (rows, cols)
template <class T>
void add_sums(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot, T* sum) {
  const int64_t fold = rows_in_fold(rows, cols, ld == cols), wide = rows / fold;
  if (fold == 1) return sum_rows(x, ld, rows, cols, pivot, sum);
  T part[kFold] = {};
  sum_rows(x, fold * cols, wide, fold * cols, Repeated<T>(pivot, cols, fold).values, part);
  unfold(part, cols, fold, sum);
  sum_rows(x + wide * fold * cols, cols, rows - wide * fold, cols, pivot, sum);
}

// out = x - high - low, (rows, cols); square += the column sums of out^2
template <class T>
void centre(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* high, const T* low, T* out, int64_t out_ld,
            T* square) {
  const int64_t fold = rows_in_fold(rows, cols, ld == cols && out_ld == cols), wide = rows / fold;
  if (fold == 1) return centre_rows(x, ld, rows, cols, high, low, out, out_ld, square);
  T part[kFold] = {};
  const Repeated<T> h(high, cols, fold), l(low, cols, fold);
  centre_rows(x, fold * cols, wide, fold * cols, h.values, l.values, out, fold * cols, part);
  unfold(part, cols, fold, square);
  const int64_t done = wide * fold * cols;
  centre_rows(x + done, cols, rows - wide * fold, cols, high, low, out + done, cols, square);
}

template <class From, class T>
void convert_tile(const Matrix& m, int64_t i0, int64_t i1, int64_t j0, int64_t j1, T* out, int64_t ld) {
  const From* x = reinterpret_cast<const From*>(m.at(i0, j0));
  const int64_t rows = i1 - i0, cols = j1 - j0, rs = m.row_stride, cs = m.col_stride;
  if (cs == 1) {
    convert_rows(x, rs, rows, cols, out, ld);
  } else {  // read a transposed matrix along its own rows
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = 0; i < rows; ++i) out[i * ld + j] = static_cast<T>(wide(x[i * rs + j * cs]));
  }
}

// The tile [i0, i1) x [j0, j1) as T with unit column stride. Points into the matrix where it has that form already, and
// to `scratch` otherwise. Narrow rows are always contiguous, so the order of their sums does not depend on the layout.
template <class T>
const T* tile(const Matrix& m, int64_t i0, int64_t i1, int64_t j0, int64_t j1, std::vector<T>& scratch, int64_t& ld) {
  const bool side_by_side = 2 * (j1 - j0) > kFold || m.row_stride == j1 - j0;
  if (m.dtype == dtype_of<T>() && m.col_stride == 1 && side_by_side) {
    ld = m.row_stride;
    return reinterpret_cast<const T*>(m.at(i0, j0));
  }
  ld = j1 - j0;
  scratch.resize((i1 - i0) * ld);
  switch (m.dtype) {
    case ScalarType::BFloat16: convert_tile<BFloatBits>(m, i0, i1, j0, j1, scratch.data(), ld); break;
    case ScalarType::Half: convert_tile<HalfBits>(m, i0, i1, j0, j1, scratch.data(), ld); break;
    case ScalarType::Float: convert_tile<float>(m, i0, i1, j0, j1, scratch.data(), ld); break;
    default: convert_tile<double>(m, i0, i1, j0, j1, scratch.data(), ld);
  }
  return scratch.data();
}

// Column means as an unevaluated sum high + low: at |mu|/sigma = 1e4, a single fp32 value would miss the mean by 6e-4
// sigma. `pivot` is the first row; only differences from it are summed.
template <class T>
void split_mean(const T* pivot, const double* sum, int64_t cols, int64_t n, T* high, T* low) {
  for (int64_t j = 0; j < cols; ++j) {
    const double mean = static_cast<double>(pivot[j]) + sum[j] / n;
    high[j] = static_cast<T>(mean);
    low[j] = static_cast<T>((static_cast<double>(pivot[j]) - high[j]) + sum[j] / n);
  }
}

// Means, unbiased variances and centred values of up to kBlockCols columns, over all rows. The centred values go to
// `out`, which has row stride out_ld.
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
    add_sums(x, ld, i1 - i0, cols, pivot, part);
    for (int64_t j = 0; j < cols; ++j) total[j] += part[j];
  }
  split_mean(pivot, total, cols, n, high, low);
  std::fill_n(total, cols, 0.);
  for (int64_t i0 = 0; i0 < n; i0 += kBlockRows) {
    const int64_t i1 = std::min(n, i0 + kBlockRows);
    const T* x = tile(m, i0, i1, j0, j1, scratch, ld);
    std::fill_n(part, cols, T(0));
    centre(x, ld, i1 - i0, cols, high, low, out + i0 * out_ld, out_ld, part);
    for (int64_t j = 0; j < cols; ++j) total[j] += part[j];
  }
  for (int64_t j = 0; j < cols; ++j) variance[j] = static_cast<T>(total[j] / (n - 1));
}

}  // namespace sslkern
