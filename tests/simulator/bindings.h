// What a module of kernels under test needs to be called with numpy's arrays.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace simulator {

// set_order(name, seed=0): "ascending", "descending" or "random", for threads and blocks.
inline void bind(pybind11::module_& m) {
  const auto set_order = [](const std::string& name, unsigned seed) {
    if (name != "ascending" && name != "descending" && name != "random")
      throw std::invalid_argument("there is no order " + name);
    machine.set_order(name == "ascending"    ? Order::kAscending
                      : name == "descending" ? Order::kDescending
                                             : Order::kRandom,
                      seed);
  };
  m.def("set_order", set_order, pybind11::arg("name"), pybind11::arg("seed") = 0);
}

// The numbers of a contiguous array of this shape, which a kernel may write where T is not const. Half and BFloat16 are
// uint16 in numpy.
template <class T>
T* pointer(const pybind11::array& a, const std::vector<pybind11::ssize_t>& shape) {
  using Number = std::conditional_t<std::is_arithmetic_v<T>, std::remove_const_t<T>, uint16_t>;
  static_assert(sizeof(Number) == sizeof(T));
  if (!a.dtype().equal(pybind11::dtype::of<Number>()))
    throw std::invalid_argument("expected an array of " + std::string(pybind11::str(pybind11::dtype::of<Number>())) +
                                ", got " + std::string(pybind11::str(a.dtype())));
  if (!std::equal(shape.begin(), shape.end(), a.shape(), a.shape() + a.ndim()))
    throw std::invalid_argument("expected the shape " + std::string(pybind11::str(pybind11::cast(shape))) + ", got " +
                                std::string(pybind11::str(a.attr("shape"))));
  if (!(a.flags() & pybind11::array::c_style)) throw std::invalid_argument("expected a contiguous array");
  if (!std::is_const_v<T> && !a.writeable()) throw std::invalid_argument("expected an array that can be written");
  return static_cast<T*>(const_cast<void*>(a.data()));
}

// A launch that CUDA would refuse is an exception.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Memory that a kernel finds in any state, and must not write past.
struct Poisoned {
  static constexpr size_t kGuard = 64;
  std::vector<unsigned char> memory;
  size_t size;

  explicit Poisoned(size_t size) : memory(size + kGuard, 0xff), size(size) {}
  ~Poisoned() noexcept(false) {
    if (std::uncaught_exceptions() == 0 &&
        std::any_of(memory.begin() + size, memory.end(), [](unsigned char byte) { return byte != 0xff; }))
      throw std::runtime_error("a kernel wrote past the end of its workspace");
  }
};

}  // namespace simulator
