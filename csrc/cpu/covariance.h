// One slice of covariance: its moments forward, its gradient backward.
#pragma once

#include "blocks.h"
#include "columns.h"
#include "gemm.h"

namespace sslkern {

template <class T>
struct Slice {
  Matrix z;
  T* high;      // [D] column means, and
  T* low;       // [D] what `high` cannot hold of them
  T* variance;  // [D]
  T* gram;      // [m, m]
  T* row_sq;    // [N] squared row norms, where unbiased
  bool unbiased, dual;
};

// The invariance term's share of a gradient: coeff * (z - other).
struct Pull {
  Matrix other;
  double coeff;
};

// c of the unbiased estimator: (N-1)/(N(N-2)(N-3))
inline double unbiased_factor(int64_t n) {
  return (n - 1.) / (static_cast<double>(n) * (n - 2) * (n - 3));
}

// sum_i |z_i|^4 - sum_ij z_ij^4 turns the plug-in sum of squares into its U-statistic.
template <class T>
double unbiased_offdiag(const Slice<T>& s, double plugin, double fourth_powers) {
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

template <class T>
double dual_moments(const Tensor& like, const Slice<T>& s) {
  const int64_t n = s.z.rows, d = s.z.cols;
  const bool onednn = takes_onednn<T>();
  double fourth = 0;
  for_column_blocks<T>(like, n, d, 1, [&](std::vector<Tensor>& block, int64_t j0, int64_t j1) {
    const double quartic = centre_block(s.z, j0, j1, s.high, s.low, s.variance, data<T>(block[0]), s.unbiased);
    fourth += quartic;
    add_gram(block[0], s.gram, j0 == 0, onednn);
  });
  const double total = finish_gram(s.gram, s.gram, n, T(1), false);
  double square = 0;
  for (int64_t j = 0; j < d; ++j) square += static_cast<double>(s.variance[j]) * s.variance[j];
  const double plugin = total / ((n - 1.) * (n - 1.)) - square;
  if (!s.unbiased) return plugin;
  for (int64_t i = 0; i < n; ++i) s.row_sq[i] = s.gram[i * n + i];
  return unbiased_offdiag(s, plugin, fourth);
}

template <class T>
double primal_moments(const Tensor& like, const Slice<T>& s) {
  const int64_t n = s.z.rows, d = s.z.cols;
  const bool onednn = takes_onednn<T>() && d > kThin;
  RowPass<T> pass(like, s.z, s.high, s.low);
  pass.means();
  for_row_blocks<T>(like, n, d, 1, onednn, [&](std::vector<Tensor>& block, int64_t i0, int64_t i1) {
    pass.centre(i0, i1, nullptr, data<T>(block[0]), onednn, s.unbiased ? s.row_sq : nullptr);
    add_gram(onednn ? block[0] : transposed(block[0]), s.gram, i0 == 0, onednn);
  });
  pass.variances(s.variance);
  const double plugin = finish_gram(s.gram, s.gram, d, static_cast<T>(1. / (n - 1)), true);
  return s.unbiased ? unbiased_offdiag(s, plugin, pass.fourth_powers()) : plugin;
}

// Fills the slice's workspaces and returns the sum of squared off-diagonal covariances.
template <class T>
double second_moments(const Tensor& like, const Slice<T>& s) {
  return s.dual ? dual_moments(like, s) : primal_moments(like, s);
}

// Coefficients of the gradient: alpha * product + column_j z + cubic (z^3 - |z_i|^2 z + shift_j) + pull (z - other).
template <class T>
struct Epilogue {
  T alpha;
  std::vector<T> column, shift;
  T cubic = 0;

  Epilogue(const Slice<T>& s, const std::vector<double>& grad_variance, double g) : column(s.z.cols), shift(s.z.cols) {
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

// Rows [i0, i1) of columns [j0, j1) of the gradient, from the product and the centred values of the same block.
template <class T>
void write_gradient(const Slice<T>& s, const Epilogue<T>& e, const Pull* pull, int64_t i0, int64_t i1, int64_t j0,
                    int64_t j1, const T* product, const T* block, const Matrix& grad) {
  const int64_t ld = j1 - j0;
  stable::parallel_for(i0, i1, ceil_div(8192, ld), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    for (int64_t k0 = j0; k0 < j1; k0 += kBlockCols) {  // few enough columns for their coefficients to stay in L1
      const int64_t cols = std::min(kBlockCols, j1 - k0);
      RowWriter<T> writer(grad, cols);
      for (int64_t i = begin; i < end; ++i) {
        const T *p = product + (i - i0) * ld + (k0 - j0), *z = block + (i - i0) * ld + (k0 - j0);
        T* out = writer.row(i, k0);
        if (pull == nullptr) {
          gradient_row(p, z, e.column.data() + k0, e.alpha, out, cols);
        } else {
          int64_t unused;
          const T* other = tile(pull->other, i, i + 1, k0, k0 + cols, scratch, unused);
          pulled_row(p, z, e.column.data() + k0, e.alpha, s.high + k0, s.low + k0, other, static_cast<T>(pull->coeff),
                     out, cols);
        }
        if (s.unbiased) cubic_row(z, e.shift.data() + k0, s.row_sq[i], e.cubic, out, cols);
        writer.flush(i, k0);
      }
    }
  });
}

// The gradient of one slice, given those of its variances and of its offdiag.
template <class T>
void input_gradient(const Tensor& grams, int64_t index, const Slice<T>& s, const std::vector<double>& grad_variance,
                    double grad_offdiag, const Pull* pull, const Matrix& grad) {
  const int64_t n = s.z.rows, d = s.z.cols, m = s.dual ? n : d;
  const bool onednn = takes_onednn<T>();
  const Tensor gram = stable::select(stable::view(const_cast<Tensor&>(grams), {-1, m, m}), 0, index);
  Epilogue<T> e(s, grad_variance, grad_offdiag);
  if (s.dual) {
    for_column_blocks<T>(grams, n, d, 1, [&](std::vector<Tensor>& block, int64_t j0, int64_t j1) {
      T* z = data<T>(block[0]);
      recentre_block<T>(s.z, j0, j1, s.high, s.low, nullptr, z);
      if (s.unbiased) cubic_means(z, n, j1 - j0, s.row_sq, e.shift.data() + j0);
      const Tensor product = matmul_nt(gram, transposed(block[0]), onednn);
      write_gradient(s, e, pull, 0, n, j0, j1, data<T>(product), z, grad);
    });
  } else {
    RowPass<T> pass(grams, s.z, s.high, s.low);
    if (s.unbiased) pass.cubic_means(s.row_sq, e.shift.data());
    for_row_blocks<T>(grams, n, d, 1, false, [&](std::vector<Tensor>& block, int64_t i0, int64_t i1) {
      pass.centre(i0, i1, nullptr, data<T>(block[0]), false, nullptr);
      const Tensor product = matmul_nt(block[0], gram, onednn);
      write_gradient(s, e, pull, i0, i1, 0, d, data<T>(product), data<T>(block[0]), grad);
    });
  }
}

}  // namespace sslkern
