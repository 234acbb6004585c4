// Loops over projections x: sums of cos(t x) and sin(t x) over equispaced knots t, and their derivatives. A projection
// needs one sine and cosine; the next knot is a rotation by the same angle.
#pragma once

#include <bit>
#include <iterator>

#include "../loops.h"

namespace sslkern {

template <class T>
struct TurnOf;

template <>
struct TurnOf<float> {
  using Bits = uint32_t;
  static constexpr int bits = 12;  // of a part of a period, so that its product with a number of periods is exact
  static constexpr double widest = 1e30;
  static constexpr float magic = 12582912.f;
  static constexpr float sine[] = {1.f / 362880, -1.f / 5040, 1.f / 120, -1.f / 6};
  static constexpr float cosine[] = {-1.f / 3628800, 1.f / 40320, -1.f / 720, 1.f / 24, -.5f};
};

template <>
struct TurnOf<double> {
  using Bits = uint64_t;
  static constexpr int bits = 26;
  static constexpr double widest = 1e300;
  static constexpr double magic = 6755399441055744.;
  static constexpr double sine[] = {1. / 355687428096000, -1. / 1307674368000, 1. / 6227020800, -1. / 39916800,
                                    1. / 362880,          -1. / 5040,          1. / 120,        -1. / 6};
  static constexpr double cosine[] = {-1. / 6402373705728000,
                                      1. / 20922789888000,
                                      -1. / 87178291200,
                                      1. / 479001600,
                                      -1. / 3628800,
                                      1. / 40320,
                                      -1. / 720,
                                      1. / 24,
                                      -.5};
};

// The angle t x for a fixed t. x is reduced by periods of pi / (2 t), which are split in three parts (Cody and Waite),
// so the angle keeps the relative precision of x however many turns it has, up to |x| = `limit`.
template <class T>
struct Turn {
  T t, per_period = 0, high = 0, middle = 0, low = 0, limit;

  explicit Turn(double angle) : t(static_cast<T>(angle)) {
    constexpr double quarter = 1.57079632679489661923, rest = 6.12323399573676603587e-17;
    const double period = quarter / angle, more = (std::fma(-period, angle, quarter) + rest) / angle;
    limit = static_cast<T>(std::min(std::abs(std::ldexp(period, TurnOf<T>::bits - 1)), TurnOf<T>::widest));
    if (!(std::abs(period) < TurnOf<T>::widest)) return;  // no x below the limit gets to a quarter of a turn
    per_period = static_cast<T>(1 / period);
    high = static_cast<T>(leading(period));
    middle = static_cast<T>(leading(period - high));
    low = static_cast<T>((period - high) - middle + more);
  }

  static double leading(double x) {
    int exponent;
    const double fraction = std::frexp(x, &exponent);
    return std::ldexp(std::trunc(std::ldexp(fraction, TurnOf<T>::bits)), exponent - TurnOf<T>::bits);
  }
};

// cos(t x) - 1 and sin(t x). The difference from 1 keeps the digits of a small angle, which rotations add up.
template <class T>
SSLKERN_INLINE void turn(T x, T t, T per_period, T high, T middle, T low, T& cosine, T& sine) {
  using Of = TurnOf<T>;
  const T shifted = x * per_period + Of::magic, periods = shifted - Of::magic;
  const T y = (((x - periods * high) - periods * middle) - periods * low) * t, square = y * y;
  T s = Of::sine[0], c = Of::cosine[0];
  for (size_t k = 1; k < std::size(Of::sine); ++k) s = s * square + Of::sine[k];
  for (size_t k = 1; k < std::size(Of::cosine); ++k) c = c * square + Of::cosine[k];
  s = y + y * square * s;
  c *= square;
  // By masks, since a compiler turns selections by the bits of an integer into branches.
  using Bits = typename Of::Bits;
  const auto quarter = std::bit_cast<Bits>(shifted), odd = -(quarter & 1), some = -((quarter | quarter >> 1) & 1);
  const auto sign = Bits(1) << (8 * sizeof(T) - 1);
  const auto of_s = std::bit_cast<Bits>(s), whole = std::bit_cast<Bits>(T(1) + c), other = (of_s ^ whole) & odd;
  sine = std::bit_cast<T>((of_s ^ other) ^ (quarter << (8 * sizeof(T) - 2) & sign));
  const T turned = std::bit_cast<T>((whole ^ other) ^ ((quarter + 1) << (8 * sizeof(T) - 2) & sign)) - 1;
  cosine = std::bit_cast<T>((std::bit_cast<Bits>(turned) & some) | (std::bit_cast<Bits>(c) & ~some));
}

// Knots first, first + step, ...
template <class T>
struct Knots {
  Turn<T> first, step;
  bool from_zero;
  double start, apart;
  int64_t count;

  Knots(double start, double apart, int64_t count)
      : first(start == 0 ? 1. : start), step(apart), from_zero(start == 0), start(start), apart(apart), count(count) {}

  T limit() const {
    return from_zero ? step.limit : std::min(first.limit, step.limit);
  }
  double at(int64_t k) const {
    return start + static_cast<double>(k) * apart;
  }
};

// The rows and columns whose cosines and sines are turned at once.
constexpr int64_t kTurnRows = 4, kTurnCols = 128;
constexpr int64_t kTurnNumbers = kTurnRows * kTurnCols;

// The state of a recurrence over the knots: the cosine and the sine at a knot, and the rotation to the next one, by the
// angle whose cosine is 1 + a, and whose sine is b.
template <class T>
struct Turning {
  T c[kTurnNumbers], s[kTurnNumbers], a[kTurnNumbers], b[kTurnNumbers];
};

template <class T>
SSLKERN_INLINE void turns_body(const T* x, int64_t n, const Turn<T>& by, T one, T* cosine, T* sine) {
  const T t = by.t, per_period = by.per_period, high = by.high, middle = by.middle, low = by.low;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    turn(x[j], t, per_period, high, middle, low, cosine[j], sine[j]);
    cosine[j] += one;
  }
}

// The state at the first knot. A knot at 0 has cosine 1 and sine 0, and NaN where x is not finite.
template <class T>
SSLKERN_INLINE void begin_turns_body(const T* x, int64_t n, const Knots<T>& knots, Turning<T>& out) {
  turns_body(x, n, knots.step, T(0), out.a, out.b);
  if (!knots.from_zero) return turns_body(x, n, knots.first, T(1), out.c, out.s);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    out.s[j] = 0 * x[j];
    out.c[j] = 1 + 0 * x[j];
  }
}

// The largest |x|; NaN is ignored.
template <class T>
SSLKERN_INLINE T largest_size_body(const T* x, int64_t n) {
  T most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; ++j) {
    const T size = x[j] < 0 ? -x[j] : x[j];
    most = size > most ? size : most;
  }
  return most;
}

#define SSLKERN_KERNELS(T)                                                                                \
  SSLKERN_CLONES static void begin_turns(const T* x, int64_t n, const Knots<T>& knots, Turning<T>& out) { \
    begin_turns_body(x, n, knots, out);                                                                   \
  }                                                                                                       \
  SSLKERN_CLONES static T largest_size(const T* x, int64_t n) {                                           \
    return largest_size_body(x, n);                                                                       \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

// The rotation of R rows in registers, in vectors of `Bytes`: kTurnRows rows of `cols` elements, a multiple of 16.
//   add:   adds the cosines and sines of all rows to sums (2, count, kTurnCols)
//   weigh: out = sum_k weights[0, k] sin(t_k x) + weights[1, k] cos(t_k x), for weights (2, count, ld)
// target_clones would not work, as in tiles.cpp.
#define SSLKERN_TURNS(name, target, T, Bytes, R)                                                                      \
  target static void name##_add(const Turning<T>& from, int64_t cols, int64_t count, T* sums) {                       \
    typedef T V __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));                                   \
    for (int64_t j = 0; j < cols; j += Bytes / sizeof(T))                                                             \
      for (int64_t i = j; i < kTurnNumbers; i += R * kTurnCols) {                                                     \
        V c[R], s[R], a[R], b[R];                                                                                     \
        SSLKERN_BEGIN(R)                                                                                              \
        T* to = sums + j;                                                                                             \
        for (int64_t k = 0; k < count; ++k, to += kTurnCols) {                                                        \
          V cosines = c[0], sines = s[0];                                                                             \
          _Pragma("GCC unroll 4") for (int r = 1; r < R; ++r) cosines += c[r], sines += s[r];                         \
          *reinterpret_cast<V*>(to) += cosines;                                                                       \
          *reinterpret_cast<V*>(to + count * kTurnCols) += sines;                                                     \
          SSLKERN_ROTATE(R)                                                                                           \
        }                                                                                                             \
      }                                                                                                               \
  }                                                                                                                   \
  target static void name##_weigh(const Turning<T>& from, int64_t cols, int64_t count, const T* weights, int64_t ld,  \
                                  T* out) {                                                                           \
    typedef T V __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));                                   \
    for (int64_t j = 0; j < cols; j += Bytes / sizeof(T))                                                             \
      for (int64_t i = j; i < kTurnNumbers; i += R * kTurnCols) {                                                     \
        V c[R], s[R], a[R], b[R], sum[R] = {};                                                                        \
        SSLKERN_BEGIN(R)                                                                                              \
        const T* of = weights + j;                                                                                    \
        for (int64_t k = 0; k < count; ++k, of += ld) {                                                               \
          const V sine = *reinterpret_cast<const V*>(of), cosine = *reinterpret_cast<const V*>(of + count * ld);      \
          _Pragma("GCC unroll 4") for (int r = 0; r < R; ++r) sum[r] += sine * s[r];                                  \
          _Pragma("GCC unroll 4") for (int r = 0; r < R; ++r) sum[r] += cosine * c[r];                                \
          SSLKERN_ROTATE(R)                                                                                           \
        }                                                                                                             \
        _Pragma("GCC unroll 4") for (int r = 0; r < R; ++r) * reinterpret_cast<V*>(out + i + r * kTurnCols) = sum[r]; \
      }                                                                                                               \
  }
#define SSLKERN_BEGIN(R)                                            \
  _Pragma("GCC unroll 4") for (int r = 0; r < R; ++r) {             \
    c[r] = *reinterpret_cast<const V*>(from.c + i + r * kTurnCols); \
    s[r] = *reinterpret_cast<const V*>(from.s + i + r * kTurnCols); \
    a[r] = *reinterpret_cast<const V*>(from.a + i + r * kTurnCols); \
    b[r] = *reinterpret_cast<const V*>(from.b + i + r * kTurnCols); \
  }
#define SSLKERN_ROTATE(R)                               \
  _Pragma("GCC unroll 4") for (int r = 0; r < R; ++r) { \
    const V next = (c[r] + c[r] * a[r]) - s[r] * b[r];  \
    s[r] = (s[r] + s[r] * a[r]) + c[r] * b[r];          \
    c[r] = next;                                        \
  }

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
SSLKERN_TURNS(avx512, __attribute__((unused, target("arch=skylake-avx512"))), float, 64, 4)
SSLKERN_TURNS(avx512, __attribute__((unused, target("arch=skylake-avx512"))), double, 64, 4)
SSLKERN_TURNS(avx2, __attribute__((unused, target("arch=haswell"))), float, 32, 2)
SSLKERN_TURNS(avx2, __attribute__((unused, target("arch=haswell"))), double, 32, 2)
#endif
SSLKERN_TURNS(portable, [[maybe_unused]], float, 16, 2)
SSLKERN_TURNS(portable, [[maybe_unused]], double, 16, 2)
#undef SSLKERN_TURNS
#undef SSLKERN_BEGIN
#undef SSLKERN_ROTATE

// The functions of this processor.
template <class T>
struct Rotation {
  void (*add)(const Turning<T>&, int64_t, int64_t, T*);
  void (*weigh)(const Turning<T>&, int64_t, int64_t, const T*, int64_t, T*);
};

template <class T>
Rotation<T> rotation() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return {avx512_add, avx512_weigh};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {avx2_add, avx2_weigh};
#endif
  return {portable_add, portable_weigh};
}

// The same for the first `rows` rows of projections of any size, one by one, from the angles t x in fp64.
template <class T>
void add_large_turns(const T* x, int64_t rows, int64_t cols, const Knots<T>& knots, T* sums) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < knots.count; ++k)
      for (int64_t j = 0; j < cols; ++j) {
        const double angle = knots.at(k) * static_cast<double>(x[i * kTurnCols + j]);
        sums[k * kTurnCols + j] += static_cast<T>(std::cos(angle));
        sums[(knots.count + k) * kTurnCols + j] += static_cast<T>(std::sin(angle));
      }
}
template <class T>
void weigh_large_turns(T* x, int64_t rows, int64_t cols, const Knots<T>& knots, const T* weights, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < knots.count; ++k) {
        const double angle = knots.at(k) * static_cast<double>(x[i * kTurnCols + j]);
        sum += weights[k * ld + j] * std::sin(angle) + weights[(knots.count + k) * ld + j] * std::cos(angle);
      }
      x[i * kTurnCols + j] = static_cast<T>(sum);
    }
}

}  // namespace sslkern
