// Operators for batch moments and batch norm on the CPU.
#include "batch_norm_backward.h"

namespace sslkern {
namespace {

using namespace batch_norm;

// Calls f(S()), where S is the storage type of x.
template <class F>
void as_stored(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return f(BFloatBits());
    case ScalarType::Half: return f(HalfBits());
    case ScalarType::Double: return f(double());
    default: return f(float());
  }
}

Tensor per_channel(const Tensor& x) {
  return fresh(x, {x.size(1)}, accumulation_dtype(x));
}

Tensor two_per_channel(const Tensor& x) {
  return fresh(x, {2, x.size(1)}, accumulation_dtype(x));
}

std::tuple<Tensor, Tensor> batch_moments_fwd(const Tensor x) {
  Tensor centre = two_per_channel(x), variance = per_channel(x);
  as_stored(x, [&](auto zero) { moments<decltype(zero)>(Layout(x), x, centre, variance); });
  return {centre, variance};
}

// running += momentum * (batch * factor - running)
template <class T>
void track(const std::optional<Tensor>& running, const Tensor& batch, double momentum, double factor) {
  if (!running) return;
  T* to = data<T>(*running);
  const T *from = data<T>(batch), share = static_cast<T>(momentum), scale = static_cast<T>(factor);
  for (int64_t c = 0; c < running->numel(); ++c) to[c] += share * (from[c] * scale - to[c]);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor x, const Tensor weight, const Tensor bias,
                                                  std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                                  double momentum, double eps, bool relu) {
  Tensor centre = two_per_channel(x), variance = per_channel(x), y = fresh_like(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Layout v(x);
    train<S>(x, Coefficients<Wide<S>>(v, centre, variance, weight, bias, eps, relu), centre, variance, y);
    track<Wide<S>>(running_mean, centre, momentum, 1);
    track<Wide<S>>(running_var, variance, momentum, v.count() / (v.count() - 1.));
  });
  return {y, centre, variance};
}

std::tuple<Tensor, Tensor> batch_norm_bwd(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias,
                                          const Tensor centre, const Tensor variance, double eps, bool relu) {
  Tensor sums = two_per_channel(x), dx = fresh_like(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Coefficients<Wide<S>> c(Layout(x), centre, variance, weight, bias, eps, relu);
    train_backward<S>(dy, x, c, sums, dx);
  });
  return {dx, sums};
}

Tensor batch_norm_apply(const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                        const Tensor variance, double eps, bool relu) {
  Tensor y = fresh_like(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Layout v(x);
    apply<S>(v, x, Coefficients<Wide<S>>(v, centre, variance, weight, bias, eps, relu).set_all(), y);
  });
  return y;
}

Tensor batch_norm_sums(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                       const Tensor variance, double eps, bool relu) {
  Tensor sums = two_per_channel(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Layout v(x);
    gradient_sums<S>(v, dy, x, Coefficients<Wide<S>>(v, centre, variance, weight, bias, eps, relu).set_all(), sums);
  });
  return sums;
}

Tensor batch_norm_input_grad(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias,
                             const Tensor centre, const Tensor variance, const Tensor means, double eps, bool relu) {
  Tensor dx = fresh_like(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Layout v(x);
    Coefficients<Wide<S>> c(v, centre, variance, weight, bias, eps, relu);
    input_gradient<S>(v, dy, x, c.set_all(), means, 1., dx);
  });
  return dx;
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("batch_moments_fwd", TORCH_BOX(&sslkern::batch_moments_fwd));
  m.impl("batch_norm_fwd", TORCH_BOX(&sslkern::batch_norm_fwd));
  m.impl("batch_norm_bwd", TORCH_BOX(&sslkern::batch_norm_bwd));
  m.impl("batch_norm_apply", TORCH_BOX(&sslkern::batch_norm_apply));
  m.impl("batch_norm_sums", TORCH_BOX(&sslkern::batch_norm_sums));
  m.impl("batch_norm_input_grad", TORCH_BOX(&sslkern::batch_norm_input_grad));
}
