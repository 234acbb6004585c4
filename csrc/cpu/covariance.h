// Covariance of one slice: moments in the forward, the gradient in the backward. Shared by covariance and VICReg.
#pragma once

#include "column_blocks.h"
#include "gradient_tiles.h"
#include "gram_factor.h"
#include "row_pass.h"

namespace sslkern {

template <class T>
struct ColumnSlice {
  Matrix z;
  T* high;      // [D] column means
  T* low;       // [D] rounding error of `high`
  T* variance;  // [D]
  T* gram;      // [m, m]
  T* row_sq;    // [N] squared row norms; unbiased only
  bool unbiased, dual;
};

// Tensors that the forward saves for the backward. `views` is the leading shape for several views of the shape of z.
struct SavedMoments {
  Tensor centre, variance, gram, row_sq;
  int64_t n, d, m, stack;
  bool unbiased, dual;

  template <class T>
  ColumnSlice<T> at(const Matrix& z, int64_t index) const {
    return {z,
            data<T>(centre) + index * 2 * d,
            data<T>(centre) + index * 2 * d + d,
            data<T>(variance) + index * d,
            data<T>(gram) + index * m * m,
            data<T>(row_sq) + (unbiased ? index * n : 0),
            unbiased,
            dual};
  }
};

inline SavedMoments allocate_moments(const Tensor& z, bool unbiased, bool dual, const Shape& views) {
  const auto dtype = accumulation_dtype(z);
  const int64_t n = z.size(z.dim() - 2), d = z.size(z.dim() - 1), m = dual ? n : d;
  return {fresh(z, stacked(z, {2, d}, views), dtype),
          fresh(z, stacked(z, {d}, views), dtype),
          fresh(z, stacked(z, {m, m}, views), dtype),
          fresh(z, stacked(z, {unbiased ? n : 0}, views), dtype),
          n,
          d,
          m,
          stack_size(z),
          unbiased,
          dual};
}

inline SavedMoments restore_moments(const Tensor& z, const Tensor& centre, const Tensor& variance, const Tensor& gram,
                                    const Tensor& row_sq, bool unbiased, bool dual) {
  const int64_t n = z.size(z.dim() - 2), d = z.size(z.dim() - 1);
  return {centre, variance, gram, row_sq, n, d, dual ? n : d, stack_size(z), unbiased, dual};
}

// Gradient of the invariance term: coeff * (z - other).
struct Pull {
  Matrix other;
  double coeff;
};

// The factor c of the unbiased estimator: (N-1)/(N(N-2)(N-3)).
inline double unbiased_factor(int64_t n) {
  return (n - 1.) / (static_cast<double>(n) * (n - 2) * (n - 3));
}

// Turns the plug-in sum of squares into its U-statistic, with sum_i |z_i|^4 - sum_ij z_ij^4.
template <class T>
double unbiased_offdiag(const ColumnSlice<T>& s, double plugin, double fourth_powers) {
  const int64_t n = s.z.rows, d = s.z.cols;
  double trace = 0, square = 0, norms = 0;
  for (int64_t j = 0; j < d; ++j) {
    trace += s.variance[j];
    square += static_cast<double>(s.variance[j]) * s.variance[j];
  }
  for (int64_t i = 0; i < n; ++i) norms += static_cast<double>(s.row_sq[i]) * s.row_sq[i];
  return unbiased_factor(n) *
         ((n - 1.) * (n - 2.) * plugin + trace * trace - square - n / (n - 1.) * (norms - fourth_powers));
}

// Whether the products of a slice whose moments are known are of bf16.
template <class T>
bool by_pairs(const ColumnSlice<T>& s) {
  if constexpr (std::is_same_v<T, float>)
    return takes_pairs(s.z, s.dual ? s.z.rows : s.z.cols) &&
           nearly_centred(s.high, s.variance, s.z.cols, s.dual ? s.z.cols : s.z.rows);
  return false;
}

// The moments of a wide matrix and its Gram matrix, which is the whole or its lower triangle.
template <class T>
void dual_gram(const Tensor& like, const ColumnSlice<T>& s, std::optional<RowPowers<T>>& powers) {
  const int64_t n = s.z.rows, d = s.z.cols;
  const auto start = [&](const Cut& cut) {
    if (s.unbiased) powers.emplace(n, cut);
  };
  const auto centre = [&](const Span& span, const auto& block) {
    centre_block(s.z, span.begin, span.end, s.high, s.low, s.variance, block[0].data, powers ? &*powers : nullptr);
  };
  if constexpr (std::is_same_v<T, float>) {
    if (takes_pairs(s.z, n)) {
      const Cut cut = columns_for_pairs(d);
      start(cut);
      for_column_blocks<T>(like, n, cut, 1, Gemm::tiles,
                           [&](const Span& span, const auto& block, Products<T>&) { centre(span, block); });
      if (by_pairs(s)) return gram_of_rows(like, s.z, s.high, s.gram);
    }
  }
  const Gemm gemm = gemm_for<T>(n, d);
  const Cut cut = cut_columns(n, d, gemm);
  PartialGrams<T> grams(like, s.gram, n, cut.parts());
  start(cut);
  for_column_blocks<T>(like, n, cut, 1, gemm, [&](const Span& span, const auto& block, Products<T>& products) {
    centre(span, block);
    products.add(block[0], block[0], grams.at(span.part), span.first);
  });
  grams.add_up(true);
}

template <class T>
double dual_moments(const Tensor& like, const ColumnSlice<T>& s) {
  const int64_t n = s.z.rows, d = s.z.cols;
  std::optional<RowPowers<T>> powers;
  dual_gram(like, s, powers);
  if (powers) {  // also as the diagonal of the Gram: the estimator subtracts one from the other, and their rounding
                 // must agree
    powers->squares(s.row_sq);
    for (int64_t i = 0; i < n; ++i) s.gram[i * n + i] = s.row_sq[i];
  }
  const double total = finish_gram(s.gram, s.gram, n, T(1), false);
  double square = 0;
  for (int64_t j = 0; j < d; ++j) square += static_cast<double>(s.variance[j]) * s.variance[j];
  const double plugin = total / ((n - 1.) * (n - 1.)) - square;
  return s.unbiased ? unbiased_offdiag(s, plugin, powers->fourth_powers()) : plugin;
}

// The same for a tall matrix.
template <class T>
void primal_gram(const Tensor& like, const ColumnSlice<T>& s, RowPass<T>& pass) {
  const int64_t n = s.z.rows, d = s.z.cols;
  pass.means();
  if constexpr (std::is_same_v<T, float>) {
    if (takes_pairs(s.z, d)) {
      pass.squares(s.unbiased ? s.row_sq : nullptr);
      pass.variances(s.variance);
      if (by_pairs(s)) return gram_of_columns(like, s.z, s.z, s.high, s.high, true, s.gram);
    }
  }
  const Gemm gemm = gemm_for<T>(d, n);
  const Cut cut = cut_rows(n, d, gemm);
  PartialGrams<T> grams(like, s.gram, d, cut.parts());
  const bool transposed = gemm == Gemm::onednn;
  for_row_blocks<T>(like, d, cut, 1, gemm, transposed, [&](const Span& span, const auto& block, Products<T>& products) {
    pass.centre(span.begin, span.end, nullptr, block[0], s.unbiased ? s.row_sq : nullptr);
    products.add(block[0].t(), block[0].t(), grams.at(span.part), span.first);
  });
  grams.add_up(true);
  pass.variances(s.variance);
}

template <class T>
double primal_moments(const Tensor& like, const ColumnSlice<T>& s) {
  const int64_t n = s.z.rows, d = s.z.cols;
  RowPass<T> pass(like, s.z, s.high, s.low);
  primal_gram(like, s, pass);
  const double plugin = finish_gram(s.gram, s.gram, d, static_cast<T>(1. / (n - 1)), true);
  return s.unbiased ? unbiased_offdiag(s, plugin, pass.fourth_powers()) : plugin;
}

// Fills the saved tensors of a slice and returns the sum of squared off-diagonal covariances.
template <class T>
double second_moments(const Tensor& like, const ColumnSlice<T>& s) {
  return s.dual ? dual_moments(like, s) : primal_moments(like, s);
}

// Coefficients of the gradient: alpha * product + column_j z + cubic (z^3 - |z_i|^2 z + shift_j) + pull (z - other).
template <class T>
struct Epilogue {
  T alpha;
  std::vector<T> column, shift;
  T cubic = 0;

  Epilogue(const ColumnSlice<T>& s, const std::vector<double>& grad_variance, double g)
      : column(s.z.cols), shift(s.z.cols) {
    const double n = s.z.rows, c = s.unbiased ? unbiased_factor(s.z.rows) : 0;
    const double plugin = s.unbiased ? c * (n - 1) * (n - 2) * g : g;
    double trace = 0;
    for (int64_t j = 0; j < s.z.cols; ++j) trace += s.variance[j];
    for (int64_t j = 0; j < s.z.cols; ++j) {
      double k = 2 / (n - 1) * grad_variance[j];
      if (s.dual) k -= 4 / (n - 1) * plugin * s.variance[j];
      if (s.unbiased) k += 4 * c / (n - 1) * g * (trace - s.variance[j]);
      column[j] = static_cast<T>(k);
    }
    alpha = static_cast<T>(4 * plugin / (s.dual ? (n - 1) * (n - 1) : n - 1));
    cubic = static_cast<T>(4 * c * n / (n - 1) * g);
  }
};

// Writes rows [i0, i1) of columns [j0, j1) of the gradient, from the product and the centred values of that block.
template <class T>
void write_gradient(const ColumnSlice<T>& s, const Epilogue<T>& e, const Pull* pull, int64_t i0, int64_t i1, int64_t j0,
                    int64_t j1, const T* product, const T* block, const Matrix& grad) {
  const int64_t ld = j1 - j0;
  in_turns(i0, i1, ceil_div(8192, ld), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    TileWriter<T> writer(grad);
    for_tiles(begin, end, j0, j1, [&](int64_t i, int64_t j, int64_t rows, int64_t cols) {
      const int64_t at = (i - i0) * ld + (j - j0);
      GradientTile<T> tile_of{rows, cols, product + at, block + at, ld, e.alpha, e.column.data() + j};
      if (pull != nullptr) {
        tile_of.other = tile(pull->other, i, i + rows, j, j + cols, scratch, tile_of.other_ld);
        tile_of.coeff = static_cast<T>(pull->coeff);
        tile_of.high = s.high + j;
        tile_of.low = s.low + j;
      }
      if (s.unbiased) {
        tile_of.row_sq = s.row_sq + i;
        tile_of.cubic = e.cubic;
        tile_of.shift = e.shift.data() + j;
      }
      tile_of.out = writer.at(i, j, rows, cols, tile_of.out_ld);
      write_tile(tile_of);
      writer.flush(i, j, rows, cols);
    });
  });
}

// The gradient of one slice, given the gradients of its variances and of its offdiag.
template <class T>
void input_gradient(const Tensor& grams, int64_t index, const ColumnSlice<T>& s,
                    const std::vector<double>& grad_variance, double grad_offdiag, const Pull* pull,
                    const Matrix& grad) {
  const int64_t n = s.z.rows, d = s.z.cols;
  const GramFactor<T> gram(grams, index, false, Centred<T>{s.z, s.high, nullptr}, s.dual, by_pairs(s));
  Epilogue<T> e(s, grad_variance, grad_offdiag);
  if (s.dual) {
    for_column_blocks<T>(
        grams, n, gram.cut(), 1, gram.gemm(), [&](const Span& span, const auto& block, Products<T>& products) {
          T* z = block[0].data;
          recentre_block<T>(s.z, span.begin, span.end, s.high, s.low, nullptr, z);
          if (s.unbiased) cubic_means(z, n, span.end - span.begin, s.row_sq, e.shift.data() + span.begin);
          write_gradient(s, e, pull, 0, n, span.begin, span.end, gram(span, block[0], products), z, grad);
        });
  } else {
    RowPass<T> pass(grams, s.z, s.high, s.low);
    if (s.unbiased) pass.cubic_means(s.row_sq, e.shift.data());
    for_row_blocks<T>(
        grams, d, gram.cut(), 1, gram.gemm(), false, [&](const Span& span, const auto& block, Products<T>& products) {
          pass.centre(span.begin, span.end, nullptr, block[0], nullptr);
          write_gradient(s, e, pull, span.begin, span.end, 0, d, gram(span, block[0], products), block[0].data, grad);
        });
  }
}

}  // namespace sslkern
