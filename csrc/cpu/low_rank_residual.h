// Loops over a row of a residual: its loss, and the derivative of the loss by the model.
#pragma once

#include <bit>

#include "../loops.h"

namespace sslkern {

enum class Residual { l2, l1, huber, poisson };

template <class T>
struct LogOf;

template <>
struct LogOf<float> {
  using Int = int32_t;
  static constexpr int mantissa = 23, bias = 127, terms = 6;
};

template <>
struct LogOf<double> {
  using Int = int64_t;
  static constexpr int mantissa = 52, bias = 1023, terms = 12;
};

// log x for a normal x > 0, and NaN for infinity and NaN. With x = 2^e f and f in [sqrt(1/2), sqrt(2)), it is
// e log 2 + 2 artanh((f - 1) / (f + 1)), by its series.
template <class T>
SSLKERN_INLINE T log_of(T x) {
  using L = LogOf<T>;
  using Int = typename L::Int;
  constexpr T root = T(0.70710678118654752440);
  const Int bits = std::bit_cast<Int>(x), from = std::bit_cast<Int>(root);
  const Int exponent = (bits - from) >> L::mantissa;
  const T f = std::bit_cast<T>(bits - (exponent << L::mantissa)), s = (f - 1) / (f + 1), square = s * s;
  T sum = T(1) / (2 * L::terms - 1);
  for (int k = L::terms - 2; k >= 0; --k) sum = sum * square + T(1) / (2 * k + 1);
  return T(exponent) * T(0.69314718055994530942) + 2 * s * sum + (x - x);
}

// The loss of an element m of the matrix and t of the model; t becomes the derivative by t.
template <Residual Kind, class T>
SSLKERN_INLINE T residual_of_element(T m, T& t, T setting, T log_setting) {
  if constexpr (Kind == Residual::poisson) {  // below the least rate, the logarithm goes on along its tangent
    const bool low = t < setting;
    const T rate = low ? setting : t, more = low ? t / setting - 1 : T(0);
    const T value = rate - m * ((low ? log_setting : log_of(rate)) + more);
    t = (low ? T(0) : T(1)) - m / rate;
    return value;
  }
  const T d = t - m, size = d < 0 ? -d : d;
  if constexpr (Kind == Residual::l2) {
    t = 2 * d;
    return d * d;
  } else if constexpr (Kind == Residual::l1) {
    t = d > 0 ? T(1) : d < 0 ? T(-1) : d;
    return size;
  } else {
    t = d > setting ? setting : d < -setting ? -setting : d;
    return size <= setting ? d * d / 2 : setting * (size - setting / 2);
  }
}

template <Residual Kind, bool Masked, class T>
SSLKERN_INLINE T residual_body(const T* m, const uint8_t* mask, T* t, int64_t n, T setting) {
  const T log_setting = Kind == Residual::poisson ? std::log(setting) : T(0);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    T slope = t[j];
    const T value = residual_of_element<Kind>(m[j], slope, setting, log_setting);
    const bool keep = !Masked || mask[j] != 0;
    t[j] = keep ? slope : T(0);
    sum += keep ? value : T(0);
  }
  return sum;
}

template <bool Masked, class T>
SSLKERN_INLINE T residual_kind(Residual kind, const T* m, const uint8_t* mask, T* t, int64_t n, T setting) {
  switch (kind) {
    case Residual::l2: return residual_body<Residual::l2, Masked>(m, mask, t, n, setting);
    case Residual::l1: return residual_body<Residual::l1, Masked>(m, mask, t, n, setting);
    case Residual::huber: return residual_body<Residual::huber, Masked>(m, mask, t, n, setting);
    default: return residual_body<Residual::poisson, Masked>(m, mask, t, n, setting);
  }
}

// The loss of a row; t becomes its derivative by t, 0 where the mask is 0.
#define SSLKERN_KERNELS(T)                                                                                           \
  SSLKERN_CLONES static T residual_row(Residual kind, const T* m, const uint8_t* mask, T* t, int64_t n, T setting) { \
    return mask == nullptr ? residual_kind<false>(kind, m, mask, t, n, setting)                                      \
                           : residual_kind<true>(kind, m, mask, t, n, setting);                                      \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

}  // namespace sslkern
