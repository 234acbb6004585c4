// Inner loops of batch moments and batch norm: sums per column or per plane, and elementwise maps. S is the storage
// type and T the type of the arithmetic.
#pragma once

#include <algorithm>

#include "batch_norm_channels.h"
#include "channels.h"

namespace sslkern {

// The column loops take several rows per step, so each per-column value is loaded and stored once for all of them. The
// rows are unrolled by hand, because the compiler does not vectorise a loop over rows. Maps of bf16 gain nothing: the
// conversions take longer than the loads.
constexpr int64_t kAtOnce = 4;
template <class S>
constexpr int64_t kMapped = sizeof(S) > 2 ? kAtOnce : 1;

// Calls f(row) for R rows.
template <int64_t R, class F>
SSLKERN_INLINE void each_row(const F& f) {
  f(0);
  if constexpr (R > 1) f(1);
  if constexpr (R > 2) f(2);
  if constexpr (R > 3) f(3);
}

// Per column, over R rows: sum += x - pivot, square += (x - pivot)^2.
template <int64_t R, class S, class T>
SSLKERN_INLINE void add_powers_of(const S* x, int64_t ld, int64_t cols, const T* pivot, T* sum, T* square) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    T s = 0, q = 0;
    const T p = pivot[j];
    each_row<R>([&](int64_t r) SSLKERN_LAMBDA {
      const T d = wide(x[j + r * ld]) - p;
      s += d;
      q += d * d;
    });
    sum[j] += s;
    square[j] += q;
  }
}

template <class S, class T>
SSLKERN_INLINE void add_powers_body(const S* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot, T* sum,
                                    T* square) {
  int64_t i = 0;
  for (; i + kAtOnce <= rows; i += kAtOnce, x += kAtOnce * ld) {
    prefetch_rows(x, ld, rows - i, cols, kAtOnce);
    add_powers_of<kAtOnce>(x, ld, cols, pivot, sum, square);
  }
  for (; i < rows; ++i, x += ld) add_powers_of<1>(x, ld, cols, pivot, sum, square);
}

// Per column: square += ((x - pivot) - shift)^2.
template <class S, class T>
SSLKERN_INLINE void add_squares_body(const S* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot, const T* shift,
                                     T* square) {
  for (int64_t i = 0; i < rows; ++i, x += ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T d = (wide(x[j]) - pivot[j]) - shift[j];
      square[j] += d * d;
    }
  }
}

// The map of each channel: y = (x - mean) * scale + bias, followed by a relu where `relu` is set.
template <class T>
struct Affine {
  const T *mean, *scale, *bias;
  bool relu;
};

// sum += dy, dot += dy (x - mean). With kRelu, dy is zero where the relu is off; NaN passes, as in torch.
template <int64_t R, bool kRelu, class S, class T>
SSLKERN_INLINE void add_gradients_of(const S* dy, const S* x, int64_t ld, int64_t cols, const Affine<T>& f, T* sum,
                                     T* dot) {
  const T *mean = f.mean, *scale = f.scale, *bias = f.bias;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    T s = 0, d = 0;
    const T m = mean[j], a = kRelu ? scale[j] : T(0), b = kRelu ? bias[j] : T(0);
    each_row<R>([&](int64_t r) SSLKERN_LAMBDA {
      const T c = wide(x[j + r * ld]) - m, given = wide(dy[j + r * ld]);
      const T g = kRelu && c * a + b <= 0 ? T(0) : given;
      s += g;
      d += g * c;
    });
    sum[j] += s;
    dot[j] += d;
  }
}

template <bool kRelu, class S, class T>
SSLKERN_INLINE void add_gradients_if(const S* dy, const S* x, int64_t ld, int64_t rows, int64_t cols,
                                     const Affine<T>& f, T* sum, T* dot) {
  int64_t i = 0;
  for (; i + kAtOnce <= rows; i += kAtOnce, x += kAtOnce * ld, dy += kAtOnce * ld) {
    prefetch_rows(x, ld, rows - i, cols, kAtOnce);
    prefetch_rows(dy, ld, rows - i, cols, kAtOnce);
    add_gradients_of<kAtOnce, kRelu>(dy, x, ld, cols, f, sum, dot);
  }
  for (; i < rows; ++i, x += ld, dy += ld) add_gradients_of<1, kRelu>(dy, x, ld, cols, f, sum, dot);
}

template <class S, class T>
SSLKERN_INLINE void add_gradients_body(const S* dy, const S* x, int64_t ld, int64_t rows, int64_t cols,
                                       const Affine<T>& f, T* sum, T* dot) {
  f.relu ? add_gradients_if<true>(dy, x, ld, rows, cols, f, sum, dot)
         : add_gradients_if<false>(dy, x, ld, rows, cols, f, sum, dot);
}

// Sums over a plane use this many lanes, which are then added in pairs.
constexpr int64_t kLanes = 64;

template <class T>
SSLKERN_INLINE T fold_lanes(T* lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

template <class S, class T>
SSLKERN_INLINE void add_lanes(const S* x, int64_t lanes, T pivot, T* sums, T* squares) {
#pragma omp simd
  for (int64_t j = 0; j < lanes; ++j) {
    const T d = wide(x[j]) - pivot;
    sums[j] += d;
    squares[j] += d * d;
  }
}

template <class S, class T>
SSLKERN_INLINE void plane_powers_body(const S* x, int64_t n, T pivot, T& sum, T& square) {
  T sums[kLanes] = {}, squares[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add_lanes(x + i, kLanes, pivot, sums, squares);
  add_lanes(x + i, n - i, pivot, sums, squares);
  sum = fold_lanes(sums);
  square = fold_lanes(squares);
}

template <class S, class T>
SSLKERN_INLINE void add_gradient_lanes(const S* dy, const S* x, int64_t lanes, T mean, T scale, T bias, bool relu,
                                       T* sums, T* dots) {
#pragma omp simd
  for (int64_t j = 0; j < lanes; ++j) {
    const T c = wide(x[j]) - mean, given = wide(dy[j]);
    const T g = relu && c * scale + bias <= 0 ? T(0) : given;
    sums[j] += g;
    dots[j] += g * c;
  }
}

template <class S, class T>
SSLKERN_INLINE void plane_gradients_body(const S* dy, const S* x, int64_t n, T mean, T scale, T bias, bool relu,
                                         double& sum, double& dot) {
  T sums[kLanes] = {}, dots[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add_gradient_lanes(dy + i, x + i, kLanes, mean, scale, bias, relu, sums, dots);
  add_gradient_lanes(dy + i, x + i, n - i, mean, scale, bias, relu, sums, dots);
  sum += fold_lanes(sums);
  dot += fold_lanes(dots);
}

// Yields the same value at every index. Lets one loop serve both a single channel and one channel per column.
template <class T>
struct Same {
  T value;
  SSLKERN_INLINE T operator[](int64_t) const {
    return value;
  }
};

template <int64_t R, bool kRelu, class S, class V>
SSLKERN_INLINE void affine_of_rows(const S* x, int64_t ld, int64_t n, V mean, V scale, V bias, S* out) {
  using T = Wide<S>;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T m = mean[j], a = scale[j], b = bias[j];
    each_row<R>([&](int64_t r) SSLKERN_LAMBDA {
      const T y = (wide(x[j + r * ld]) - m) * a + b;
      out[j + r * ld] = narrow<S>(kRelu && y < 0 ? T(0) : y);
    });
  }
}

// out = scale dy - (slope (x - mean) + offset). With kConstant every slope is 0, and a NaN or inf in x does not reach
// the output.
template <int64_t R, bool kRelu, bool kConstant, class S, class V>
SSLKERN_INLINE void input_gradient_of_rows(const S* dy, const S* x, int64_t ld, int64_t n, V mean, V scale, V bias,
                                           V slope, V offset, S* out) {
  using T = Wide<S>;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T m = mean[j], a = scale[j], b = kRelu ? bias[j] : T(0), k = slope[j], l = offset[j];
    each_row<R>([&](int64_t r) SSLKERN_LAMBDA {
      const T c = wide(x[j + r * ld]) - m, given = wide(dy[j + r * ld]);
      const T g = kRelu && c * a + b <= 0 ? T(0) : given;
      out[j + r * ld] = narrow<S>(a * g - (kConstant ? l : k * c + l));
    });
  }
}

// Maps one piece of `for_pieces_in_order`. The coefficients start at the first channel of the piece. With `runs`, each
// row is one channel.
template <bool kRelu, class S, class T>
SSLKERN_INLINE void affine_if(const S* x, int64_t ld, int64_t rows, int64_t cols, bool runs, const Affine<T>& f,
                              S* out) {
  constexpr int64_t R = kMapped<S>;
  int64_t i = 0;
  for (; runs && i < rows; ++i, x += ld, out += ld)
    affine_of_rows<1, kRelu, S, Same<T>>(x, ld, cols, {f.mean[i]}, {f.scale[i]}, {f.bias[i]}, out);
  for (; i + R <= rows; i += R, x += R * ld, out += R * ld)
    affine_of_rows<R, kRelu>(x, ld, cols, f.mean, f.scale, f.bias, out);
  for (; i < rows; ++i, x += ld, out += ld) affine_of_rows<1, kRelu>(x, ld, cols, f.mean, f.scale, f.bias, out);
}

template <class S, class T>
SSLKERN_INLINE void affine_body(const S* x, int64_t ld, int64_t rows, int64_t cols, bool runs, const Affine<T>& f,
                                S* out) {
  f.relu ? affine_if<true>(x, ld, rows, cols, runs, f, out) : affine_if<false>(x, ld, rows, cols, runs, f, out);
}

template <bool kRelu, bool kConstant, class S, class T>
SSLKERN_INLINE void input_gradient_if(const S* dy, const S* x, int64_t ld, int64_t rows, int64_t cols, bool runs,
                                      const Affine<T>& f, const T* slope, const T* offset, S* out) {
  constexpr int64_t R = kConstant ? 1 : kMapped<S>;
  int64_t i = 0;
  for (; runs && i < rows; ++i, x += ld, dy += ld, out += ld)
    input_gradient_of_rows<1, kRelu, kConstant, S, Same<T>>(dy, x, ld, cols, {f.mean[i]}, {f.scale[i]}, {f.bias[i]},
                                                            {slope[i]}, {offset[i]}, out);
  for (; i + R <= rows; i += R, x += R * ld, dy += R * ld, out += R * ld)
    input_gradient_of_rows<R, kRelu, kConstant>(dy, x, ld, cols, f.mean, f.scale, f.bias, slope, offset, out);
  for (; i < rows; ++i, x += ld, dy += ld, out += ld)
    input_gradient_of_rows<1, kRelu, kConstant>(dy, x, ld, cols, f.mean, f.scale, f.bias, slope, offset, out);
}

template <class S, class T>
SSLKERN_INLINE void input_gradient_body(const S* dy, const S* x, int64_t ld, int64_t rows, int64_t cols, bool runs,
                                        const Affine<T>& f, const T* slope, const T* offset, S* out) {
  if (!f.relu) return input_gradient_if<false, false>(dy, x, ld, rows, cols, runs, f, slope, offset, out);
  const bool constant = std::all_of(slope, slope + (runs ? rows : cols), [](T k) { return k == 0; });
  constant ? input_gradient_if<true, true>(dy, x, ld, rows, cols, runs, f, slope, offset, out)
           : input_gradient_if<true, false>(dy, x, ld, rows, cols, runs, f, slope, offset, out);
}

// Clones of the loops that read x, stored as S.
#define SSLKERN_KERNELS(S, T)                                                                                          \
  SSLKERN_CLONES static void add_powers(const S* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot, T* sum,    \
                                        T* square) {                                                                   \
    add_powers_body(x, ld, rows, cols, pivot, sum, square);                                                            \
  }                                                                                                                    \
  SSLKERN_CLONES static void add_squares(const S* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot,           \
                                         const T* shift, T* square) {                                                  \
    add_squares_body(x, ld, rows, cols, pivot, shift, square);                                                         \
  }                                                                                                                    \
  SSLKERN_CLONES static void add_gradients(const S* dy, const S* x, int64_t ld, int64_t rows, int64_t cols,            \
                                           const Affine<T>& f, T* sum, T* dot) {                                       \
    add_gradients_body(dy, x, ld, rows, cols, f, sum, dot);                                                            \
  }                                                                                                                    \
  SSLKERN_CLONES static void plane_powers(const S* x, int64_t n, T pivot, T& sum, T& square) {                         \
    plane_powers_body(x, n, pivot, sum, square);                                                                       \
  }                                                                                                                    \
  SSLKERN_CLONES static void plane_gradients(const S* dy, const S* x, int64_t n, T mean, T scale, T bias, bool relu,   \
                                             double& sum, double& dot) {                                               \
    plane_gradients_body(dy, x, n, mean, scale, bias, relu, sum, dot);                                                 \
  }                                                                                                                    \
  SSLKERN_CLONES static void affine(const S* x, int64_t ld, int64_t rows, int64_t cols, bool runs, const Affine<T>& f, \
                                    S* out) {                                                                          \
    affine_body(x, ld, rows, cols, runs, f, out);                                                                      \
  }                                                                                                                    \
  SSLKERN_CLONES static void write_input_gradient(const S* dy, const S* x, int64_t ld, int64_t rows, int64_t cols,     \
                                                  bool runs, const Affine<T>& f, const T* slope, const T* offset,      \
                                                  S* out) {                                                            \
    input_gradient_body(dy, x, ld, rows, cols, runs, f, slope, offset, out);                                           \
  }
SSLKERN_KERNELS(float, float)
SSLKERN_KERNELS(double, double)
SSLKERN_KERNELS(BFloatBits, float)
#undef SSLKERN_KERNELS

}  // namespace sslkern
