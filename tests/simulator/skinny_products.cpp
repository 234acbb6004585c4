// The launcher of csrc/cuda/skinny_products.cuh for numpy's arrays: x (stack, n, p), right (stack, p, m), left (stack,
// n, k), x_right (stack, n, m), x_left (stack, p, k), of numbers or, with a last dimension of 2, of pairs.
#include "../../csrc/cuda/skinny_products.cuh"

#include "bindings.h"

namespace {

using namespace sslkern::cuda;
using pybind11::array;

template <class T>
T* pointer(const array& x) {
  return simulator::pointer<T>(x, std::vector<pybind11::ssize_t>(x.shape(), x.shape() + x.ndim()));
}

template <class T>
SkinnyProblem<T> problem(const array& x, const array& right, const array& left) {
  const bool pairs = x.ndim() == 4;
  const int64_t parts = pairs ? 2 : 1;
  return {pointer<const T>(x), pointer<const T>(right), pointer<const T>(left), nullptr, nullptr, x.shape(1),
          x.shape(2) * parts,  right.shape(2) * parts,  left.shape(2) * parts,  pairs};
}

// `bytes`: the limit of partial sums per launch.
template <class T>
void bind(pybind11::module_& all, const char* dtype) {
  pybind11::module_ m = all.def_submodule(dtype);
  m.def("plan", [](const array& x, const array& right, const array& left, int64_t bytes) {
    const SkinnyPlan c = plan_for(problem<T>(x, right, left), x.shape(0), bytes);
    pybind11::dict found;
    found["vectors"] = c.vectors, found["wide"] = c.wide, found["across"] = c.across, found["groups"] = c.groups;
    found["passes"] = c.passes, found["strips"] = c.strips, found["splits"] = c.splits;
    found["per_split"] = c.per_split, found["together"] = c.together, found["shared"] = c.shared;
    found["partial"] = c.each * sizeof(T);
    return found;
  });
  m.def("skinny_products", [](const array& x, const array& right, const array& left, const array& x_right,
                              const array& x_left, int64_t bytes) {
    SkinnyProblem<T> q = problem<T>(x, right, left);
    q.x_right = pointer<T>(x_right);
    q.x_left = pointer<T>(x_left);
    const SkinnyPlan c = plan_for(q, x.shape(0), bytes);
    simulator::Poisoned partial(sizeof(T) * c.together * c.each);
    simulator::check(both_products(q, x.shape(0), c, reinterpret_cast<T*>(partial.memory.data()), nullptr));
  });
}

}  // namespace

PYBIND11_MODULE(skinny_products, m) {
  simulator::bind(m);
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}
