// Passes over blocks of columns (N, columns) of a wide matrix, in parallel over their columns.
#pragma once

#include "blocks.h"

namespace sslkern {

// Row sums of powers, where the columns arrive in pieces, in any order and from any thread. Each piece has its own
// partial sum per row, and the partial sums are added in column order. So the bits do not depend on the threads or on
// the library.
template <class T>
class RowPowers {
 public:
  RowPowers(int64_t n, const Cut& cut)
      : n_(n),
        width_(std::min(cut.block, kBlockCols)),
        pieces_(ceil_div(cut.total, width_)),
        square_(room_for<T>(n * pieces_)),
        fourth_(pieces_) {}

  // Adds columns [j0, j0 + cols) of the centred matrix, which are one piece.
  void add(int64_t j0, const T* x, int64_t ld, int64_t cols) {
    const int64_t piece = j0 / width_;
    double fourth = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const Powers<T> sums = powers(x + i * ld, cols);
      square_[piece * n_ + i] = sums.second;
      fourth += sums.fourth;
    }
    fourth_[piece] = fourth;
  }

  void squares(T* row_sq) const {
    for (int64_t i = 0; i < n_; ++i) {
      double total = 0;
      for (int64_t piece = 0; piece < pieces_; ++piece) total += square_[piece * n_ + i];
      row_sq[i] = static_cast<T>(total);
    }
  }

  double fourth_powers() const {
    return sum_of(fourth_);
  }

 private:
  const int64_t n_, width_, pieces_;
  const std::unique_ptr<T[]> square_;
  std::vector<double> fourth_;
};

// Computes means and variances of columns [j0, j1), and writes the centred values to `block` (N, j1 - j0). Adds the row
// powers if `powers` is given.
template <class T>
void centre_block(const Matrix& z, int64_t j0, int64_t j1, T* high, T* low, T* variance, T* block,
                  RowPowers<T>* powers) {
  const int64_t ld = j1 - j0;
  for_column_parts(j0, j1, z.rows, [&](int64_t, int64_t k0, int64_t k1) {
    T* out = block + (k0 - j0);
    centre_columns(z, k0, k1, high + k0, low + k0, variance + k0, out, ld);
    if (powers != nullptr) powers->add(k0, out, ld, k1 - k0);
  });
}

// Writes columns [j0, j1), centred, and scaled if a scale is given, to `block`.
template <class T>
void recentre_block(const Matrix& z, int64_t j0, int64_t j1, const T* high, const T* low, const T* scale, T* block) {
  const int64_t ld = j1 - j0;
  for_column_parts(j0, j1, z.rows, [&](int64_t, int64_t k0, int64_t k1) {
    std::vector<T> scratch;
    T ignored[kBlockCols] = {};
    for (int64_t i0 = 0; i0 < z.rows; i0 += kBlockRows) {
      const int64_t i1 = std::min(z.rows, i0 + kBlockRows);
      int64_t x_ld;
      const T* x = tile(z, i0, i1, k0, k1, scratch, x_ld);
      T* out = block + i0 * ld + (k0 - j0);
      centre(x, x_ld, i1 - i0, k1 - k0, high + k0, low + k0, out, ld, ignored);
      if (scale != nullptr) scale_rows(out, ld, i1 - i0, k1 - k0, scale + k0);
    }
  });
}

// Column means of the elementwise product of x and y, (rows, cols) with row stride ld.
template <class T>
void column_means_of_product(const T* x, const T* y, int64_t ld, int64_t rows, int64_t cols, T* mean) {
  double total[kBlockCols] = {};
  for (int64_t i0 = 0; i0 < rows; i0 += kBlockRows) {
    T part[kBlockCols] = {};
    dot_rows(x + i0 * ld, y + i0 * ld, ld, std::min(kBlockRows, rows - i0), cols, part);
    for (int64_t j = 0; j < cols; ++j) total[j] += part[j];
  }
  for (int64_t j = 0; j < cols; ++j) mean[j] = static_cast<T>(total[j] / rows);
}

// mean_i (|z_i|^2 z_ij - z_ij^3) of a centred (N, cols) block.
template <class T>
void cubic_means(const T* block, int64_t n, int64_t cols, const T* row_sq, T* mean) {
  for_column_parts(0, cols, n, [&](int64_t, int64_t k0, int64_t k1) {
    double total[kBlockCols] = {};
    for (int64_t i0 = 0; i0 < n; i0 += kBlockRows) {
      T part[kBlockCols] = {};
      cubic_rows(block + i0 * cols + k0, cols, std::min(kBlockRows, n - i0), k1 - k0, row_sq + i0, part);
      for (int64_t j = 0; j < k1 - k0; ++j) total[j] += part[j];
    }
    for (int64_t j = k0; j < k1; ++j) mean[j] = static_cast<T>(total[j - k0] / n);
  });
}

}  // namespace sslkern
