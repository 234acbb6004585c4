// Per-channel arithmetic of batch moments and batch norm, between the passes over x.
#pragma once

#include <cmath>

#include "../loops.h"

namespace sslkern {

// Turns sums of squares about the pivot into sums of squares about the mean, in place. Returns false if a column would
// lose more than one bit, which happens when its pivot is more than a standard deviation from its mean.
template <class T>
SSLKERN_INLINE bool centre_squares_body(int64_t count, int64_t cols, const T* sum, T* square) {
  const double each = 1. / count;
  int64_t safe = 0;
#pragma omp simd reduction(+ : safe)
  for (int64_t j = 0; j < cols; ++j) {
    const double shift = sum[j] * (sum[j] * each);
    safe += shift <= square[j] * .5;
    square[j] = static_cast<T>(square[j] - shift);
  }
  return safe == cols;
}

// Chan's merge: adds `more` elements, with their mean and sum of squares about it, to (count, mean, m2).
SSLKERN_INLINE void merge(int64_t count, int64_t more, double more_mean, double more_m2, double& mean, double& m2) {
  const double delta = more_mean - mean, share = static_cast<double>(more) / (count + more);
  mean += delta * share;
  m2 += more_m2 + delta * delta * count * share;
}

// The same for columns, from sums about a pivot and squares about their own means. The merged mean becomes the next
// pivot.
template <class T>
SSLKERN_INLINE void merge_columns_body(int64_t count, int64_t more, int64_t cols, const T* sum, const T* square,
                                       T* pivot, double* mean, double* m2) {
  const double each = 1. / more;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    merge(count, more, pivot[j] + sum[j] * each, square[j], mean[j], m2[j]);
    pivot[j] = static_cast<T>(mean[j]);
  }
}

// Writes the mean as high + low, and the biased variance.
template <class T>
SSLKERN_INLINE void finish_moments_body(int64_t n, int64_t count, const double* mean, const double* m2, T* high, T* low,
                                        T* variance) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    high[j] = static_cast<T>(mean[j]);
    low[j] = static_cast<T>(mean[j] - high[j]);
    variance[j] = static_cast<T>(m2[j] / count);
  }
}

// Per-channel scale and bias for `Affine`. The mean is high + low; the bias corrects for low.
template <class T>
SSLKERN_INLINE void affine_of_body(int64_t n, const T* low, const T* variance, const T* weight, const T* beta, T eps,
                                   T* inverse_std, T* scale, T* bias) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    inverse_std[j] = 1 / std::sqrt(variance[j] + eps);
    scale[j] = weight[j] * inverse_std[j];
    bias[j] = beta[j] - low[j] * scale[j];
  }
}

// Per channel: the sums of dy and of dy x_hat, from the sums of dy and of dy (x - high).
template <class T>
SSLKERN_INLINE void finish_sums_body(int64_t n, const double* sum, const double* dot, const T* low,
                                     const T* inverse_std, T* sum_out, T* dot_out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    sum_out[j] = static_cast<T>(sum[j]);
    dot_out[j] = static_cast<T>((dot[j] - low[j] * sum[j]) * inverse_std[j]);
  }
}

// dx = scale (dy - mean(dy) - x_hat mean(dy x_hat)) = scale dy - (slope (x - high) + offset). A mean is `each` times
// its sum.
template <class T>
SSLKERN_INLINE void slopes_body(int64_t n, const T* sum, const T* dot, double each, const T* low, const T* inverse_std,
                                const T* scale, T* slope, T* offset) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const double along = dot[j] * each * inverse_std[j];
    slope[j] = static_cast<T>(scale[j] * along);
    offset[j] = static_cast<T>(scale[j] * (sum[j] * each - along * low[j]));
  }
}

// Clones of the per-channel loops.
#define SSLKERN_KERNELS(T)                                                                                           \
  SSLKERN_CLONES static bool centre_squares(int64_t count, int64_t cols, const T* sum, T* square) {                  \
    return centre_squares_body(count, cols, sum, square);                                                            \
  }                                                                                                                  \
  SSLKERN_CLONES static void merge_columns(int64_t count, int64_t more, int64_t cols, const T* sum, const T* square, \
                                           T* pivot, double* mean, double* m2) {                                     \
    merge_columns_body(count, more, cols, sum, square, pivot, mean, m2);                                             \
  }                                                                                                                  \
  SSLKERN_CLONES static void finish_moments(int64_t n, int64_t count, const double* mean, const double* m2, T* high, \
                                            T* low, T* variance) {                                                   \
    finish_moments_body(n, count, mean, m2, high, low, variance);                                                    \
  }                                                                                                                  \
  SSLKERN_CLONES static void affine_of(int64_t n, const T* low, const T* variance, const T* weight, const T* beta,   \
                                       T eps, T* inverse_std, T* scale, T* bias) {                                   \
    affine_of_body(n, low, variance, weight, beta, eps, inverse_std, scale, bias);                                   \
  }                                                                                                                  \
  SSLKERN_CLONES static void finish_sums(int64_t n, const double* sum, const double* dot, const T* low,              \
                                         const T* inverse_std, T* sum_out, T* dot_out) {                             \
    finish_sums_body(n, sum, dot, low, inverse_std, sum_out, dot_out);                                               \
  }                                                                                                                  \
  SSLKERN_CLONES static void slopes(int64_t n, const T* sum, const T* dot, double each, const T* low,                \
                                    const T* inverse_std, const T* scale, T* slope, T* offset) {                     \
    slopes_body(n, sum, dot, each, low, inverse_std, scale, slope, offset);                                          \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

}  // namespace sslkern
