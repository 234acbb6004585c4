// Log-sum-exp over pairs of rows and its gradients, and the argmax of similarities.
#include "pairwise_sums.h"

namespace sslkern {
namespace {

std::tuple<Tensor, Tensor> pairwise_logsumexp_fwd(const Tensor x, const std::optional<Tensor> y, const Tensor scale,
                                                  const Labels x_labels, const Labels y_labels, int64_t mask,
                                                  const std::string kernel, bool columns) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  const int64_t n = c.n(), m = c.m();
  Tensor over_rows = fresh(x, stacked(x, {n}), x.scalar_type());
  Tensor over_columns = fresh(x, columns ? stacked(x, {m}) : Shape{0}, x.scalar_type());
  c.for_each_slice([&]<class T>(int64_t s) {
    const PairSlice<T> slice(c, s, false);
    LogSumExp<T>(slice, columns, false).sums(data<T>(over_rows) + s * n, data<T>(over_columns) + (columns ? s * m : 0));
  });
  return {over_rows, over_columns};
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
    const PairSlice<T> slice(c, s, true);
    const Upstream<T> upstream{at<T>(g, s, n), at<T>(h, s, m), at<T>(rows, s, n), at<T>(cols, s, m)};
    LogSumExp<T>(slice, columns, false)
        .gradients(upstream, need_x, need_y, at<T>(grad_x, s, n * c.d()), at<T>(grad_y, s, m * c.d()));
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
          if (std::isnan(most[r])) continue;
          const T best = largest_or_nan(t, b.cols);
          if (best <= most[r]) continue;
          most[r] = best;
          const auto found = [best](T value) { return value == best || (std::isnan(value) && std::isnan(best)); };
          index[i0 + r] = j0 + (std::find_if(t, t + b.cols, found) - t);
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
