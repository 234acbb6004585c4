// Small products by tiles of 16 x 16 in registers: where one side is short, a vendor library spends its time on calls,
// packing and new memory. Serial; the callers run many at a time.
#pragma once

#include <cstdlib>
#include <cstring>

#include "../common.h"

namespace sslkern {

constexpr int64_t kTile = 16;

// SSLKERN_CPU_GEMM: "avx2" keeps tiles from AVX-512, "mm" and "onednn" give every product to that library.
inline bool asked(const char* name) {
  static const char* const value = std::getenv("SSLKERN_CPU_GEMM");
  return value != nullptr && std::strcmp(value, name) == 0;
}

// out (16, 16) = or += sum_k a[r * a_row + k * a_k] b[16 k + c]. R rows at a time, in vectors of `Bytes`, keep their
// sums in registers; a pointer for every four of them, hidden from the compiler, which otherwise runs out of registers
// for addresses.
#define SSLKERN_TILE(name, arch, T, Bytes, R)                                                                \
  __attribute__((target("arch=" arch))) static void name(const T* a, int64_t a_row, int64_t a_k, const T* b, \
                                                         int64_t depth, T* out, int64_t ld, bool add) {      \
    typedef T V __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));                          \
    constexpr int W = Bytes / sizeof(T), C = kTile / W, Q = (R + 3) / 4;                                     \
    for (int r0 = 0; r0 < kTile; r0 += R, a += R * a_row, out += R * ld) {                                   \
      V acc[R][C] = {};                                                                                      \
      const T *x[Q], *y = b;                                                                                 \
      for (int q = 0; q < Q; ++q) {                                                                          \
        x[q] = a + 4 * q * a_row;                                                                            \
        __asm__("" : "+r"(x[q]));                                                                            \
      }                                                                                                      \
      for (int64_t k = 0; k < depth; ++k, y += kTile) {                                                      \
        _Pragma("GCC unroll 16") for (int r = 0; r < R; ++r) {                                               \
          const T s = x[r / 4][r % 4 * a_row];                                                               \
          _Pragma("GCC unroll 16") for (int c = 0; c < C; ++c) acc[r][c] +=                                  \
              s * *reinterpret_cast<const V*>(y + W * c);                                                    \
        }                                                                                                    \
        for (int q = 0; q < Q; ++q) x[q] += a_k;                                                             \
      }                                                                                                      \
      _Pragma("GCC unroll 16") for (int r = 0; r < R; ++r) {                                                 \
        _Pragma("GCC unroll 16") for (int c = 0; c < C; ++c) {                                               \
          V* to = reinterpret_cast<V*>(out + r * ld + W * c);                                                \
          *to = add ? *to + acc[r][c] : acc[r][c];                                                           \
        }                                                                                                    \
      }                                                                                                      \
    }                                                                                                        \
  }

// The tiles of one instruction set; `product` is null where only a vendor library will do.
template <class T>
struct Tiles {
  const char* name;
  void (*product)(const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t, bool);
};

// Not by target_clones: GCC lowers wide vectors before it makes the clones, for the poorest of them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
SSLKERN_TILE(tile_avx512, "skylake-avx512", float, 64, 16)
SSLKERN_TILE(tile_avx512, "skylake-avx512", double, 64, 8)
SSLKERN_TILE(tile_avx2, "haswell", float, 32, 4)
SSLKERN_TILE(tile_avx2, "haswell", double, 32, 2)
#define SSLKERN_TILE_CHOICES                                                                                           \
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && \
      __builtin_cpu_supports("avx512vl") && !asked("avx2"))                                                            \
    return {"AVX-512", tile_avx512};                                                                                   \
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"AVX2", tile_avx2};
#else
#define SSLKERN_TILE_CHOICES
#endif

template <class T>
const Tiles<T>& tiles() {
  static const Tiles<T> chosen = []() -> Tiles<T> {
    if (asked("mm") || asked("onednn")) return {"", nullptr};
    SSLKERN_TILE_CHOICES
    return {"", nullptr};
  }();
  return chosen;
}
#undef SSLKERN_TILE
#undef SSLKERN_TILE_CHOICES

// The same in plain C++, for what has no library to turn to.
template <class T>
void portable_tile(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t depth, T* out, int64_t ld, bool add) {
  T sum[kTile][kTile] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = 0; r < kTile; ++r)
      for (int64_t c = 0; c < kTile; ++c) sum[r][c] += a[r * a_row + k * a_k] * b[k * kTile + c];
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t c = 0; c < kTile; ++c) out[r * ld + c] = (add ? out[r * ld + c] : T(0)) + sum[r][c];
}

template <class T>
auto tile_product() {
  const auto chosen = tiles<T>().product;
  return chosen != nullptr ? chosen : portable_tile<T>;
}

// A matrix in memory: element (i, k) at data[i * row + k * col].
template <class T>
struct Strided {
  const T* data;
  int64_t row, col;
};

// `count` rows (or columns) of `depth` numbers side by side, 16 to a step, zeros where there are fewer than 16.
template <class T>
void pack(const T* from, int64_t across, int64_t along, int64_t count, int64_t depth, T* to) {
  if (count < kTile) std::fill_n(to, kTile * depth, T(0));
  if (across == 1) {
    for (int64_t k = 0; k < depth; ++k) std::copy_n(from + k * along, count, to + k * kTile);
  } else {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < depth; ++k) to[k * kTile + r] = from[r * across + k * along];
  }
}

// Numbers that `multiply` packs.
inline int64_t packed_size(int64_t cols, int64_t depth) {
  return (ceil_div(cols, kTile) + 1) * kTile * depth;
}

// out (rows, cols) = or += a b, a (rows, depth), b (depth, cols); with `lower` only the tiles that reach the diagonal
// or below it. `room` holds packed_size(cols, depth) numbers.
template <class T>
void multiply(const Strided<T>& a, const Strided<T>& b, int64_t rows, int64_t cols, int64_t depth, T* out, int64_t ld,
              bool lower, bool add, T* room) {
  const auto product = tile_product<T>();
  const int64_t full = rows / kTile * kTile, panel = kTile * depth;
  T *packed_a = room, *packed_b = room + panel;
  if (b.col == 1 && b.row == kTile && cols == kTile) {
    packed_b = const_cast<T*>(b.data);
  } else {
    for (int64_t j = 0; j < cols; j += kTile)
      pack(b.data + j * b.col, b.col, b.row, std::min(kTile, cols - j), depth, packed_b + j * depth);
  }
  if (full < rows) pack(a.data + full * a.row, a.row, a.col, rows - full, depth, packed_a);
  for (int64_t i = 0; i < rows; i += kTile) {
    const bool edge = i == full;
    const T* x = edge ? packed_a : a.data + i * a.row;
    const int64_t a_row = edge ? 1 : a.row, a_k = edge ? kTile : a.col;
    for (int64_t j = 0; j < (lower ? std::min(i + 1, cols) : cols); j += kTile) {
      T* to = out + i * ld + j;
      if (!edge && j + kTile <= cols) {
        product(x, a_row, a_k, packed_b + j * depth, depth, to, ld, add);
        continue;
      }
      T corner[kTile * kTile];
      product(x, a_row, a_k, packed_b + j * depth, depth, corner, kTile, false);
      for (int64_t r = 0; r < std::min(kTile, rows - i); ++r)
        for (int64_t c = 0; c < std::min(kTile, cols - j); ++c)
          to[r * ld + c] = (add ? to[r * ld + c] : T(0)) + corner[r * kTile + c];
    }
  }
}

}  // namespace sslkern
