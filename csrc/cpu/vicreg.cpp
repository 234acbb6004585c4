// VICReg on the CPU: the covariance moments of both views, and the terms of the loss.
#include "covariance.h"

namespace sslkern {
namespace {

// sum_ij (a_ij - b_ij)^2, as partial sums over groups of rows.
template <class T>
double squared_distance(const Matrix& a, const Matrix& b) {
  const int64_t height = std::clamp<int64_t>(16384 / a.cols, 1, kBlockRows);
  std::vector<double> partial(ceil_div(a.rows, height));
  in_turns(0, ceil_div(a.rows, height), 1, [&](int64_t first, int64_t last) {
    std::vector<T> scratch_a, scratch_b;
    for (int64_t part = first; part < last; ++part) {
      const int64_t i0 = part * height, rows = std::min(height, a.rows - i0);
      int64_t ld, other_ld;
      const T* x = tile(a, i0, i0 + rows, 0, a.cols, scratch_a, ld);
      const T* y = tile(b, i0, i0 + rows, 0, a.cols, scratch_b, other_ld);
      const int64_t fold = rows_in_fold(rows, a.cols, ld == a.cols && other_ld == a.cols);
      for (int64_t r = 0; r < rows; r += fold)
        partial[part] += distance_row(x + r * ld, y + r * other_ld, std::min(fold, rows - r) * a.cols);
    }
  });
  return sum_of(partial);
}

struct Settings {
  double sim, std, cov, gamma, eps;
};

// max(0, gamma - sqrt(v + eps)); NaN stays NaN.
double hinge(double v, const Settings& k) {
  const double gap = k.gamma - std::sqrt(v + k.eps);
  return gap < 0 ? 0 : gap;
}

template <class T>
void vicreg_forward(const Tensor& a, const Tensor& b, const SavedMoments& saved, const Settings& k, Tensor& loss,
                    Tensor& terms) {
  for_slices(saved.stack, saved.n * saved.d, [&](int64_t s) {
    const Matrix views[2] = {slice(a, s), slice(b, s)};
    double variance = 0, offdiag = 0;
    for (int64_t v = 0; v < 2; ++v) {
      const ColumnSlice<T> view = saved.at<T>(views[v], v * saved.stack + s);
      offdiag += second_moments(a, view);
      for (int64_t j = 0; j < saved.d; ++j) variance += hinge(view.variance[j], k);
    }
    const double term[3] = {squared_distance<T>(views[0], views[1]) / (static_cast<double>(saved.n) * saved.d),
                            variance / (2. * saved.d), offdiag / saved.d};
    for (int t = 0; t < 3; ++t) data<T>(terms)[3 * s + t] = static_cast<T>(term[t]);
    data<T>(loss)[s] = static_cast<T>(k.sim * term[0] + k.std * term[1] + k.cov * term[2]);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vicreg_fwd(const Tensor a, const Tensor b, double sim,
                                                                      double std, double cov, double gamma, double eps,
                                                                      bool unbiased, bool dual) {
  SavedMoments saved = allocate_moments(a, unbiased, dual, {2});
  const Settings settings{sim, std, cov, gamma, eps};
  Tensor loss = fresh(a, stacked(a, {}), saved.variance.scalar_type());
  Tensor terms = fresh(a, stacked(a, {3}), saved.variance.scalar_type());
  is_double(a) ? vicreg_forward<double>(a, b, saved, settings, loss, terms)
               : vicreg_forward<float>(a, b, saved, settings, loss, terms);
  return {loss, terms, saved.centre, saved.variance, saved.gram, saved.row_sq};
}

template <class T>
void vicreg_backward(const Tensor& grad_loss, const Tensor* inputs, const SavedMoments& saved, const Settings& k,
                     const bool* needed, Tensor* grads) {
  for_slices(saved.stack, saved.n * saved.d, [&](int64_t s) {
    std::vector<double> column(saved.d);
    const double g = data<T>(grad_loss)[s];
    for (int64_t v = 0; v < 2; ++v) {
      if (!needed[v]) continue;
      const int64_t index = v * saved.stack + s;
      const ColumnSlice<T> view = saved.at<T>(slice(inputs[v], s), index);
      for (int64_t j = 0; j < saved.d; ++j) {
        const double std = std::sqrt(view.variance[j] + k.eps);
        column[j] = std < k.gamma ? -g * k.std / (4. * saved.d * std) : std * 0;  // NaN stays NaN
      }
      const Pull pull{slice(inputs[1 - v], s), g * 2 * k.sim / (static_cast<double>(saved.n) * saved.d)};
      input_gradient(saved.gram, index, view, column, g * k.cov / saved.d, &pull, slice(grads[v], s));
    }
  });
}

std::tuple<Tensor, Tensor> vicreg_bwd(const Tensor grad_loss, const Tensor a, const Tensor b, const Tensor centre,
                                      const Tensor variance, const Tensor gram, const Tensor row_sq, double sim,
                                      double std, double cov, double gamma, double eps, bool unbiased, bool dual,
                                      bool need_a, bool need_b) {
  const SavedMoments saved = restore_moments(a, centre, variance, gram, row_sq, unbiased, dual);
  const Settings settings{sim, std, cov, gamma, eps};
  const Tensor inputs[2] = {a, b}, g = stable::contiguous(grad_loss);
  const bool needed[2] = {need_a, need_b};
  const Shape full = stacked(a, {saved.n, saved.d});
  Tensor grads[2] = {fresh(a, need_a ? full : Shape{0}, a.scalar_type()),
                     fresh(b, need_b ? full : Shape{0}, b.scalar_type())};
  is_double(a) ? vicreg_backward<double>(g, inputs, saved, settings, needed, grads)
               : vicreg_backward<float>(g, inputs, saved, settings, needed, grads);
  return {grads[0], grads[1]};
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("vicreg_fwd", TORCH_BOX(&sslkern::vicreg_fwd));
  m.impl("vicreg_bwd", TORCH_BOX(&sslkern::vicreg_bwd));
}
