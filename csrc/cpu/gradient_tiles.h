// Tiles of a gradient: their computation, and storage in the dtype of the gradient.
#pragma once

#include "blocks.h"

namespace sslkern {

// A tile of a gradient: alpha product + column z. If `other` is given, it adds coeff (x - other), where x = z + high +
// low. If row_sq is given, it adds cubic (z^3 - row_sq z + shift).
template <class T>
struct GradientTile {
  int64_t rows, cols;
  const T *product, *z;
  int64_t ld;  // row stride of product and z
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

#define SSLKERN_KERNELS(T)                                             \
  SSLKERN_CLONES static void gradient_rows(const GradientTile<T>& g) { \
    gradient_rows_body(g);                                             \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

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

// Destination of gradient tiles. A gradient of type T is written in place; others are rounded from a buffer.
template <class T>
class TileWriter {
 public:
  explicit TileWriter(const Matrix& grad) : grad_(grad), in_place_(grad.dtype == dtype_of<T>()) {}

  T* at(int64_t i, int64_t j, int64_t rows, int64_t cols, int64_t& ld) {
    ld = in_place_ ? grad_.row_stride : cols;
    if (in_place_) return reinterpret_cast<T*>(grad_.at(i, j));
    buffer_.resize(rows * cols);
    return buffer_.data();
  }

  void flush(int64_t i, int64_t j, int64_t rows, int64_t cols) {
    if (in_place_) return;
    if (grad_.dtype == ScalarType::BFloat16) return store<BFloatBits>(i, j, rows, cols);
    store<HalfBits>(i, j, rows, cols);
  }

 private:
  template <class To>
  void store(int64_t i, int64_t j, int64_t rows, int64_t cols) {
    convert_rows(buffer_.data(), cols, rows, cols, reinterpret_cast<To*>(grad_.at(i, j)), grad_.row_stride);
  }

  const Matrix grad_;
  const bool in_place_;
  std::vector<T> buffer_;
};

// Calls f(i, j, rows, cols) over tiles of rows [begin, end) and columns [j0, j1).
template <class F>
void for_tiles(int64_t begin, int64_t end, int64_t j0, int64_t j1, const F& f) {
  for (int64_t j = j0; j < j1; j += kBlockCols) {  // the coefficients of this many columns stay in L1
    const int64_t cols = std::min(kBlockCols, j1 - j), height = tile_height(cols);
    for (int64_t i = begin; i < end; i += height) f(i, j, std::min(height, end - i), cols);
  }
}

}  // namespace sslkern
