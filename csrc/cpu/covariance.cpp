// Covariance and VICReg on the CPU. The matrix is never centred as a whole: blocks of it (all rows of some columns in
// the dual, all columns of some rows in the primal) are centred into cache, multiplied there by tiles of ours or by the
// vendor library, and forgotten.
#include "covariance.h"

namespace sslkern {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The workspaces that the forward hands to the backward, for `views` stacks of the shape of z.
struct Saved {
  Tensor centre, variance, gram, row_sq;
  int64_t n, d, m, stack;
  bool unbiased, dual;

  template <class T>
  Slice<T> at(const Matrix& z, int64_t index) const {
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

Saved allocate(const Tensor& z, bool unbiased, bool dual, const Shape& views) {
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

Saved restore(const Tensor& z, const Tensor& centre, const Tensor& variance, const Tensor& gram, const Tensor& row_sq,
              bool unbiased, bool dual) {
  const int64_t n = z.size(z.dim() - 2), d = z.size(z.dim() - 1);
  return {centre, variance, gram, row_sq, n, d, dual ? n : d, stack_size(z), unbiased, dual};
}

template <class T>
void covariance_forward(const Tensor& z, const Saved& saved, Tensor& offdiag) {
  for_slices(saved.stack, saved.n * saved.d,
             [&](int64_t s) { data<T>(offdiag)[s] = static_cast<T>(second_moments(z, saved.at<T>(slice(z, s), s))); });
}

Outputs covariance_fwd(const Tensor z, bool unbiased, bool dual) {
  Saved saved = allocate(z, unbiased, dual, {});
  Tensor offdiag = fresh(z, stacked(z, {}), saved.variance.scalar_type());
  is_double(z) ? covariance_forward<double>(z, saved, offdiag) : covariance_forward<float>(z, saved, offdiag);
  return {saved.variance, offdiag, saved.centre, saved.gram, saved.row_sq};
}

template <class T>
void covariance_backward(const Tensor& z, const Saved& saved, const Tensor& grad_variance, const Tensor& grad_offdiag,
                         Tensor& grad) {
  for_slices(saved.stack, saved.n * saved.d, [&](int64_t s) {
    const T* g = data<T>(grad_variance) + s * saved.d;
    const std::vector<double> column(g, g + saved.d);
    input_gradient(saved.gram, s, saved.at<T>(slice(z, s), s), column, data<T>(grad_offdiag)[s],
                   static_cast<const Pull*>(nullptr), slice(grad, s));
  });
}

Tensor covariance_bwd(const Tensor grad_variance, const Tensor grad_offdiag, const Tensor z, const Tensor centre,
                      const Tensor variance, const Tensor gram, const Tensor row_sq, bool unbiased, bool dual) {
  const Saved saved = restore(z, centre, variance, gram, row_sq, unbiased, dual);
  const Tensor gv = stable::contiguous(grad_variance), go = stable::contiguous(grad_offdiag);
  Tensor grad = fresh(z, stacked(z, {saved.n, saved.d}), z.scalar_type());
  is_double(z) ? covariance_backward<double>(z, saved, gv, go, grad)
               : covariance_backward<float>(z, saved, gv, go, grad);
  return grad;
}

struct Settings {
  double sim, std, cov, gamma, eps;
};

// max(0, gamma - sqrt(v + eps)), NaN for a NaN
double hinge(double v, const Settings& k) {
  const double gap = k.gamma - std::sqrt(v + k.eps);
  return gap < 0 ? 0 : gap;
}

template <class T>
void vicreg_forward(const Tensor& a, const Tensor& b, const Saved& saved, const Settings& k, Tensor& loss,
                    Tensor& terms) {
  for_slices(saved.stack, saved.n * saved.d, [&](int64_t s) {
    const Matrix views[2] = {slice(a, s), slice(b, s)};
    double variance = 0, offdiag = 0;
    for (int64_t v = 0; v < 2; ++v) {
      const Slice<T> view = saved.at<T>(views[v], v * saved.stack + s);
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
  Saved saved = allocate(a, unbiased, dual, {2});
  const Settings settings{sim, std, cov, gamma, eps};
  Tensor loss = fresh(a, stacked(a, {}), saved.variance.scalar_type());
  Tensor terms = fresh(a, stacked(a, {3}), saved.variance.scalar_type());
  is_double(a) ? vicreg_forward<double>(a, b, saved, settings, loss, terms)
               : vicreg_forward<float>(a, b, saved, settings, loss, terms);
  return {loss, terms, saved.centre, saved.variance, saved.gram, saved.row_sq};
}

template <class T>
void vicreg_backward(const Tensor& grad_loss, const Tensor* inputs, const Saved& saved, const Settings& k,
                     const bool* needed, Tensor* grads) {
  for_slices(saved.stack, saved.n * saved.d, [&](int64_t s) {
    std::vector<double> column(saved.d);
    const double g = data<T>(grad_loss)[s];
    for (int64_t v = 0; v < 2; ++v) {
      if (!needed[v]) continue;
      const int64_t index = v * saved.stack + s;
      const Slice<T> view = saved.at<T>(slice(inputs[v], s), index);
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
  const Saved saved = restore(a, centre, variance, gram, row_sq, unbiased, dual);
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
  m.impl("covariance_fwd", TORCH_BOX(&sslkern::covariance_fwd));
  m.impl("covariance_bwd", TORCH_BOX(&sslkern::covariance_bwd));
  m.impl("vicreg_fwd", TORCH_BOX(&sslkern::vicreg_fwd));
  m.impl("vicreg_bwd", TORCH_BOX(&sslkern::vicreg_bwd));
}
