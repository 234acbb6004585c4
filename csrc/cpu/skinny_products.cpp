// X right and X^H left on the CPU. A complex X (n, p) is a real one (n, 2p), its real and imaginary parts side by side.
#include "skinny_products.h"

namespace sslkern {
namespace {

// Column r of a complex matrix as two real ones, whose products with X's row are the real and the imaginary part.
template <class T>
std::unique_ptr<T[]> both_parts(const T* right, int64_t p, int64_t m) {
  auto out = room_for<T>(4 * p * m);
  for (int64_t j = 0; j < p; ++j)
    for (int64_t r = 0; r < m; ++r) {
      const T real = right[2 * (j * m + r)], imaginary = right[2 * (j * m + r) + 1];
      T* two = out.get() + 4 * j * m;
      two[r] = two[3 * m + r] = real;
      two[m + r] = imaginary;
      two[2 * m + r] = -imaginary;
    }
  return out;
}

// Real parts before imaginary ones, in each row.
template <class T>
std::unique_ptr<T[]> parted(const T* left, int64_t n, int64_t k) {
  auto out = room_for<T>(2 * n * k);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < k; ++r)
      for (int64_t part = 0; part < 2; ++part) out[(2 * i + part) * k + r] = left[2 * (i * k + r) + part];
  return out;
}

template <class T>
void real_products(const T* x, int64_t n, int64_t p, const T* left, int64_t k, const T* right, int64_t m, T* x_right,
                   T* x_left) {
  const SkinnyProducts<T> pass(x, n, p, left, k, right, m);
  pass.run([&](int64_t, int64_t j0, int64_t cols, const T* sums) {
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t r = 0; r < k; ++r) x_left[(j0 + j) * k + r] = pass.sum(sums, pass.few(), r, j);
  });
  pass.rows([&](int64_t i, const T* row) { std::copy_n(row, m, x_right + i * m); });
}

template <class T>
void complex_products(const T* x, int64_t n, int64_t p, const T* left, int64_t k, const T* right, int64_t m, T* x_right,
                      T* x_left) {
  const auto l = parted(left, n, k), w = both_parts(right, p, m);
  const SkinnyProducts<T> pass(x, n, 2 * p, l.get(), 2 * k, w.get(), 2 * m);
  pass.run([&](int64_t, int64_t j0, int64_t cols, const T* sums) {
    const auto sum = [&](int64_t r, int64_t j) { return pass.sum(sums, pass.few(), r, j); };
    for (int64_t j = 0; j < cols; j += 2)
      for (int64_t r = 0; r < k; ++r) {
        T* to = x_left + (j0 + j) * k + 2 * r;
        to[0] = sum(r, j) + sum(k + r, j + 1);
        to[1] = sum(k + r, j) - sum(r, j + 1);
      }
  });
  pass.rows([&](int64_t i, const T* row) {
    for (int64_t r = 0; r < 2 * m; ++r) x_right[2 * (i * m + r % m) + r / m] = row[r];
  });
}

template <class T>
void all_products(const Tensor& x, const Tensor& right, const Tensor& left, bool complex, const Tensor& x_right,
                  const Tensor& x_left) {
  const int64_t n = x.size(-2), p = x.size(-1), k = left.size(-1), m = right.size(-1), parts = complex ? 2 : 1;
  const auto products = complex ? complex_products<T> : real_products<T>;
  const auto one = [&](int64_t s) {
    products(data<T>(x) + s * n * p * parts, n, p, data<T>(left) + s * n * k * parts, k,
             data<T>(right) + s * p * m * parts, m, data<T>(x_right) + s * n * m * parts,
             data<T>(x_left) + s * p * k * parts);
  };
  for_slices(stack_size(x), n * p, one);
}

std::tuple<Tensor, Tensor> skinny_products(const Tensor x, const Tensor right, const Tensor left) {
  Tensor x_right = fresh(x, stacked(x, {x.size(-2), right.size(-1)}), x.scalar_type());
  Tensor x_left = fresh(x, stacked(x, {x.size(-1), left.size(-1)}), x.scalar_type());
  switch (x.scalar_type()) {
    case ScalarType::Float: all_products<float>(x, right, left, false, x_right, x_left); break;
    case ScalarType::Double: all_products<double>(x, right, left, false, x_right, x_left); break;
    case ScalarType::ComplexFloat: all_products<float>(x, right, left, true, x_right, x_left); break;
    default: all_products<double>(x, right, left, true, x_right, x_left);
  }
  return {x_right, x_left};
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("skinny_products", TORCH_BOX(&sslkern::skinny_products));
}
