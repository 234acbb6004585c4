// Passes over a tall matrix, in parallel over its rows.
#pragma once

#include "blocks.h"

namespace sslkern {

// Column totals of partial sums (parts, D), added in the order of the parts.
template <class T>
void add_parts(const T* parts, int64_t count, int64_t d, std::vector<double>& total) {
  total.assign(d, 0.);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t j = 0; j < d; ++j) total[j] += parts[p * d + j];
}

// The passes over a tall matrix; `sums_` has one row of partial sums per part.
template <class T>
class RowPass {
 public:
  RowPass(const Tensor& like, const Matrix& z, T* high, T* low)
      : z_(z), high_(high), low_(low), sums_(fresh(like, {parts(), z.cols}, dtype_of<T>())), fourth_(parts()) {}

  void means() {
    std::vector<T> scratch, pivot(z_.cols);
    int64_t ld;
    std::copy_n(tile(z_, 0, 1, 0, z_.cols, scratch, ld), z_.cols, pivot.begin());
    each_tile(0, z_.rows, [&](const T* x, int64_t ld, int64_t, int64_t rows, int64_t j0, int64_t cols, T* sum) {
      add_sums(x, ld, rows, cols, pivot.data() + j0, sum);
    });
    add_parts(data<T>(sums_), parts(), z_.cols, total_);
    split_mean(pivot.data(), total_.data(), z_.cols, z_.rows, high_, low_);
  }

  // Writes rows [i0, i1), centred, and scaled if a scale is given, to a block (i1 - i0, D). Also sums the squares of
  // the centred values and, if row_sq is given, the squares of each row and the fourth powers.
  void centre(int64_t i0, int64_t i1, const T* scale, const Operand<T>& block, T* row_sq) {
    const int64_t d = z_.cols, height = i1 - i0;
    const bool transpose = block.transposed;
    each_tile(i0, i1, [&](const T* x, int64_t ld, int64_t i, int64_t rows, int64_t j0, int64_t cols, T* sum) {
      T small[kTileNumbers];
      T* out = transpose ? small : block.data + (i - i0) * d + j0;
      const int64_t out_ld = transpose ? cols : d;
      sslkern::centre(x, ld, rows, cols, high_ + j0, low_ + j0, out, out_ld, sum);
      if (row_sq != nullptr) add_powers(out, out_ld, rows, cols, i, j0, row_sq);
      if (scale != nullptr) scale_rows(out, out_ld, rows, cols, scale + j0);
      if (!transpose) return;
      for (int64_t j = 0; j < cols; ++j)
        for (int64_t r = 0; r < rows; ++r) block.data[(j0 + j) * height + (i - i0) + r] = small[r * cols + j];
    });
  }

  // The sums of `centre` for all rows, whose centred values are not kept.
  void squares(T* row_sq) {
    each_tile(0, z_.rows, [&](const T* x, int64_t ld, int64_t i, int64_t rows, int64_t j0, int64_t cols, T* sum) {
      T small[kTileNumbers];
      sslkern::centre(x, ld, rows, cols, high_ + j0, low_ + j0, small, cols, sum);
      if (row_sq != nullptr) add_powers(small, cols, rows, cols, i, j0, row_sq);
    });
  }

  void cubic_means(const T* row_sq, T* mean) {
    each_tile(0, z_.rows, [&](const T* x, int64_t ld, int64_t i, int64_t rows, int64_t j0, int64_t cols, T* sum) {
      T small[kTileNumbers], ignored[kTileCols] = {};
      sslkern::centre(x, ld, rows, cols, high_ + j0, low_ + j0, small, cols, ignored);
      cubic_rows(small, cols, rows, cols, row_sq + i, sum);
    });
    add_parts(data<T>(sums_), parts(), z_.cols, total_);
    for (int64_t j = 0; j < z_.cols; ++j) mean[j] = static_cast<T>(total_[j] / z_.rows);
  }

  void variances(T* variance) {
    add_parts(data<T>(sums_), parts(), z_.cols, total_);
    for (int64_t j = 0; j < z_.cols; ++j) variance[j] = static_cast<T>(total_[j] / (z_.rows - 1));
  }

  double fourth_powers() const {
    return sum_of(fourth_);
  }

 private:
  int64_t parts() const {
    return ceil_div(z_.rows, kBlockRows);
  }

  // Adds the powers of a tile to those of its rows, which its first columns start.
  void add_powers(const T* x, int64_t ld, int64_t rows, int64_t cols, int64_t i, int64_t j0, T* row_sq) {
    for (int64_t r = 0; r < rows; ++r) {
      const Powers<T> sums = powers(x + r * ld, cols);
      row_sq[i + r] = (j0 == 0 ? T(0) : row_sq[i + r]) + sums.second;
      fourth_[i / kBlockRows] += sums.fourth;
    }
  }

  // Calls f(x, ld, i, rows, j0, cols, sum) over tiles. `sum` belongs to the part and is zeroed at its first row.
  template <class F>
  void each_tile(int64_t begin, int64_t end, const F& f) {
    for_row_parts(begin, end, z_.cols, [&](int64_t part, int64_t i0, int64_t i1) {
      std::vector<T> scratch;
      T* sums = data<T>(sums_) + part * z_.cols;
      if (i0 == part * kBlockRows) {
        std::fill_n(sums, z_.cols, T(0));
        fourth_[part] = 0;
      }
      const int64_t height = tile_height(std::min(z_.cols, kTileCols));
      for (int64_t i = i0; i < i1; i += height) {
        const int64_t rows = std::min(height, i1 - i);
        for (int64_t j0 = 0; j0 < z_.cols; j0 += kTileCols) {
          const int64_t cols = std::min(kTileCols, z_.cols - j0);
          int64_t ld;
          const T* x = tile(z_, i, i + rows, j0, j0 + cols, scratch, ld);
          f(x, ld, i, rows, j0, cols, sums + j0);
        }
      }
    });
  }

  const Matrix z_;
  T* const high_;
  T* const low_;
  const Tensor sums_;
  std::vector<double> fourth_, total_;
};

}  // namespace sslkern
