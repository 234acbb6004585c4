// Tiles for each instruction set, and matrix products by them.
#include "tiles.h"

#include <cstdlib>
#include <cstring>

namespace sslkern {

bool asked(const char* name) {
  static const char* const value = std::getenv("SSLKERN_CPU_GEMM");
  return value != nullptr && std::strcmp(value, name) == 0;
}

// A tile keeps the sums of R rows in registers, in vectors of `Bytes`. There is one pointer for every four rows, hidden
// from the compiler, which would otherwise run out of registers for addresses. With two panels, each element of `a` is
// read half as often, which matters with 64-byte vectors, where loads cost as much as products. With `Ahead`, lines of
// `ahead` are asked for between the products: more than a few at once would make the core wait.
#define SSLKERN_TILE(name, arch, T, Bytes, R, P, Ahead)                                                              \
  __attribute__((unused, target("arch=" arch))) static void name(const T* a, int64_t a_row, int64_t a_k, const T* b, \
                                                                 int64_t b_panel, int64_t depth, T* out, int64_t ld, \
                                                                 bool add, [[maybe_unused]] const Lines<T>& ahead) { \
    typedef T V __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));                                  \
    constexpr int W = Bytes / sizeof(T), C = kTile / W, Q = (R + 3) / 4, Parts = Ahead ? R : 1;                      \
    for (int r0 = 0; r0 < kTile; r0 += R, a += R * a_row, out += R * ld) {                                           \
      V acc[R][P * C] = {};                                                                                          \
      const T *x[Q], *y = b;                                                                                         \
      for (int q = 0; q < Q; ++q) {                                                                                  \
        x[q] = a + 4 * q * a_row;                                                                                    \
        __asm__("" : "+r"(x[q]));                                                                                    \
      }                                                                                                              \
      for (int part = 0; part < Parts; ++part) {                                                                     \
        if (Ahead && r0 + part < ahead.rows)                                                                         \
          for (int s = 0; s < ahead.count; ++s) __builtin_prefetch(ahead.at[s] + (r0 + part) * ahead.ld, 1, 2);      \
        for (int64_t k = depth * part / Parts; k < depth * (part + 1) / Parts; ++k, y += kTile) {                    \
          V right[P * C];                                                                                            \
          _Pragma("GCC unroll 16") for (int c = 0; c < P * C; ++c) right[c] =                                        \
              *reinterpret_cast<const V*>(y + c / C * b_panel + c % C * W);                                          \
          _Pragma("GCC unroll 16") for (int r = 0; r < R; ++r) {                                                     \
            const T s = x[r / 4][r % 4 * a_row];                                                                     \
            _Pragma("GCC unroll 16") for (int c = 0; c < P * C; ++c) acc[r][c] += s * right[c];                      \
          }                                                                                                          \
          for (int q = 0; q < Q; ++q) x[q] += a_k;                                                                   \
        }                                                                                                            \
      }                                                                                                              \
      _Pragma("GCC unroll 16") for (int r = 0; r < R; ++r) {                                                         \
        _Pragma("GCC unroll 16") for (int c = 0; c < P * C; ++c) {                                                   \
          V* to = reinterpret_cast<V*>(out + r * ld + W * c);                                                        \
          *to = add ? *to + acc[r][c] : acc[r][c];                                                                   \
        }                                                                                                            \
      }                                                                                                              \
    }                                                                                                                \
  }

// target_clones would not work: GCC lowers wide vectors before it makes the clones, for the weakest target.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
SSLKERN_TILE(tile_avx512, "skylake-avx512", float, 64, 16, 1, false)
SSLKERN_TILE(ahead_avx512, "skylake-avx512", float, 64, 16, 1, true)
SSLKERN_TILE(wide_avx512, "skylake-avx512", float, 64, 8, 2, false)
SSLKERN_TILE(tile_avx512, "skylake-avx512", double, 64, 8, 1, false)
SSLKERN_TILE(ahead_avx512, "skylake-avx512", double, 64, 8, 1, true)
SSLKERN_TILE(tile_avx2, "haswell", float, 32, 4, 1, false)
SSLKERN_TILE(ahead_avx2, "haswell", float, 32, 4, 1, true)
SSLKERN_TILE(tile_avx2, "haswell", double, 32, 2, 1, false)
SSLKERN_TILE(ahead_avx2, "haswell", double, 32, 2, 1, true)

template <class T>
Tiles<T> tiles_of_processor() {
  Tile<T> wide = nullptr;
  if constexpr (sizeof(T) == 4) wide = wide_avx512;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && !asked("avx2"))
    return {"AVX-512", tile_avx512, wide, ahead_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"AVX2", tile_avx2, nullptr, ahead_avx2};
  return {"", nullptr, nullptr, nullptr};
}
#else
template <class T>
Tiles<T> tiles_of_processor() {
  return {"", nullptr, nullptr, nullptr};
}
#endif
#undef SSLKERN_TILE

template <class T>
const Tiles<T>& tiles() {
  static const Tiles<T> chosen =
      asked("mm") || asked("onednn") ? Tiles<T>{"", nullptr, nullptr, nullptr} : tiles_of_processor<T>();
  return chosen;
}

template <class T>
void portable_tile(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t, int64_t depth, T* out, int64_t ld,
                   bool add, const Lines<T>&) {
  T sum[kTile][kTile] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = 0; r < kTile; ++r)
      for (int64_t c = 0; c < kTile; ++c) sum[r][c] += a[r * a_row + k * a_k] * b[k * kTile + c];
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t c = 0; c < kTile; ++c) out[r * ld + c] = (add ? out[r * ld + c] : T(0)) + sum[r][c];
}

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

template <class T>
void multiply(const Strided<T>& a, const Strided<T>& b, int64_t rows, int64_t cols, int64_t depth, T* out, int64_t ld,
              bool lower, bool add, T* room) {
  const TileProduct<T> product;
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
    const int64_t end = lower ? std::min(i + 1, cols) : cols;
    for (int64_t j = 0; j < end; j += kTile) {
      T* to = out + i * ld + j;
      if (!edge && j + kTile <= cols) {
        const int64_t panels = j + kTile < end && j + 2 * kTile <= cols ? 2 : 1;
        product(x, a_row, a_k, packed_b + j * depth, kTile * depth, panels, depth, to, ld, add);
        j += (panels - 1) * kTile;
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

template const Tiles<float>& tiles<float>();
template void portable_tile<float>(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t,
                                   bool, const Lines<float>&);
template void pack<float>(const float*, int64_t, int64_t, int64_t, int64_t, float*);
template void multiply<float>(const Strided<float>&, const Strided<float>&, int64_t, int64_t, int64_t, float*, int64_t,
                              bool, bool, float*);
template const Tiles<double>& tiles<double>();
template void portable_tile<double>(const double*, int64_t, int64_t, const double*, int64_t, int64_t, double*, int64_t,
                                    bool, const Lines<double>&);
template void pack<double>(const double*, int64_t, int64_t, int64_t, int64_t, double*);
template void multiply<double>(const Strided<double>&, const Strided<double>&, int64_t, int64_t, int64_t, double*,
                               int64_t, bool, bool, double*);

}  // namespace sslkern
