// Cross-correlation on the CPU. Blocks of both views are standardised in cache and multiplied there, by our tiles or
// the vendor library. The standardised matrices are never formed as a whole.
#include "cross_correlation.h"

#include "column_blocks.h"
#include "gram_factor.h"
#include "row_pass.h"

namespace sslkern {
namespace {

// Turns unbiased variances into 1 / sqrt(biased + eps), in place.
template <class T>
void invert_std(T* variance, int64_t begin, int64_t end, int64_t n, double eps) {
  for (int64_t j = begin; j < end; ++j)
    variance[j] = static_cast<T>(1. / std::sqrt(variance[j] * ((n - 1.) / n) + eps));
}

// Standardises columns [j0, j1) of both views into their blocks, and computes the diagonal of their correlation.
template <class T>
void standardise_blocks(const Pair<T>& p, int64_t j0, int64_t j1, double eps, T* const* block) {
  const int64_t ld = j1 - j0;
  for_column_parts(j0, j1, p.n, [&](int64_t, int64_t k0, int64_t k1) {
    const int64_t cols = k1 - k0, offset = k0 - j0;
    for (int k = 0; k < 2; ++k) {
      centre_columns(p.z[k], k0, k1, p.high[k] + k0, p.low[k] + k0, p.inv_std[k] + k0, block[k] + offset, ld);
      invert_std(p.inv_std[k], k0, k1, p.n, eps);
      scale_rows(block[k] + offset, ld, p.n, cols, p.inv_std[k] + k0);
    }
    column_means_of_product(block[0] + offset, block[1] + offset, ld, p.n, cols, p.diagonal + k0);
  });
}

template <class T>
double dual_forward(const Tensor& like, const Pair<T>& p, double eps) {
  const Gemm gemm = gemm_for<T>(p.n, p.d);
  const Cut cut = cut_columns(p.n, p.d, gemm);
  PartialGrams<T> grams[2] = {{like, p.gram[0], p.n, cut.parts()}, {like, p.gram[1], p.n, cut.parts()}};
  for_column_blocks<T>(like, p.n, cut, 2, gemm, [&](const Span& span, const auto& block, Products<T>& products) {
    T* const views[2] = {block[0].data, block[1].data};
    standardise_blocks(p, span.begin, span.end, eps, views);
    for (int k = 0; k < 2; ++k) products.add(block[k], block[k], grams[k].at(span.part), span.first);
  });
  for (auto& view : grams) view.add_up(true);
  finish_gram(p.gram[0], p.gram[0], p.n, T(1), false);
  const double inner = finish_gram(p.gram[1], p.gram[0], p.n, T(1), false);
  double square = 0;
  for (int64_t j = 0; j < p.d; ++j) square += static_cast<double>(p.diagonal[j]) * p.diagonal[j];
  return inner / (static_cast<double>(p.n) * p.n) - square;
}

// Turns the product of centred columns into the correlation: scales it, moves its diagonal out, and returns the sum of
// the other squares.
template <class T>
double finish_correlation(const Pair<T>& p) {
  std::vector<double> partial(p.d);
  in_turns(0, p.d, ceil_div(16384, p.d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = p.gram[0] + i * p.d;
      const T scale = p.inv_std[0][i] / p.n;
      for (int64_t j = 0; j < p.d; ++j) row[j] *= scale * p.inv_std[1][j];
      p.diagonal[i] = row[i];
      row[i] *= 0;  // NaN stays NaN
      partial[i] = square_sum(row, p.d);
    }
  });
  return sum_of(partial);
}

template <class T>
double primal_forward(const Tensor& like, const Pair<T>& p, double eps) {
  RowPass<T> pass[2] = {{like, p.z[0], p.high[0], p.low[0]}, {like, p.z[1], p.high[1], p.low[1]}};
  const auto invert = [&] {
    for (int k = 0; k < 2; ++k) {
      pass[k].variances(p.inv_std[k]);
      invert_std(p.inv_std[k], 0, p.d, p.n, eps);
    }
  };
  for (auto& view : pass) view.means();
  if constexpr (std::is_same_v<T, float>) {
    if (takes_pairs(p.z[0], p.d) && takes_pairs(p.z[1], p.d)) {
      for (auto& view : pass) view.squares(nullptr);
      invert();
      if (by_pairs(p, p.d)) {
        gram_of_columns(like, p.z[0], p.z[1], p.high[0], p.high[1], false, p.gram[0]);
        return finish_correlation(p);
      }
    }
  }
  const Gemm gemm = gemm_for<T>(p.d, p.n);
  const Cut cut = cut_rows(p.n, p.d, gemm);
  PartialGrams<T> grams(like, p.gram[0], p.d, cut.parts());
  const bool transposed = gemm == Gemm::onednn;
  for_row_blocks<T>(like, p.d, cut, 2, gemm, transposed,
                    [&](const Span& span, const auto& block, Products<T>& products) {
                      for (int k = 0; k < 2; ++k) pass[k].centre(span.begin, span.end, nullptr, block[k], nullptr);
                      products.add(block[0].t(), block[1].t(), grams.at(span.part), span.first);
                    });
  grams.add_up(false);
  invert();
  return finish_correlation(p);
}

// The gradient of a standardised view is alpha * product + column_j * (the other view). `needed` selects the views.
template <class T>
struct Gradient {
  T alpha;
  std::vector<T> column;
  const bool* needed;
  Matrix out[2];
};

// The factor of each view's gradient, if it is needed.
template <class T>
using Factor = std::optional<GramFactor<T>>;

template <class T>
void dual_backward(const Tensor& like, const Factor<T>* gram, const Pair<T>& p, const Gradient<T>& g) {
  const GramFactor<T>& any = *gram[g.needed[0] ? 0 : 1];
  for_column_blocks<T>(
      like, p.n, any.cut(), 2, any.gemm(), [&](const Span& span, const auto& block, Products<T>& products) {
        const int64_t j0 = span.begin, j1 = span.end, ld = j1 - j0;
        for (int k = 0; k < 2; ++k) recentre_block<T>(p.z[k], j0, j1, p.high[k], p.low[k], p.inv_std[k], block[k].data);
        for (int k = 0; k < 2; ++k) {
          if (!g.needed[k]) continue;
          const T *product = (*gram[k])(span, block[k], products), *z = block[k].data, *other = block[1 - k].data;
          for_column_parts(j0, j1, p.n, [&](int64_t, int64_t k0, int64_t k1) {
            const int64_t cols = k1 - k0, offset = k0 - j0;
            T along[kBlockCols];
            column_means_of_product(product + offset, z + offset, ld, p.n, cols, along);
            for (int64_t j = 0; j < cols; ++j) along[j] = g.alpha * along[j] + g.column[k0 + j] * p.diagonal[k0 + j];
            TileWriter<T> writer(g.out[k]);
            for_tiles(0, p.n, k0, k1, [&](int64_t i, int64_t j, int64_t rows, int64_t) {
              const int64_t at = i * ld + offset;
              int64_t out_ld;
              T* out = writer.at(i, j, rows, cols, out_ld);
              standard_rows(product + at, z + at, other + at, ld, rows, cols, g.alpha, g.column.data() + j, along,
                            p.inv_std[k] + j, out, out_ld);
              writer.flush(i, j, rows, cols);
            });
          });
        }
      });
}

// mean_i of x_hat_ij times the gradient: alpha * sum_k C_jk^2 + column_j * C_jj. The sum runs over rows of C for a, and
// over columns for b.
template <class T>
std::vector<T> along_view(const Pair<T>& p, const Gradient<T>& g, int view) {
  std::vector<double> square(p.d);
  if (view == 0) {
    for_row_parts(0, p.d, p.d, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) square[i] = square_sum(p.gram[0] + i * p.d, p.d);
    });
  } else {
    for_column_parts(0, p.d, p.d, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = 0; i < p.d; ++i)
        for (int64_t j = begin; j < end; ++j) {
          const double c = p.gram[0][i * p.d + j];
          square[j] += c * c;
        }
    });
  }
  std::vector<T> along(p.d);
  for (int64_t j = 0; j < p.d; ++j) along[j] = static_cast<T>(g.alpha * square[j] + g.column[j] * p.diagonal[j]);
  return along;
}

template <class T>
void primal_backward(const Tensor& like, const Factor<T>* gram, const Pair<T>& p, const Gradient<T>& g) {
  const GramFactor<T>& any = *gram[g.needed[0] ? 0 : 1];
  RowPass<T> pass[2] = {{like, p.z[0], p.high[0], p.low[0]}, {like, p.z[1], p.high[1], p.low[1]}};
  std::vector<T> along[2];
  for (int k = 0; k < 2; ++k)
    if (g.needed[k]) along[k] = along_view(p, g, k);
  for_row_blocks<T>(like, p.d, any.cut(), 2, any.gemm(), false,
                    [&](const Span& span, const auto& block, Products<T>& products) {
                      const int64_t i0 = span.begin, i1 = span.end;
                      for (int k = 0; k < 2; ++k) pass[k].centre(i0, i1, p.inv_std[k], block[k], nullptr);
                      for (int k = 0; k < 2; ++k) {
                        if (!g.needed[k]) continue;
                        const T* product = (*gram[k])(span, block[1 - k], products);
                        const T *z = block[k].data, *other = block[1 - k].data;
                        in_turns(i0, i1, ceil_div(8192, p.d), [&](int64_t begin, int64_t end) {
                          TileWriter<T> writer(g.out[k]);
                          for_tiles(begin, end, 0, p.d, [&](int64_t i, int64_t j, int64_t rows, int64_t cols) {
                            const int64_t at = (i - i0) * p.d + j;
                            int64_t out_ld;
                            T* out = writer.at(i, j, rows, cols, out_ld);
                            standard_rows(product + at, z + at, other + at, p.d, rows, cols, g.alpha,
                                          g.column.data() + j, along[k].data() + j, p.inv_std[k] + j, out, out_ld);
                            writer.flush(i, j, rows, cols);
                          });
                        });
                      }
                    });
}

template <class T>
void forward(const Views& v, double eps, Tensor& offdiag) {
  for_slices(v.stack, v.n * v.d, [&](int64_t s) {
    const Pair<T> p(v, s);
    data<T>(offdiag)[s] = static_cast<T>(v.dual ? dual_forward(v.gram, p, eps) : primal_forward(v.gram, p, eps));
  });
}

template <class T>
void backward(const Views& v, const Tensor& grad_diagonal, const Tensor& grad_offdiag, const bool* needed,
              const Tensor* grads) {
  for_slices(v.stack, v.n * v.d, [&](int64_t s) {
    const Pair<T> p(v, s);
    const double n = v.n, g = data<T>(grad_offdiag)[s];
    Gradient<T> gradient{static_cast<T>(2 * g / (v.dual ? n * n : n)), std::vector<T>(v.d), needed, {}};
    for (int64_t j = 0; j < v.d; ++j)
      gradient.column[j] =
          static_cast<T>(data<T>(grad_diagonal)[s * v.d + j] / n - (v.dual ? 2 * g / n * p.diagonal[j] : 0.));
    for (int k = 0; k < 2; ++k)
      if (needed[k]) gradient.out[k] = slice(grads[k], s);
    Factor<T> gram[2];
    const bool pairs = by_pairs(p, v.dual ? v.n : v.d);
    for (int k = 0; k < 2; ++k) {
      if (!needed[k]) continue;
      const int view = v.dual ? k : 1 - k;  // whose values are multiplied
      gram[k].emplace(v.gram, v.dual ? (1 - k) * v.stack + s : s, !v.dual && k == 1,
                      Centred<T>{p.z[view], p.high[view], p.inv_std[view]}, v.dual, pairs);
    }
    if (!needed[0] && !needed[1]) return;
    v.dual ? dual_backward(v.gram, gram, p, gradient) : primal_backward(v.gram, gram, p, gradient);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_correlation_fwd(const Tensor a, const Tensor b, double eps,
                                                                         bool dual) {
  const auto dtype = accumulation_dtype(a);
  const int64_t n = a.size(a.dim() - 2), d = a.size(a.dim() - 1);
  const Shape gram = dual ? stacked(a, {n, n}, {2}) : stacked(a, {d, d}, {1});
  const Views v{{a, b},
                fresh(a, stacked(a, {2, d}, {2}), dtype),
                fresh(a, stacked(a, {d}, {2}), dtype),
                fresh(a, stacked(a, {d}), dtype),
                fresh(a, gram, dtype),
                n,
                d,
                stack_size(a),
                dual};
  Tensor offdiag = fresh(a, stacked(a, {}), dtype);
  is_double(a) ? forward<double>(v, eps, offdiag) : forward<float>(v, eps, offdiag);
  return {v.diagonal, offdiag, v.centre, v.inv_std, v.gram};
}

std::tuple<Tensor, Tensor> cross_correlation_bwd(const Tensor grad_diagonal, const Tensor grad_offdiag, const Tensor a,
                                                 const Tensor b, const Tensor centre, const Tensor inv_std,
                                                 const Tensor diagonal, const Tensor gram, bool dual, bool need_a,
                                                 bool need_b) {
  const int64_t n = a.size(a.dim() - 2), d = a.size(a.dim() - 1);
  const Views v{{a, b}, centre, inv_std, diagonal, gram, n, d, stack_size(a), dual};
  const bool needed[2] = {need_a, need_b};
  const Shape full = stacked(a, {n, d});
  const Tensor grads[2] = {fresh(a, need_a ? full : Shape{0}, a.scalar_type()),
                           fresh(b, need_b ? full : Shape{0}, b.scalar_type())};
  const Tensor gd = stable::contiguous(grad_diagonal), go = stable::contiguous(grad_offdiag);
  is_double(a) ? backward<double>(v, gd, go, needed, grads) : backward<float>(v, gd, go, needed, grads);
  return {grads[0], grads[1]};
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("cross_correlation_fwd", TORCH_BOX(&sslkern::cross_correlation_fwd));
  m.impl("cross_correlation_bwd", TORCH_BOX(&sslkern::cross_correlation_bwd));
}
