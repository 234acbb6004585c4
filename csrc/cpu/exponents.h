// Loops over a row of similarities: exponentials, their sums and their weights. The exponential is our own, because
// neither torch nor libm has one that a compiler vectorises: torch takes 100 ms for 8192^2 of them.
#pragma once

#include <bit>
#include <limits>

#include "../loops.h"

namespace sslkern {

template <class T>
struct ExpOf;

template <>
struct ExpOf<float> {
  using Int = int32_t;
  static constexpr float lowest = -87.3f, highest = 89.f, magic = 12582912.f, high = 0.693359375f,
                         low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float series[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f};
};

template <>
struct ExpOf<double> {
  using Int = int64_t;
  static constexpr double lowest = -708.3, highest = 710., magic = 6755399441055744., high = 6.93145751953125e-1,
                          low = 1.42860682030941723212e-6;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double series[] = {
      1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
      1. / 720,        1. / 120,       1. / 24,       1. / 6,       .5,          1.,         1.};
};

// e^x; 0 below the smallest normal number; NaN stays NaN. With x = n log 2 + r, 2^n is formed from its bits and e^r
// from its series, to about 1 ulp. At `highest`, and no higher, an overflowing n has the bits of infinity.
template <class T>
SSLKERN_INLINE T exp_of(T x) {
  using E = ExpOf<T>;
  const T shifted = x * T(1.44269504088896340736) + E::magic, n = shifted - E::magic;
  const T r = (x - n * E::high) - n * E::low;
  T sum = E::series[0];
  for (size_t k = 1; k < std::size(E::series); ++k) sum = sum * r + E::series[k];
  const auto power =
      std::bit_cast<T>((std::bit_cast<typename E::Int>(shifted) + typename E::Int(E::bias)) << E::mantissa);
  return x < E::lowest ? T(0) : sum * power;
}

template <class T>
SSLKERN_INLINE T any_exp_of(T x) {
  return exp_of(x > ExpOf<T>::highest ? ExpOf<T>::highest : x);
}

// log(1 + u) for 0 <= u <= 1, as 2 artanh(u / (2 + u)), which keeps full precision for small u.
template <class T>
SSLKERN_INLINE T log1p_of(T u) {
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  const T s = u / (2 + u), square = s * s;
  T sum = T(1) / (2 * terms - 1);
  for (int k = terms - 2; k >= 0; --k) sum = sum * square + T(1) / (2 * k + 1);
  return 2 * s * sum;
}

// t = scale * t; or, for a product t and squared norms x and y, t = scale * max(0, x + y - 2 t).
template <class T>
SSLKERN_INLINE void scale_row_body(T* t, int64_t n, T scale) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] *= scale;
}
template <class T>
SSLKERN_INLINE void distance_row_body(T* t, int64_t n, T scale, T x, const T* y) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T square = x + y[j] - 2 * t[j];
    t[j] = scale * (square < 0 ? T(0) : square);
  }
}

// t = value where a label equals that of the row, or where it differs.
template <class T>
SSLKERN_INLINE void drop_row_body(T* t, int64_t n, int64_t label, const int64_t* labels, bool equal, T value) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] = (labels[j] == label) == equal ? value : t[j];
}

// The sum of exp(c t - shift). The second form also adds each term to its column sum.
template <class T>
SSLKERN_INLINE T exp_row_body(const T* t, int64_t n, T c, T shift) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exp_of(c * t[j] - shift);
  return sum;
}
template <class T>
SSLKERN_INLINE T exp_both_body(const T* t, int64_t n, T c, T shift, T* columns) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T e = exp_of(c * t[j] - shift);
    columns[j] += e;
    sum += e;
  }
  return sum;
}
// The same, with the exponentials in place of t.
template <class T>
SSLKERN_INLINE T keep_exp_body(T* t, int64_t n, T c, T shift, T* columns) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T e = exp_of(c * t[j] - shift);
    t[j] = e;
    columns[j] += e;
    sum += e;
  }
  return sum;
}
// The same without column sums, for scaled exponents.
template <class T>
SSLKERN_INLINE T keep_exp_row_body(T* t, int64_t n, T shift) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    t[j] = exp_of(t[j] - shift);
    sum += t[j];
  }
  return sum;
}
template <class T>
SSLKERN_INLINE void exp_columns_body(const T* t, int64_t n, const T* shifts, T* columns) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) columns[j] += exp_of(t[j] - shifts[j]);
}

// Maxima; NaN is ignored.
template <class T>
SSLKERN_INLINE T largest_body(const T* t, int64_t n) {
  T most = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; ++j) most = t[j] > most ? t[j] : most;
  return most;
}
// NaN if there is one.
template <class T>
SSLKERN_INLINE T largest_or_nan_body(const T* t, int64_t n) {
  T most = -std::numeric_limits<T>::infinity(), zero = 0;
#pragma omp simd reduction(max : most) reduction(+ : zero)
  for (int64_t j = 0; j < n; ++j) {
    most = t[j] > most ? t[j] : most;
    zero += t[j] != t[j] ? t[j] : T(0);
  }
  return zero == 0 ? most : zero;
}
template <class T>
SSLKERN_INLINE void largest_columns_body(const T* t, int64_t n, T* most) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) most[j] = t[j] > most[j] ? t[j] : most[j];
}

// t = exp(c t - shift) (a + b), and t = a exp(t - row) + b exp(t - column): derivatives of a log-sum-exp.
template <class T>
SSLKERN_INLINE void share_row_body(T* t, int64_t n, T shift, T a) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] = exp_of(t[j] - shift) * a;
}
template <class T>
SSLKERN_INLINE void share_both_body(T* t, int64_t n, T c, T shift, T a, const T* b) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] = exp_of(c * t[j] - shift) * (a + b[j]);
}
template <class T>
SSLKERN_INLINE void share_each_body(T* t, int64_t n, T row, T a, const T* column, const T* b) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] = exp_of(t[j] - row) * a + exp_of(t[j] - column[j]) * b[j];
}

// t = t (a + b).
template <class T>
SSLKERN_INLINE void weigh_both_body(T* t, int64_t n, T a, const T* b) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] *= a + b[j];
}

// t = exp(-t) and t = log(1 + exp(t)). The slopes are v times the derivatives.
template <class T>
SSLKERN_INLINE void rbf_body(T* t, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] = any_exp_of(-t[j]);
}
template <class T>
SSLKERN_INLINE void rbf_slope_body(T* t, int64_t n, const T* v) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] = -any_exp_of(-t[j]) * v[j];
}
template <class T>
SSLKERN_INLINE void softplus_body(T* t, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] = (t[j] > 0 ? t[j] : T(0)) + log1p_of(exp_of(-(t[j] < 0 ? -t[j] : t[j])));
}
template <class T>
SSLKERN_INLINE void softplus_slope_body(T* t, int64_t n, const T* v) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T e = exp_of(-(t[j] < 0 ? -t[j] : t[j]));
    t[j] = v[j] * (t[j] < 0 ? e : T(1)) / (1 + e);
  }
}

// k = exp(-scale (x_i - y_j)^2) for a block. One call takes all rows, since calls would dominate for short ones.
template <class T>
SSLKERN_INLINE void rbf_block_body(const T* x, int64_t rows, const T* y, int64_t cols, T scale, T* k, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i, k += ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) k[j] = any_exp_of(-scale * (x[i] - y[j]) * (x[i] - y[j]));
  }
}

// Row sums, and column sums if `of_columns` is given.
template <class T>
SSLKERN_INLINE void sum_block_body(const T* t, int64_t rows, int64_t cols, int64_t ld, T* of_rows, T* of_columns) {
  for (int64_t i = 0; i < rows; ++i, t += ld) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) sum += t[j];
    of_rows[i] = sum;
    if (of_columns == nullptr) continue;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) of_columns[j] += t[j];
  }
}

// w = w + a_i + b_j; if k is given, the result is multiplied by -k.
template <class T>
SSLKERN_INLINE void weigh_block_body(T* w, int64_t rows, int64_t cols, int64_t ld, const T* a, const T* b, const T* k) {
  for (int64_t i = 0; i < rows; ++i, w += ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) w[j] += a[i] + b[j];
    if (k == nullptr) continue;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) w[j] *= -k[i * ld + j];
  }
}

// t = t + a x.
template <class T>
SSLKERN_INLINE void add_row_body(T* t, const T* x, T a, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) t[j] += a * x[j];
}

#define SSLKERN_KERNELS(T)                                                                                          \
  SSLKERN_CLONES static void scale_row(T* t, int64_t n, T scale) {                                                  \
    scale_row_body(t, n, scale);                                                                                    \
  }                                                                                                                 \
  SSLKERN_CLONES static void distance_row(T* t, int64_t n, T scale, T x, const T* y) {                              \
    distance_row_body(t, n, scale, x, y);                                                                           \
  }                                                                                                                 \
  SSLKERN_CLONES static void drop_row(T* t, int64_t n, int64_t label, const int64_t* labels, bool equal, T value) { \
    drop_row_body(t, n, label, labels, equal, value);                                                               \
  }                                                                                                                 \
  SSLKERN_CLONES static T exp_row(const T* t, int64_t n, T c, T shift) {                                            \
    return exp_row_body(t, n, c, shift);                                                                            \
  }                                                                                                                 \
  SSLKERN_CLONES static T exp_both(const T* t, int64_t n, T c, T shift, T* columns) {                               \
    return exp_both_body(t, n, c, shift, columns);                                                                  \
  }                                                                                                                 \
  SSLKERN_CLONES static T keep_exp(T* t, int64_t n, T c, T shift, T* columns) {                                     \
    return keep_exp_body(t, n, c, shift, columns);                                                                  \
  }                                                                                                                 \
  SSLKERN_CLONES static T keep_exp_row(T* t, int64_t n, T shift) {                                                  \
    return keep_exp_row_body(t, n, shift);                                                                          \
  }                                                                                                                 \
  SSLKERN_CLONES static void exp_columns(const T* t, int64_t n, const T* shifts, T* columns) {                      \
    exp_columns_body(t, n, shifts, columns);                                                                        \
  }                                                                                                                 \
  SSLKERN_CLONES static T largest(const T* t, int64_t n) {                                                          \
    return largest_body(t, n);                                                                                      \
  }                                                                                                                 \
  SSLKERN_CLONES static T largest_or_nan(const T* t, int64_t n) {                                                   \
    return largest_or_nan_body(t, n);                                                                               \
  }                                                                                                                 \
  SSLKERN_CLONES static void largest_columns(const T* t, int64_t n, T* most) {                                      \
    largest_columns_body(t, n, most);                                                                               \
  }                                                                                                                 \
  SSLKERN_CLONES static void share_row(T* t, int64_t n, T shift, T a) {                                             \
    share_row_body(t, n, shift, a);                                                                                 \
  }                                                                                                                 \
  SSLKERN_CLONES static void share_both(T* t, int64_t n, T c, T shift, T a, const T* b) {                           \
    share_both_body(t, n, c, shift, a, b);                                                                          \
  }                                                                                                                 \
  SSLKERN_CLONES static void share_each(T* t, int64_t n, T row, T a, const T* column, const T* b) {                 \
    share_each_body(t, n, row, a, column, b);                                                                       \
  }                                                                                                                 \
  SSLKERN_CLONES static void weigh_both(T* t, int64_t n, T a, const T* b) {                                         \
    weigh_both_body(t, n, a, b);                                                                                    \
  }                                                                                                                 \
  SSLKERN_CLONES static void rbf(T* t, int64_t n) {                                                                 \
    rbf_body(t, n);                                                                                                 \
  }                                                                                                                 \
  SSLKERN_CLONES static void rbf_slope(T* t, int64_t n, const T* v) {                                               \
    rbf_slope_body(t, n, v);                                                                                        \
  }                                                                                                                 \
  SSLKERN_CLONES static void softplus(T* t, int64_t n) {                                                            \
    softplus_body(t, n);                                                                                            \
  }                                                                                                                 \
  SSLKERN_CLONES static void softplus_slope(T* t, int64_t n, const T* v) {                                          \
    softplus_slope_body(t, n, v);                                                                                   \
  }                                                                                                                 \
  SSLKERN_CLONES static void rbf_block(const T* x, int64_t rows, const T* y, int64_t cols, T scale, T* k,           \
                                       int64_t ld) {                                                                \
    rbf_block_body(x, rows, y, cols, scale, k, ld);                                                                 \
  }                                                                                                                 \
  SSLKERN_CLONES static void sum_block(const T* t, int64_t rows, int64_t cols, int64_t ld, T* of_rows,              \
                                       T* of_columns) {                                                             \
    sum_block_body(t, rows, cols, ld, of_rows, of_columns);                                                         \
  }                                                                                                                 \
  SSLKERN_CLONES static void weigh_block(T* w, int64_t rows, int64_t cols, int64_t ld, const T* a, const T* b,      \
                                         const T* k) {                                                              \
    weigh_block_body(w, rows, cols, ld, a, b, k);                                                                   \
  }                                                                                                                 \
  SSLKERN_CLONES static void add_row(T* t, const T* x, T a, int64_t n) {                                            \
    add_row_body(t, x, a, n);                                                                                       \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

}  // namespace sslkern
