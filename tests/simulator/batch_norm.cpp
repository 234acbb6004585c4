// The launchers of csrc/cuda/batch_norm.cuh for numpy's arrays, x of shape (M, C) or (N, C, L).
#include "../../csrc/cuda/batch_norm.cuh"

#include "bindings.h"

namespace {

using namespace sslkern::cuda;
using pybind11::array;
using Shape = std::vector<pybind11::ssize_t>;

Layout layout_of(const array& x) {
  return {x.shape(0), x.shape(1), x.ndim() == 3 ? x.shape(2) : 1, x.ndim() == 2};
}

template <class T>
T* like(const array& a, const array& x) {
  return simulator::pointer<T>(a, Shape(x.shape(), x.shape() + x.ndim()));
}

template <class A>
A* channels(const array& a, const array& x) {
  return simulator::pointer<A>(a, {x.shape(1)});
}

template <class A>
A* two_channels(const array& a, const array& x) {
  return simulator::pointer<A>(a, {2, x.shape(1)});
}

template <class T>
Statistics<Accumulator<T>> statistics(const array& x, const array& weight, const array& bias, const array& centre,
                                      const array& variance, double eps, bool relu) {
  using A = Accumulator<T>;
  return {channels<const A>(weight, x),   channels<const A>(bias, x), two_channels<const A>(centre, x),
          channels<const A>(variance, x), static_cast<A>(eps),        relu};
}

template <class T>
void bind(pybind11::module_& all, const char* dtype) {
  using A = Accumulator<T>;
  pybind11::module_ m = all.def_submodule(dtype);
  m.def("plan", [](const array& x, bool reducing) {
    const ChannelPlan p = plan(layout_of(x), sizeof(T), aligned(x.data()), reducing ? kReducingBlocks : kMappingBlocks);
    return std::tuple(p.wide, p.grid.x, p.grid.y, p.block.x, p.block.y);
  });
  m.def("moments", [](const array& x, const array& centre, const array& variance, std::optional<array> running_mean,
                      std::optional<array> running_var, double momentum) {
    const Layout v = layout_of(x);
    const ChannelPlan p = plan(v, sizeof(T), aligned(x.data()), kReducingBlocks);
    simulator::Poisoned w(split_bytes<Moments<A>>(v, p));
    const Running<A> running{running_mean ? channels<A>(*running_mean, x) : nullptr,
                             running_var ? channels<A>(*running_var, x) : nullptr, static_cast<A>(momentum)};
    simulator::check(moments<T>(v, p, like<const T>(x, x), w.memory.data(), two_channels<A>(centre, x),
                                channels<A>(variance, x), running, nullptr));
  });
  m.def("apply", [](const array& x, const array& weight, const array& bias, const array& centre, const array& variance,
                    double eps, bool relu, const array& y) {
    const ChannelPlan p = plan(layout_of(x), sizeof(T), aligned(x.data()) && aligned(y.data()), kMappingBlocks);
    simulator::check(apply<T>(layout_of(x), p, like<const T>(x, x),
                              statistics<T>(x, weight, bias, centre, variance, eps, relu), like<T>(y, x), nullptr));
  });
  m.def("sums", [](const array& dy, const array& x, const array& weight, const array& bias, const array& centre,
                   const array& variance, double eps, bool relu, const array& sums) {
    const Layout v = layout_of(x);
    const ChannelPlan p = plan(v, sizeof(T), aligned(x.data()) && aligned(dy.data()), kReducingBlocks);
    simulator::Poisoned w(split_bytes<GradientSums>(v, p));
    simulator::check(gradient_sums<T>(v, p, like<const T>(dy, x), like<const T>(x, x),
                                      statistics<T>(x, weight, bias, centre, variance, eps, relu), w.memory.data(),
                                      two_channels<A>(sums, x), nullptr));
  });
  m.def("input_grad",
        [](const array& dy, const array& x, const array& weight, const array& bias, const array& centre,
           const array& variance, const array& sums, double each, double eps, bool relu, const array& dx) {
          const bool all_aligned = aligned(x.data()) && aligned(dy.data()) && aligned(dx.data());
          const ChannelPlan p = plan(layout_of(x), sizeof(T), all_aligned, kMappingBlocks);
          simulator::check(input_grad<T>(layout_of(x), p, like<const T>(dy, x), like<const T>(x, x),
                                         statistics<T>(x, weight, bias, centre, variance, eps, relu),
                                         two_channels<const A>(sums, x), each, like<T>(dx, x), nullptr));
        });
}

}  // namespace

PYBIND11_MODULE(batch_norm, m) {
  simulator::bind(m);
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind<BFloat16>(m, "bfloat16");
  bind<Half>(m, "float16");
}
