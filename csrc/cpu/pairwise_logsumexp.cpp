// Log-sum-exp over pairs of rows and its gradients, and the argmax of similarities.
#include "pairwise_call.h"

namespace sslkern {
namespace {

// The base that exponents are taken relative to. A row without pairs has a sum of 0, and any finite base works.
template <class T>
T base_of(T x) {
  return x == -std::numeric_limits<T>::infinity() ? T(0) : x;
}

// Whether all exponentials can be taken relative to the largest possible exponent and stay normal numbers.
template <class T>
bool in_range(const std::pair<T, T>& bounds) {
  return bounds.second - bounds.first <= (sizeof(T) == 4 ? T(80) : T(690));
}

// Rows of exponents, with -inf for dropped pairs. Where possible, the scale is left to the exponential as `factor`.
template <class T>
struct Exponents {
  const PairSlice<T>& slice;
  const bool folded;
  const T factor, dropped;

  Exponents(const PairSlice<T>& slice, bool fold)
      : slice(slice),
        folded(fold && !slice.similarity.squared && slice.similarity.scale != 0),
        factor(folded ? slice.similarity.scale : T(1)),
        dropped(std::copysign(std::numeric_limits<T>::infinity(), -factor)) {}

  void operator()(T* t, const Block& b, int64_t r) const {
    if (!folded) slice.similarity(t, b, r);
    slice.mask.drop(t, b, r, dropped);
  }
};

// Sums of exponentials, each relative to the base of its row.
template <class T>
struct Sums {
  std::vector<double> sum;
  std::vector<T> most;

  explicit Sums(int64_t n) : sum(n), most(n, -std::numeric_limits<T>::infinity()) {}

  // Raises the base of row i to at least `at`, and returns it.
  T raise(int64_t i, T at) {
    if (at > most[i]) {
      if (most[i] != -std::numeric_limits<T>::infinity())
        sum[i] *= std::exp(static_cast<double>(most[i]) - static_cast<double>(at));
      most[i] = at;
    }
    return base_of(most[i]);
  }

  void write(T* to, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(base_of(most[i]) + std::log(sum[i]));
  }
};

template <class T>
void logsumexp(const Call& c, int64_t s, bool columns, T* over_rows, T* over_columns) {
  const PairSlice<T> slice(c, s, false);
  const auto bounds = slice.bounds();
  const bool fixed = in_range(bounds), both = c.self_pairs || columns;
  const T shift = bounds.second;
  const Exponents<T> exponents(slice, fixed);
  Sums<T> of_rows(c.n()), of_columns(columns ? c.m() : 0);
  Sums<T>& below = c.self_pairs ? of_rows : of_columns;
  slice.pairs.run([&](const Block& b, T* tile, T* spare) {
    const bool down = both && !b.diagonal;
    T *sums = spare, *most = spare + b.cols;
    std::fill_n(sums, b.cols, T(0));
    for (int64_t j = 0; j < b.cols && down && !fixed; ++j) most[j] = below.most[b.j0 + j];
    for (int64_t r = 0; r < b.rows; ++r) {
      T* t = tile + r * slice.pairs.ld();
      exponents(t, b, r);
      const int64_t i = b.i0 + r;
      if (fixed) {
        of_rows.sum[i] +=
            down ? exp_both(t, b.cols, exponents.factor, shift, sums) : exp_row(t, b.cols, exponents.factor, shift);
        continue;
      }
      const T base = of_rows.raise(i, largest(t, b.cols));
      of_rows.sum[i] += exp_row(t, b.cols, T(1), base);
      if (down) largest_columns(t, b.cols, most);
    }
    if (!down) return;
    for (int64_t j = 0; j < b.cols && !fixed; ++j) most[j] = below.raise(b.j0 + j, most[j]);
    for (int64_t r = 0; r < b.rows && !fixed; ++r) exp_columns(tile + r * slice.pairs.ld(), b.cols, most, sums);
    for (int64_t j = 0; j < b.cols; ++j) below.sum[b.j0 + j] += sums[j];
  });
  if (fixed) std::fill(of_rows.most.begin(), of_rows.most.end(), shift);
  if (fixed) std::fill(of_columns.most.begin(), of_columns.most.end(), shift);
  of_rows.write(over_rows, c.n());
  if (columns) of_columns.write(over_columns, c.m());
}

std::tuple<Tensor, Tensor> pairwise_logsumexp_fwd(const Tensor x, const std::optional<Tensor> y, const Tensor scale,
                                                  const Labels x_labels, const Labels y_labels, int64_t mask,
                                                  const std::string kernel, bool columns) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  const int64_t n = c.n(), m = c.m();
  Tensor over_rows = fresh(x, stacked(x, {n}), x.scalar_type());
  Tensor over_columns = fresh(x, columns ? stacked(x, {m}) : Shape{0}, x.scalar_type());
  c.for_each_slice([&]<class T>(int64_t s) {
    logsumexp<T>(c, s, columns, data<T>(over_rows) + s * n, data<T>(over_columns) + (columns ? s * m : 0));
  });
  return {over_rows, over_columns};
}

// The gradient and log-sum-exp of every row. For a fixed shift, `share` is the row's factor of exp(t - shift).
template <class T>
struct Shares {
  const T *grad, *over;
  std::vector<T> base, share;

  Shares(const T* grad, const T* over, int64_t n, T shift, bool fixed)
      : grad(grad), over(over), base(n), share(fixed ? n : 0) {
    for (int64_t i = 0; i < n; ++i) {
      base[i] = base_of(over[i]);
      if (fixed) share[i] = base[i] == over[i] || std::isnan(over[i]) ? grad[i] * std::exp(shift - over[i]) : T(0);
    }
  }
};

template <class T>
void logsumexp_gradients(const Call& c, int64_t s, bool columns, const T* grad_rows, const T* grad_columns,
                         const T* over_rows, const T* over_columns, bool need_x, bool need_y, T* grad_x, T* grad_y) {
  const PairSlice<T> slice(c, s, true);
  const auto bounds = slice.bounds();
  const bool both = c.self_pairs || columns, fixed = both && in_range(bounds);
  const T shift = bounds.second;
  const Exponents<T> exponents(slice, fixed);
  const Shares<T> of_rows(grad_rows, over_rows, c.n(), shift, fixed);
  const std::optional<Shares<T>> of_columns =
      columns && !c.self_pairs ? std::make_optional<Shares<T>>(grad_columns, over_columns, c.m(), shift, fixed)
                               : std::nullopt;
  const Shares<T>& other = of_columns.has_value() ? *of_columns : of_rows;
  Gradients<T> gradients(c.x, slice.x, slice.y, c.self_pairs, c.squared, need_x, need_y);
  slice.pairs.run([&](const Block& b, T* tile, T*) {
    for (int64_t r = 0; r < b.rows; ++r) {
      T* t = tile + r * slice.pairs.ld();
      exponents(t, b, r);
      const int64_t i = b.i0 + r, j = b.j0;
      if (fixed) {
        share_both(t, b.cols, exponents.factor, shift, of_rows.share[i], other.share.data() + j);
      } else if (both) {
        share_each(t, b.cols, of_rows.base[i], of_rows.grad[i], other.base.data() + j, other.grad + j);
      } else {
        share_row(t, b.cols, of_rows.base[i], of_rows.grad[i]);
      }
    }
    gradients.add(slice.pairs, tile, b);
  });
  gradients.write(grad_x, grad_y);
}

std::tuple<Tensor, Tensor> pairwise_logsumexp_bwd(const Tensor grad_rows, const Tensor grad_columns, const Tensor x,
                                                  const std::optional<Tensor> y, const Tensor scale,
                                                  const Labels x_labels, const Labels y_labels, const Tensor over_rows,
                                                  const Tensor over_columns, int64_t mask, const std::string kernel,
                                                  bool columns, bool need_x, bool need_y) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  const int64_t n = c.n(), m = c.m();
  const auto [grad_x, grad_y] = room_for_gradients(c, need_x, need_y);
  const Tensor g = dense(grad_rows), h = dense(grad_columns), rows = dense(over_rows), cols = dense(over_columns);
  c.for_each_slice([&]<class T>(int64_t s) {
    logsumexp_gradients<T>(c, s, columns, at<T>(g, s, n), at<T>(h, s, m), at<T>(rows, s, n), at<T>(cols, s, m), need_x,
                           need_y, at<T>(grad_x, s, n * c.d()), at<T>(grad_y, s, m * c.d()));
  });
  return {grad_x, grad_y};
}

// Index of each row's largest similarity. Blocks run from the left, so the first of equal values wins.
template <class T>
void argmax(const Call& c, int64_t s, int64_t* index) {
  const PairSlice<T> slice(c, s, false);
  const Pairs<T> pairs(slice.x, slice.y, false);
  const int64_t size = pairs.size(), n = c.n(), m = c.m();
  in_parallel(ceil_div(n, size), size * m * c.d(), [&](int64_t first, int64_t last) {
    const auto tile = room_for<T>(size * pairs.ld());
    for (int64_t k = first; k < last; ++k) {
      const int64_t i0 = k * size, rows = std::min(size, n - i0);
      std::vector<T> most(rows, -std::numeric_limits<T>::infinity());
      std::fill_n(index + i0, rows, int64_t(-1));
      for (int64_t j0 = 0; j0 < m; j0 += size) {
        const Block b{i0, rows, j0, std::min(size, m - j0), c.self_pairs && i0 == j0};
        pairs.products(slice.x, slice.y, b, tile.get());
        for (int64_t r = 0; r < rows; ++r) {
          T* t = tile.get() + r * pairs.ld();
          slice.similarity(t, b, r);
          slice.mask.drop(t, b, r, -std::numeric_limits<T>::infinity());
          for (int64_t j = 0; j < b.cols; ++j) {
            if (t[j] <= most[r] || std::isnan(most[r])) continue;
            most[r] = t[j];
            index[i0 + r] = j0 + j;
          }
        }
      }
    }
  });
}

Tensor pairwise_argmax(const Tensor x, const std::optional<Tensor> y, const Tensor scale, const Labels x_labels,
                       const Labels y_labels, int64_t mask, const std::string kernel) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  Tensor index = fresh(x, stacked(x, {c.n()}), ScalarType::Long);
  c.for_each_slice([&]<class T>(int64_t s) { argmax<T>(c, s, data<int64_t>(index) + s * c.n()); });
  return index;
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("pairwise_logsumexp_fwd", TORCH_BOX(&sslkern::pairwise_logsumexp_fwd));
  m.impl("pairwise_logsumexp_bwd", TORCH_BOX(&sslkern::pairwise_logsumexp_bwd));
  m.impl("pairwise_argmax", TORCH_BOX(&sslkern::pairwise_argmax));
}
