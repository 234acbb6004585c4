// Operator for products of CUDA tensors with few columns.
#include "bindings.h"
#include "skinny_products.cuh"

namespace sslkern::cuda {
namespace {

template <class T>
void run(const Tensor& x, const Tensor& right, const Tensor& left, const Tensor& x_right, const Tensor& x_left,
         bool pairs) {
  const int64_t parts = pairs ? 2 : 1, stack = stack_size(x);
  const SkinnyProblem<T> q{
      data<T>(x), data<T>(right),     data<T>(left),          data<T>(x_right),      data<T>(x_left),
      x.size(-2), x.size(-1) * parts, right.size(-1) * parts, left.size(-1) * parts, pairs};
  const SkinnyPlan c = plan_for(q, stack);
  const Tensor partial = stable::new_empty(x, {c.together * c.each}, dtype_of<T>());
  check(both_products(q, stack, c, data<T>(partial), current_stream(x)), "skinny_products");
}

std::tuple<Tensor, Tensor> skinny_products(const Tensor x, const Tensor right, const Tensor left) {
  check_cuda(x, "x");
  const stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor x_right = stable::new_empty(x, stacked(x, {x.size(-2), right.size(-1)}));
  Tensor x_left = stable::new_empty(x, stacked(x, {x.size(-1), left.size(-1)}));
  switch (x.scalar_type()) {
    case ScalarType::Float: run<float>(x, right, left, x_right, x_left, false); break;
    case ScalarType::Double: run<double>(x, right, left, x_right, x_left, false); break;
    case ScalarType::ComplexFloat: run<float>(x, right, left, x_right, x_left, true); break;
    default: run<double>(x, right, left, x_right, x_left, true);
  }
  return {x_right, x_left};
}

}  // namespace
}  // namespace sslkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CUDA, m) {
  m.impl("skinny_products", TORCH_BOX(&sslkern::cuda::skinny_products));
}
