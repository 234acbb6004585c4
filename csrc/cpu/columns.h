// Streaming passes over the columns of a matrix: sums, centring, powers. Sums run in T over blocks of 256 rows and in
// fp64 across blocks, in a fixed order, so their bits do not depend on the number of threads.
#pragma once

#include "../common.h"
#include "types.h"

namespace sslkern {

constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockCols = 512;
constexpr int64_t kFold = 128;  // narrow rows that lie side by side are walked together, as one row this wide

// The next `step` rows of what lies about 4 KB ahead: where a column block's rows are in pages of their own, the
// hardware prefetcher starts anew each time. Rows that lie side by side are followed by more of them.
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

// sum += x o y, column by column
template <class T>
SSLKERN_INLINE void dot_rows_body(const T* x, const T* y, int64_t ld, int64_t rows, int64_t cols, T* sum) {
  for (int64_t i = 0; i < rows; ++i, x += ld, y += ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) sum[j] += x[j] * y[j];
  }
}

// out = (alpha product + column other - z along) * scale; product, z and other have rows of ld numbers
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

// A tile of a gradient: alpha product + column z, where `other` is given + coeff (x - other) with x = z + high + low,
// and where row_sq is given + cubic (z^3 - row_sq z + shift).
template <class T>
struct GradientTile {
  int64_t rows, cols;
  const T *product, *z;
  int64_t ld;  // of product and z
  T alpha;
  const T* column;
  const T* other = nullptr;
  int64_t other_ld = 0;
  T coeff = 0;
  const T *high = nullptr, *low = nullptr, *row_sq = nullptr;
  T cubic = 0;
  const T* shift = nullptr;
  T* out = nullptr;
  int64_t out_ld = 0;
};

template <bool Pull, bool Cubic, class T>
SSLKERN_INLINE void gradient_body(const GradientTile<T>& g) {
  const T *product = g.product, *z = g.z, *other = g.other, *column = g.column, *high = g.high, *low = g.low,
          *shift = g.shift, alpha = g.alpha, coeff = g.coeff, cubic = g.cubic;
  T* out = g.out;
  for (int64_t i = 0; i < g.rows; ++i, product += g.ld, z += g.ld, out += g.out_ld) {
    const T r = Cubic ? g.row_sq[i] : T(0);
#pragma omp simd
    for (int64_t j = 0; j < g.cols; ++j) {
      T sum = alpha * product[j] + column[j] * z[j];
      if (Cubic) sum += cubic * ((z[j] * z[j] - r) * z[j] + shift[j]);
      if (Pull) sum += coeff * (z[j] + ((high[j] - other[j]) + low[j]));
      out[j] = sum;
    }
    if (Pull) other += g.other_ld;
  }
}

template <class T>
SSLKERN_INLINE void gradient_rows_body(const GradientTile<T>& g) {
  if (g.other != nullptr) {
    g.row_sq != nullptr ? gradient_body<true, true>(g) : gradient_body<true, false>(g);
  } else {
    g.row_sq != nullptr ? gradient_body<false, true>(g) : gradient_body<false, false>(g);
  }
}

// The clones of a body, for one T.
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
  SSLKERN_CLONES static Powers<T> powers(const T* x, int64_t n) {                                                      \
    return powers_body(x, n);                                                                                          \
  }                                                                                                                    \
  SSLKERN_CLONES static T distance_row(const T* x, const T* y, int64_t n) {                                            \
    return distance_row_body(x, y, n);                                                                                 \
  }                                                                                                                    \
  SSLKERN_CLONES static void cubic_rows(const T* z, int64_t ld, int64_t rows, int64_t cols, const T* row_sq, T* sum) { \
    cubic_rows_body(z, ld, rows, cols, row_sq, sum);                                                                   \
  }                                                                                                                    \
  SSLKERN_CLONES static void gradient_rows(const GradientTile<T>& g) {                                                 \
    gradient_rows_body(g);                                                                                             \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

// How many rows of `cols` numbers are walked as one, where they lie side by side.
inline int64_t rows_in_fold(int64_t rows, int64_t cols, bool side_by_side) {
  return side_by_side && 2 * cols <= kFold ? std::min(rows, kFold / cols) : 1;
}

// A vector of `cols` numbers repeated for every row of a fold.
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

template <class T>
void write_tile(GradientTile<T> g) {
  const int64_t cols = g.cols, rest = g.rows;
  const bool side_by_side =
      g.ld == cols && g.out_ld == cols && (g.other == nullptr || g.other_ld == cols) && g.row_sq == nullptr;
  const int64_t fold = rows_in_fold(g.rows, cols, side_by_side), wide = g.rows / fold;
  if (fold > 1) {
    GradientTile<T> folded = g;
    const Repeated<T> column(g.column, cols, fold);
    folded.rows = wide;
    folded.cols = folded.ld = folded.out_ld = folded.other_ld = fold * cols;
    folded.column = column.values;
    if (g.other == nullptr) {
      gradient_rows(folded);
    } else {
      const Repeated<T> high(g.high, cols, fold), low(g.low, cols, fold);
      folded.high = high.values;
      folded.low = low.values;
      gradient_rows(folded);
      g.other += wide * fold * cols;
    }
    g.rows = rest - wide * fold;
    g.product += wide * fold * cols;
    g.z += wide * fold * cols;
    g.out += wide * fold * cols;
  }
  gradient_rows(g);
}

template <class From, class T>
void convert_tile(const Matrix& m, int64_t i0, int64_t i1, int64_t j0, int64_t j1, T* out, int64_t ld) {
  const From* x = reinterpret_cast<const From*>(m.at(i0, j0));
  const int64_t rows = i1 - i0, cols = j1 - j0, rs = m.row_stride, cs = m.col_stride;
  if (cs == 1) {
    convert_rows(x, rs, rows, cols, out, ld);
  } else {  // walk a transposed matrix along its own rows
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = 0; i < rows; ++i) out[i * ld + j] = static_cast<T>(wide(x[i * rs + j * cs]));
  }
}

// The tile [i0, i1) x [j0, j1) as T with unit column stride: in place where it already is that, in `scratch` otherwise.
// Narrow rows come side by side, so that the order of their sums does not depend on the layout.
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
