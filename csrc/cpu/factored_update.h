// A weight W (q, p) and its optimizer state, moved by P = dy' x in one pass. A strip of P is computed by register tiles
// from packed factors and lives in cache only; the state is read, moved and written right after it.
#pragma once

#include "panels.h"

namespace sslkern {

constexpr int64_t kDepth = 256;            // rows of the batch per product
constexpr int64_t kWidth = 1024;           // columns of a strip, at most
constexpr int64_t kFactorBlock = 1 << 16;  // numbers of the packed x that stay in L2
constexpr int64_t kSummed = 256;           // elements of a row, whose squares are summed in T
constexpr int kSlots = 4;                  // W and at most three tensors of state

// Row-major pointers to W and its state, null where there is none.
template <class T>
struct Slots {
  T* at[kSlots] = {};

  Slots moved(int64_t offset) const {
    Slots to;
    for (int s = 0; s < kSlots; ++s) to.at[s] = at[s] == nullptr ? nullptr : at[s] + offset;
    return to;
  }
};

// m <- a m + b P + c w, then w <- d w + e m + f P
template <bool HasM, class T>
SSLKERN_INLINE T momentum_row(const Slots<T>& slots, const T* product, int64_t n, const T* k) {
  T *const w = slots.at[0], *const m = slots.at[1];
  const T a = k[0], b = k[1], c = k[2], d = k[3], e = k[4], f = k[5];
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t j = 0; j < n; ++j) {
    T moved = d * w[j] + f * product[j];
    if constexpr (HasM) {
      m[j] = a * m[j] + b * product[j] + c * w[j];
      moved += e * m[j];
    }
    w[j] = moved;
    square += moved * moved;
  }
  return square;
}

// m <- m + (1 - beta1) (g - m), v <- beta2 v + (1 - beta2) g^2, w <- d w - step m / (sqrt(u) r + eps)
template <bool HasHighest, class T>
SSLKERN_INLINE T adam_row(const Slots<T>& slots, const T* product, int64_t n, const T* k) {
  T *const w = slots.at[0], *const m = slots.at[1], *const v = slots.at[2], *const highest = slots.at[3];
  const T s = k[0], one_beta1 = k[1], beta2 = k[2], one_beta2 = k[3], d = k[4], step = k[5], r = k[6], eps = k[7];
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t j = 0; j < n; ++j) {
    const T g = s * product[j], mean = m[j] + one_beta1 * (g - m[j]), second = beta2 * v[j] + one_beta2 * (g * g);
    T u = second;
    m[j] = mean;
    v[j] = second;
    if constexpr (HasHighest) {
      const T old = highest[j];
      u = second > old || second != second ? second : old;  // NaN if either is
      highest[j] = u;
    }
    const T moved = d * w[j] - step * mean / (std::sqrt(u) * r + eps);
    w[j] = moved;
    square += moved * moved;
  }
  return square;
}

// Moves `rows` rows of W and its state, (rows, n) with row stride ld, by the product (rows, n) with row stride
// product_ld. Returns the squared norm of what is written to W, summed in T over short pieces and in fp64 across them.
template <class T, class Row>
SSLKERN_INLINE double move_rows(const Slots<T>& at, int64_t ld, const T* product, int64_t product_ld, int64_t rows,
                                int64_t n, const Row& row) {
  double square = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += kSummed)
      square += row(at.moved(i * ld + j), product + i * product_ld + j, std::min(kSummed, n - j));
  return square;
}

// `last` is the slot that may be empty.
#define SSLKERN_MOVE(name, move_row, last, T)                                                                   \
  SSLKERN_CLONES static double name(const Slots<T>& at, int64_t ld, const T* product, int64_t product_ld,       \
                                    int64_t rows, int64_t n, const T* k) {                                      \
    const auto row = [&](const Slots<T>& to, const T* from, int64_t count) SSLKERN_LAMBDA {                     \
      return to.at[last] != nullptr ? move_row<true>(to, from, count, k) : move_row<false>(to, from, count, k); \
    };                                                                                                          \
    return move_rows(at, ld, product, product_ld, rows, n, row);                                                \
  }
SSLKERN_MOVE(move_momentum, momentum_row, 1, float)
SSLKERN_MOVE(move_momentum, momentum_row, 1, double)
SSLKERN_MOVE(move_adam, adam_row, 3, float)
SSLKERN_MOVE(move_adam, adam_row, 3, double)
#undef SSLKERN_MOVE

}  // namespace sslkern
