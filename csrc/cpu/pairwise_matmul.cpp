// Products with a kernel matrix, and their gradients.
#include "pairwise_call.h"

namespace sslkern {
namespace {

enum class Kernel { similarity, rbf, softplus };

Kernel kernel_of(const std::string& name) {
  return name == "rbf" ? Kernel::rbf : name == "softplus" ? Kernel::softplus : Kernel::similarity;
}

template <class T>
void apply(Kernel kernel, T* t, int64_t n) {
  if (kernel == Kernel::rbf) rbf(t, n);
  if (kernel == Kernel::softplus) softplus(t, n);
}

// t = v times the derivative of the kernel at t.
template <class T>
void apply_slope(Kernel kernel, T* t, int64_t n, const T* v) {
  if (kernel == Kernel::rbf) return rbf_slope(t, n, v);
  if (kernel == Kernel::softplus) return softplus_slope(t, n, v);
  std::copy_n(v, n, t);
}

template <class T>
void matmul(const Call& c, int64_t s, const T* rhs, int64_t p, T* out) {
  const PairSlice<T> slice(c, s, false);
  const Kernel kernel = kernel_of(c.kernel);
  const bool ones = rhs == nullptr;
  const Rows<T> right(c.x, rhs, ones ? 0 : c.m(), p, false, !ones, false);
  RowSums<T> sums(c.x, slice.x.padded, ones ? 0 : p);
  slice.pairs.run([&](const Block& b, T* tile, T*) {
    for (int64_t r = 0; r < b.rows; ++r) {
      T* t = tile + r * slice.pairs.ld();
      slice.similarity(t, b, r);
      apply(kernel, t, b.cols);
      slice.mask.drop(t, b, r, T(0));
    }
    const bool down = c.self_pairs && !b.diagonal;
    if (ones) return slice.pairs.add_weights(tile, b, &sums.weights, down ? &sums.weights : nullptr);
    slice.pairs.add(tile, b, right, sums);
    if (down) slice.pairs.add_transposed(tile, b, right, sums);
  });
  for (int64_t i = 0; i < c.n(); ++i) {
    if (ones) {
      out[i] = static_cast<T>(sums.weights[i]);
    } else {
      std::copy_n(sums.sums + i * sums.ld, p, out + i * p);
    }
  }
}

Tensor pairwise_matmul_fwd(const Tensor x, const std::optional<Tensor> y, const Tensor scale,
                           const std::optional<Tensor> rhs, const Labels x_labels, const Labels y_labels, int64_t mask,
                           const std::string kernel) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  const int64_t p = rhs.has_value() ? rhs->size(-1) : 1;
  Tensor out = fresh(x, stacked(x, {c.n(), p}), x.scalar_type());
  const std::optional<Tensor> right = dense(rhs);
  c.for_each_slice([&]<class T>(int64_t s) {
    matmul<T>(c, s, right.has_value() ? data<T>(*right) + s * c.m() * p : nullptr, p, data<T>(out) + s * c.n() * p);
  });
  return out;
}

// Two matrices of p columns side by side; a null matrix counts as ones.
template <class T>
std::unique_ptr<T[]> beside(const T* a, const T* b, int64_t n, int64_t p) {
  auto out = room_for<T>(2 * n * p);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < p; ++k) {
      out[2 * i * p + k] = a == nullptr ? T(1) : a[i * p + k];
      out[2 * i * p + p + k] = b == nullptr ? T(1) : b[i * p + k];
    }
  return out;
}

// The weight of a pair is <grad_i, rhs_j>. For a matrix with itself, it is the sum for both orders.
template <class T>
void matmul_gradients(const Call& c, int64_t s, const T* grad, const T* rhs, int64_t p, bool need_x, bool need_y,
                      T* grad_x, T* grad_y, T* grad_rhs) {
  const bool weights = need_x || need_y, self_pairs = c.self_pairs;
  const PairSlice<T> slice(c, s, weights);
  const Kernel kernel = kernel_of(c.kernel);
  const int64_t n = c.n(), m = c.m(), width = self_pairs ? 2 * p : p;
  const std::vector<T> ones(rhs == nullptr && !self_pairs ? m : 0, T(1));
  const auto left_memory = self_pairs ? beside(grad, rhs, n, p) : nullptr,
             right_memory = self_pairs ? beside(rhs, grad, n, p) : nullptr;
  const Rows<T> left(c.x, self_pairs ? left_memory.get() : grad, n, width, weights, false, false);
  const Rows<T> right(c.x,
                      self_pairs       ? right_memory.get()
                      : rhs == nullptr ? ones.data()
                                       : rhs,
                      m, width, weights, false, false);
  const Rows<T> upstream(c.x, grad, n, p, false, grad_rhs != nullptr, false);
  Gradients<T> gradients(c.x, slice.x, slice.y, self_pairs, c.squared, need_x, need_y);
  RowSums<T> of_rhs(c.x, grad_rhs == nullptr ? 0 : slice.y.padded, p);
  slice.pairs.run([&](const Block& b, T* tile, T* spare) {
    const auto each_row = [&](const auto& f) {
      for (int64_t r = 0; r < b.rows; ++r) f(tile + r * slice.pairs.ld(), spare + r * slice.pairs.ld(), r);
    };
    each_row([&](T* t, T* k, int64_t r) {
      slice.similarity(t, b, r);
      if (grad_rhs == nullptr) return;
      std::copy_n(t, b.cols, k);
      apply(kernel, k, b.cols);
      slice.mask.drop(k, b, r, T(0));
    });
    if (grad_rhs != nullptr) {
      slice.pairs.add_transposed(spare, b, upstream, of_rhs);
      if (self_pairs && !b.diagonal) slice.pairs.add(spare, b, upstream, of_rhs);
    }
    if (!weights) return;
    slice.pairs.products(left, right, b, spare);
    each_row([&](T* t, T* v, int64_t r) {
      apply_slope(kernel, t, b.cols, v);
      slice.mask.drop(t, b, r, T(0));
    });
    gradients.add(slice.pairs, tile, b);
  });
  gradients.write(grad_x, grad_y);
  for (int64_t j = 0; j < m && grad_rhs != nullptr; ++j) std::copy_n(of_rhs.sums + j * of_rhs.ld, p, grad_rhs + j * p);
}

std::tuple<Tensor, Tensor, Tensor> pairwise_matmul_bwd(const Tensor grad, const Tensor x, const std::optional<Tensor> y,
                                                       const Tensor scale, const std::optional<Tensor> rhs,
                                                       const Labels x_labels, const Labels y_labels, int64_t mask,
                                                       const std::string kernel, bool need_x, bool need_y,
                                                       bool need_rhs) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  const auto [grad_x, grad_y] = room_for_gradients(c, need_x, need_y);
  const int64_t n = c.n(), m = c.m(), d = c.d(), p = grad.size(-1);
  const std::optional<Tensor> right = dense(rhs);
  const bool given = right.has_value();
  const Tensor grad_rhs = fresh(x, given && need_rhs ? stacked(x, {m, p}) : Shape{0}, x.scalar_type());
  const Tensor g = dense(grad);
  c.for_each_slice([&]<class T>(int64_t s) {
    matmul_gradients<T>(c, s, at<T>(g, s, n * p), given ? at<T>(*right, s, m * p) : nullptr, p, need_x,
                        need_y && !c.self_pairs, at<T>(grad_x, s, n * d), at<T>(grad_y, s, m * d),
                        at<T>(grad_rhs, s, m * p));
  });
  return {grad_x, grad_y, grad_rhs};
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("pairwise_matmul_fwd", TORCH_BOX(&sslkern::pairwise_matmul_fwd));
  m.impl("pairwise_matmul_bwd", TORCH_BOX(&sslkern::pairwise_matmul_bwd));
}
