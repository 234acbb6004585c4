// The products of covariances and cross-correlations of bf16 values, from the values themselves. With x = z + mean, the
// products of z follow from those of x by terms of rank one: Z Z' = X X' - a 1' - 1 a' + |mean|^2, where a = X mean,
// and Z'Z = X'X - N mean mean'. The products of x are exact in fp32, whereas z would have to be rounded or kept in
// fp32.
#pragma once

#include "bfloat_products.h"
#include "gradient_tiles.h"

namespace sslkern {

constexpr int64_t kPairNumbers = 1 << 22;  // numbers of the matrix that are packed at a time
constexpr int64_t kPairBlock = 64;         // columns of a gradient that one thread writes at a time
constexpr int64_t kPairRows = 1 << 17;     // numbers of a gradient that one thread writes at a time, by rows

// Whether the products run on pairs of bf16, for a Gram matrix (m, m).
inline bool takes_pairs(const Matrix& z, int64_t m) {
  return z.dtype == ScalarType::BFloat16 && m >= kPairSide && has_bfloat_products();
}

// The largest ratio of the squares of means to variances for which the terms of rank one leave enough digits. In a sum
// of N values, rounding grows as N mean^2, and the result as sqrt(N) variance.
inline double most_off_centre(int64_t length) {
  return std::min(64., static_cast<double>(1 << 18) / length);
}

// Whether they do, on the average of the columns, for products of this length. NaN is not near.
inline bool nearly_centred(const float* mean, const float* variance, int64_t d, int64_t length) {
  double square = 0, total = 0;
  for (int64_t j = 0; j < d; ++j) {
    square += static_cast<double>(mean[j]) * mean[j];
    total += variance[j];
  }
  return square <= most_off_centre(length) * total;
}

// The same where each column is divided by its own standard deviation.
inline bool nearly_standard(const float* mean, const float* inv_std, int64_t d, int64_t length) {
  const double most = std::sqrt(most_off_centre(length));
  for (int64_t j = 0; j < d; ++j)
    if (!(std::abs(mean[j]) * inv_std[j] <= most)) return false;
  return true;
}

// Blocks of columns, with all rows: each thread multiplies its own.
inline Cut columns_for_pairs(int64_t d) {
  return {d, round_up(ceil_div(d, 64), kPairBlock), kPairBlock};
}

// Blocks of rows, with all columns: an eighth of the rows at most, since each thread has blocks of its own. A part has
// whole kBlockRows, which share their sums.
inline Cut rows_for_pairs(int64_t n, int64_t d) {
  constexpr int64_t lines = BfloatPanels::kLines;
  const int64_t rows = std::clamp(std::min(kPairRows / d, n / 8) / lines * lines, lines, kBlockRows / 2);
  return {n, round_up(ceil_div(n, 64), kBlockRows), rows};
}

// Packs rows or columns of z, those between k0 and k1 of the other, in parallel.
inline void pack_lines(const Matrix& z, bool rows, int64_t k0, int64_t k1, BfloatPanels& pairs) {
  const int64_t lines = rows ? z.rows : z.cols, across = rows ? z.row_stride : z.col_stride;
  const int64_t along = rows ? z.col_stride : z.row_stride;
  pairs.shorten(k1 - k0);
  in_turns(0, ceil_div(lines, BfloatPanels::kLines), 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * BfloatPanels::kLines, end = std::min(lines, begin + BfloatPanels::kLines);
      const char* from = rows ? z.at(begin, k0) : z.at(k0, begin);
      pairs.pack(reinterpret_cast<const BFloatBits*>(from), across, along, begin, end, k1 - k0);
    }
  });
}

// gram (m, m) = x y' for rows x and y of a and b, or x'y for their columns. With `lower`, for a = b, only the lower
// triangle.
inline void gram_of_pairs(const Tensor& like, const Matrix& a, const Matrix& b, bool rows, bool lower, float* gram) {
  const int64_t m = rows ? a.rows : a.cols, depth = rows ? a.cols : a.rows, sides = ceil_div(m, kPairSide);
  const int64_t step = std::min(depth, round_up(ceil_div(kPairNumbers, m), 512));
  BfloatPanels left(like, m, step), other(like, lower ? 0 : m, step);
  const BfloatPanels& right = lower ? left : other;
  for (int64_t k0 = 0; k0 < depth; k0 += step) {
    const int64_t k1 = std::min(depth, k0 + step);
    pack_lines(a, rows, k0, k1, left);
    if (!lower) pack_lines(b, rows, k0, k1, other);
    in_turns(0, lower ? sides * (sides + 1) / 2 : sides * sides, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        int64_t i = lower ? 0 : part / sides, j = part - i * sides;
        for (; lower && j > i; ++i) j -= i + 1;
        const int64_t i0 = i * kPairSide, j0 = j * kPairSide;
        multiply(left, i0, std::min(m, i0 + kPairSide), right, j0, std::min(m, j0 + kPairSide), gram + i0 * m + j0, m,
                 lower && i == j, k0 > 0);
      }
    });
  }
}

// x_i mean, for every row of x.
inline std::vector<double> products_with_mean(const Matrix& z, const float* mean) {
  std::vector<double> out(z.rows);
  in_turns(0, z.rows, ceil_div(16384, z.cols), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for_tiles(begin, end, 0, z.cols, [&](int64_t i, int64_t j, int64_t rows, int64_t cols) {
      int64_t ld;
      const float* x = tile(z, i, i + rows, j, j + cols, scratch, ld);
      for (int64_t r = 0; r < rows; ++r) out[i + r] += dot_row(x + r * ld, mean + j, cols);
    });
  });
  return out;
}

// The lower triangle of Z Z', for z centred by its means.
inline void gram_of_rows(const Tensor& like, const Matrix& z, const float* mean, float* gram) {
  const int64_t n = z.rows;
  const std::vector<double> along = products_with_mean(z, mean);
  double square = 0;
  for (int64_t j = 0; j < z.cols; ++j) square += static_cast<double>(mean[j]) * mean[j];
  std::vector<float> shift(n);
  for (int64_t i = 0; i < n; ++i) shift[i] = static_cast<float>(along[i] - square / 2);
  gram_of_pairs(like, z, z, true, true, gram);
  in_turns(0, n, ceil_div(16384, n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j <= i; ++j) gram[i * n + j] -= shift[i] + shift[j];
  });
}

// The product of the columns of two centred views; with `lower`, for a = b, its lower triangle.
inline void gram_of_columns(const Tensor& like, const Matrix& a, const Matrix& b, const float* mean_a,
                            const float* mean_b, bool lower, float* gram) {
  const int64_t d = a.cols;
  gram_of_pairs(like, a, b, false, lower, gram);
  in_turns(0, d, ceil_div(16384, d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float scale = static_cast<float>(a.rows) * mean_a[i];
      for (int64_t j = 0; j < (lower ? i + 1 : d); ++j) gram[i * d + j] -= scale * mean_b[j];
    }
  });
}

// product = (product - sum mean) scale + diagonal z
SSLKERN_CLONES static void finish_row(float* product, float sum, const float* mean, const float* scale, float diagonal,
                                      const float* z, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) product[j] = (product[j] - sum * mean[j]) * scale[j] + diagonal * z[j];
}

// A square matrix whose off-diagonal part is rounded to bf16, for products with centred values. Its diagonal stays in
// fp32. The product with the means is subtracted as the rounded matrix has it, so that large means add no error.
class RoundedGram {
 public:
  // Takes the element (i, k) of a matrix (m, m), times scale[k] if there is a scale. `weights` are those of the sums
  // over a row: 1 where the means belong to the columns of the product, else the means.
  RoundedGram(const Tensor& like, const Strided<float>& gram, int64_t m, const float* scale, const float* weights)
      : like_(like), pairs_(like, m, m), diagonal_(m), sums_(m) {
    in_turns(0, ceil_div(m, BfloatPanels::kLines), 1, [&](int64_t first, int64_t last) {
      const auto lines = room_for<float>(BfloatPanels::kLines * m);
      const auto rounded = room_for<BFloatBits>(BfloatPanels::kLines * m);
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = part * BfloatPanels::kLines, end = std::min(m, begin + BfloatPanels::kLines);
        if (gram.col == 1) {
          std::copy_n(gram.data + begin * m, (end - begin) * m, lines.get());
        } else {
          for (int64_t k0 = 0; k0 < m; k0 += 8)  // more lines at a time would share a set of L1
            for (int64_t i = begin; i < end; ++i)
              for (int64_t k = k0; k < std::min(m, k0 + 8); ++k)
                lines[(i - begin) * m + k] = gram.data[i * gram.row + k * gram.col];
        }
        for (int64_t i = begin; i < end; ++i) {
          float* line = lines.get() + (i - begin) * m;
          BFloatBits* to = rounded.get() + (i - begin) * m;
          diagonal_[i] = line[i];
          line[i] = 0;
          if (scale != nullptr) scale_rows(line, m, 1, m, scale);
          convert(line, m, to);
          convert(to, m, line);
          sums_[i] = dot_row(line, weights, m);
        }
        pairs_.pack(rounded.get(), m, 1, begin, end, m);
      }
    });
  }

  // out (N, j1 - j0) = this (N, N) times columns of z, centred and scaled; `block` has these values in fp32.
  void times_columns(const Matrix& z, int64_t j0, int64_t j1, const float* mean, const float* scale, const float* block,
                     float* out) const {
    const int64_t cols = j1 - j0;
    const std::vector<float> ones(cols, 1.f);
    BfloatPanels columns(like_, cols, z.rows);
    columns.pack(reinterpret_cast<const BFloatBits*>(z.at(0, j0)), z.col_stride, z.row_stride, 0, cols, z.rows);
    multiply(pairs_, 0, z.rows, columns, 0, cols, out, cols, false, false);
    for (int64_t i = 0; i < z.rows; ++i)
      finish_row(out + i * cols, sums_[i], mean + j0, scale == nullptr ? ones.data() : scale + j0, diagonal_[i],
                 block + i * cols, cols);
  }

  // out (i1 - i0, D) = rows of z, centred, times the transpose of this (D, D), whose diagonal is zero.
  void times_rows(const Matrix& z, int64_t i0, int64_t i1, float* out) const {
    const int64_t rows = i1 - i0;
    BfloatPanels packed(like_, rows, z.cols);
    packed.pack(reinterpret_cast<const BFloatBits*>(z.at(i0, 0)), z.row_stride, z.col_stride, 0, rows, z.cols);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < z.cols; ++j) out[i * z.cols + j] = -sums_[j];
    multiply(packed, 0, rows, pairs_, 0, z.cols, out, z.cols, false, true);
  }

 private:
  const Tensor like_;
  BfloatPanels pairs_;
  std::vector<float> diagonal_, sums_;
};

}  // namespace sslkern
