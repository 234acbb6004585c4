// The launchers of csrc/cuda/rank_k_update.cuh for numpy's arrays: u (stack, n, p), a (stack, n, k), b (stack, p, k),
// of numbers or, with a last dimension of 2, of pairs.
#include "../../csrc/cuda/rank_k_update.cuh"

#include "bindings.h"

namespace {

using namespace sslkern::cuda;
using pybind11::array;

template <class T>
Problem<T> problem(const array& u, const array& a, const array& b, int retraction) {
  const auto pointer = [](const array& x) {
    return simulator::pointer<T>(x, std::vector<pybind11::ssize_t>(x.shape(), x.shape() + x.ndim()));
  };
  const bool pairs = u.ndim() == 4;
  const int64_t parts = pairs ? 2 : 1;
  return {pointer(u),
          pointer(a),
          pointer(b),
          u.shape(1),
          static_cast<int>(u.shape(2) * parts),
          static_cast<int>(a.shape(2) * parts),
          pairs,
          retraction};
}

// `shared`: the limit of a GPU; `path`: whether in one kernel, and how many matrices together, instead of what is
// planned.
template <class T>
void bind(pybind11::module_& all, const char* dtype) {
  pybind11::module_ m = all.def_submodule(dtype);
  m.def("plan", [](const array& u, const array& a, const array& b, size_t shared) {
    const UpdatePlan p = plan_for(problem<T>(u, a, b, 0), u.shape(0), shared);
    pybind11::dict found;
    found["small"] = p.small, found["vectors"] = p.vectors, found["tall"] = p.tall, found["in_shared"] = p.in_shared;
    found["together"] = p.together, found["shared"] = std::max({p.project, p.gather, p.update});
    found["splits"] = p.cut.splits, found["gathers"] = p.cut.gathers, found["slices"] = p.cut.slices;
    return found;
  });
  m.def("rank_k_update", [](const array& u, const array& a, const array& b, int retraction, size_t shared,
                            std::optional<std::pair<bool, int64_t>> path) {
    const Problem<T> q = problem<T>(u, a, b, retraction);
    const UpdatePlan p =
        path ? plan_for(q, u.shape(0), shared, path->first, path->second) : plan_for(q, u.shape(0), shared);
    simulator::Poisoned w(workspace_bytes(q, p));
    simulator::check(rank_k_update<T>(q, u.shape(0), p, w.memory.data(), nullptr));
  });
}

}  // namespace

PYBIND11_MODULE(rank_k_update, m) {
  simulator::bind(m);
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}
