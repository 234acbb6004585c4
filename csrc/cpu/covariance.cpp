// Covariance on the CPU. The centred matrix is never formed as a whole. Blocks of it (all rows of some columns in the
// dual, all columns of some rows in the primal) are centred in cache and multiplied there, by our tiles or the vendor
// library.
#include "covariance.h"

namespace sslkern {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
void covariance_forward(const Tensor& z, const SavedMoments& saved, Tensor& offdiag) {
  for_slices(saved.stack, saved.n * saved.d,
             [&](int64_t s) { data<T>(offdiag)[s] = static_cast<T>(second_moments(z, saved.at<T>(slice(z, s), s))); });
}

Outputs covariance_fwd(const Tensor z, bool unbiased, bool dual) {
  SavedMoments saved = allocate_moments(z, unbiased, dual, {});
  Tensor offdiag = fresh(z, stacked(z, {}), saved.variance.scalar_type());
  is_double(z) ? covariance_forward<double>(z, saved, offdiag) : covariance_forward<float>(z, saved, offdiag);
  return {saved.variance, offdiag, saved.centre, saved.gram, saved.row_sq};
}

template <class T>
void covariance_backward(const Tensor& z, const SavedMoments& saved, const Tensor& grad_variance,
                         const Tensor& grad_offdiag, Tensor& grad) {
  for_slices(saved.stack, saved.n * saved.d, [&](int64_t s) {
    const T* g = data<T>(grad_variance) + s * saved.d;
    const std::vector<double> column(g, g + saved.d);
    input_gradient(saved.gram, s, saved.at<T>(slice(z, s), s), column, data<T>(grad_offdiag)[s],
                   static_cast<const Pull*>(nullptr), slice(grad, s));
  });
}

Tensor covariance_bwd(const Tensor grad_variance, const Tensor grad_offdiag, const Tensor z, const Tensor centre,
                      const Tensor variance, const Tensor gram, const Tensor row_sq, bool unbiased, bool dual) {
  const SavedMoments saved = restore_moments(z, centre, variance, gram, row_sq, unbiased, dual);
  const Tensor gv = stable::contiguous(grad_variance), go = stable::contiguous(grad_offdiag);
  Tensor grad = fresh(z, stacked(z, {saved.n, saved.d}), z.scalar_type());
  is_double(z) ? covariance_backward<double>(z, saved, gv, go, grad)
               : covariance_backward<float>(z, saved, gv, go, grad);
  return grad;
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("covariance_fwd", TORCH_BOX(&sslkern::covariance_fwd));
  m.impl("covariance_bwd", TORCH_BOX(&sslkern::covariance_bwd));
}
