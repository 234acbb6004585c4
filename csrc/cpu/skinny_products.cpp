// X right and X^H left on the CPU. A complex X (n, p) is a real one (n, 2p), with real and imaginary parts side by
// side.
#include "skinny_products.h"

namespace sslkern {

// Loops for few columns. They run at memory speed.
template <int Q, class T>
SSLKERN_INLINE T mixed(const T* c, T x, T y, T z, T w) {
  if constexpr (Q == 1) return c[0] * x;
  if constexpr (Q == 2) return c[0] * x + c[1] * y;
  return (c[0] * x + c[1] * y) + (c[2] * z + c[3] * w);
}

// out_r += sum_q c_rq in_q for R rows r and Q rows q, each 1, 2 or 4. All inputs are read into named variables before
// any output is written, which keeps them in registers.
template <int R, int Q, class T>
SSLKERN_INLINE void add_mixed(T* out, int64_t out_ld, const T* in, int64_t in_ld, const T* c, int64_t c_row,
                              int64_t c_col, int64_t n) {
  T by[4][4] = {};
  for (int r = 0; r < R; ++r)
    for (int q = 0; q < Q; ++q) by[r][q] = c[r * c_row + q * c_col];
  const T *in1 = in + (Q > 1) * in_ld, *in2 = in + (Q > 2) * 2 * in_ld, *in3 = in + (Q > 2) * 3 * in_ld;
  T *out1 = out + (R > 1) * out_ld, *out2 = out + (R > 2) * 2 * out_ld, *out3 = out + (R > 2) * 3 * out_ld;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T x = in[j], y = in1[j], z = in2[j], w = in3[j];
    const T s = out[j] + mixed<Q>(by[0], x, y, z, w), t = out1[j] + mixed<Q>(by[1], x, y, z, w);
    const T u = out2[j] + mixed<Q>(by[2], x, y, z, w), v = out3[j] + mixed<Q>(by[3], x, y, z, w);
    out[j] = s;
    if constexpr (R > 1) out1[j] = t;
    if constexpr (R > 2) out2[j] = u, out3[j] = v;
  }
}

template <int R, class T>
SSLKERN_INLINE void add_all_mixed(T* out, int64_t out_ld, const T* in, int64_t in_ld, int64_t count, const T* c,
                                  int64_t c_row, int64_t c_col, int64_t n) {
  for (; count >= 4; count -= 4, in += 4 * in_ld, c += 4 * c_col)
    add_mixed<R, 4>(out, out_ld, in, in_ld, c, c_row, c_col, n);
  if (count >= 2) {
    add_mixed<R, 2>(out, out_ld, in, in_ld, c, c_row, c_col, n);
    count -= 2, in += 2 * in_ld, c += 2 * c_col;
  }
  if (count > 0) add_mixed<R, 1>(out, out_ld, in, in_ld, c, c_row, c_col, n);
}

template <class T>
SSLKERN_INLINE void add_product_body(T* out, int64_t out_ld, int64_t rows, const T* in, int64_t in_ld, int64_t count,
                                     const T* c, int64_t c_row, int64_t c_col, int64_t n) {
  for (; rows >= 4; rows -= 4, out += 4 * out_ld, c += 4 * c_row)
    add_all_mixed<4>(out, out_ld, in, in_ld, count, c, c_row, c_col, n);
  if (rows >= 2) {
    add_all_mixed<2>(out, out_ld, in, in_ld, count, c, c_row, c_col, n);
    rows -= 2, out += 2 * out_ld, c += 2 * c_row;
  }
  if (rows > 0) add_all_mixed<1>(out, out_ld, in, in_ld, count, c, c_row, c_col, n);
}

template <class T>
SSLKERN_INLINE void dots_body(const T* u, int64_t u_ld, const T* w, int64_t w_ld, int64_t n, T* out) {
  T a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
  for (int64_t j = 0; j < n; ++j) {
    const T x = w[j], y = w[w_ld + j];
    a += u[j] * x, b += u[j] * y;
    c += u[u_ld + j] * x, d += u[u_ld + j] * y;
    e += u[2 * u_ld + j] * x, f += u[2 * u_ld + j] * y;
    g += u[3 * u_ld + j] * x, h += u[3 * u_ld + j] * y;
  }
  out[0] = a, out[1] = b, out[2] = c, out[3] = d, out[4] = e, out[5] = f, out[6] = g, out[7] = h;
}

#define SSLKERN_KERNELS(T)                                                                                        \
  SSLKERN_CLONES static void add_product_of(T* out, int64_t out_ld, int64_t rows, const T* in, int64_t in_ld,     \
                                            int64_t count, const T* c, int64_t c_row, int64_t c_col, int64_t n) { \
    add_product_body(out, out_ld, rows, in, in_ld, count, c, c_row, c_col, n);                                    \
  }                                                                                                               \
  SSLKERN_CLONES static void dots_of(const T* u, int64_t u_ld, const T* w, int64_t w_ld, int64_t n, T* out) {     \
    dots_body(u, u_ld, w, w_ld, n, out);                                                                          \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

template <class T>
void add_product(T* out, int64_t out_ld, int64_t rows, const T* in, int64_t in_ld, int64_t count, const T* c,
                 int64_t c_row, int64_t c_col, int64_t n) {
  add_product_of(out, out_ld, rows, in, in_ld, count, c, c_row, c_col, n);
}

template <class T>
void dots(const T* u, int64_t u_ld, const T* w, int64_t w_ld, int64_t n, T* out) {
  dots_of(u, u_ld, w, w_ld, n, out);
}

template void add_product(float*, int64_t, int64_t, const float*, int64_t, int64_t, const float*, int64_t, int64_t,
                          int64_t);
template void add_product(double*, int64_t, int64_t, const double*, int64_t, int64_t, const double*, int64_t, int64_t,
                          int64_t);
template void dots(const float*, int64_t, const float*, int64_t, int64_t, float*);
template void dots(const double*, int64_t, const double*, int64_t, int64_t, double*);

namespace {

// Each column of a complex matrix as two real ones. Their products with a row of X are the real and the imaginary part.
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

// Each row with all real parts before the imaginary parts.
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
