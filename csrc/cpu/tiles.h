// Small products by 16 x 16 tiles in registers. Where one side is short, a vendor library spends its time on calls,
// packing and allocation. Serial: callers run many products in parallel.
#pragma once

#include "../loops.h"

namespace sslkern {

constexpr int64_t kTile = 16;

// Whether SSLKERN_CPU_GEMM is `name`. "avx2" disables AVX-512 tiles; "mm" and "onednn" give every product to that
// library.
bool asked(const char* name);

// Memory that is needed soon: the first `rows` rows of `count` matrices with row stride ld, a line of each.
constexpr int64_t kLines = 8;
template <class T>
struct Lines {
  const T* at[kLines] = {};
  int64_t count = 0, ld = 0, rows = 0;
};

// out (16, 16 P) = or += sum_k a[r * a_row + k * a_k] b[16 k + c], for P panels of b that are b_panel apart.
template <class T>
using Tile = void (*)(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_panel, int64_t depth, T* out,
                      int64_t ld, bool add, const Lines<T>& ahead);

// The tiles of one instruction set. `one` is null if only a vendor library will do; `two` is null if it gains nothing.
// Only `ahead` asks for the lines of its last argument.
template <class T>
struct Tiles {
  const char* name;
  Tile<T> one, two, ahead;
};

// The tiles of this processor.
template <class T>
const Tiles<T>& tiles();

// A tile in plain C++, for code that has no vendor library to fall back to.
template <class T>
void portable_tile(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t, int64_t depth, T* out, int64_t ld,
                   bool add, const Lines<T>&);

// Products by the tiles of this processor, or by the portable tile.
template <class T>
class TileProduct {
 public:
  TileProduct()
      : one_(tiles<T>().one != nullptr ? tiles<T>().one : portable_tile<T>),
        two_(tiles<T>().two),
        ahead_(tiles<T>().ahead != nullptr ? tiles<T>().ahead : portable_tile<T>) {}

  void operator()(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t depth, T* out, int64_t ld,
                  bool add) const {
    one_(a, a_row, a_k, b, 0, depth, out, ld, add, {});
  }

  // The same; lines that are needed soon arrive meanwhile.
  void operator()(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t depth, T* out, int64_t ld, bool add,
                  const Lines<T>& ahead) const {
    ahead_(a, a_row, a_k, b, 0, depth, out, ld, add, ahead);
  }

  // The same for one or two panels of b.
  void operator()(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_panel, int64_t panels, int64_t depth,
                  T* out, int64_t ld, bool add) const {
    if (panels == 2 && two_ != nullptr) return two_(a, a_row, a_k, b, b_panel, depth, out, ld, add, {});
    for (int64_t t = 0; t < panels; ++t) one_(a, a_row, a_k, b + t * b_panel, 0, depth, out + t * kTile, ld, add, {});
  }

 private:
  const Tile<T> one_, two_, ahead_;
};

// A matrix in memory: element (i, k) at data[i * row + k * col].
template <class T>
struct Strided {
  const T* data;
  int64_t row, col;
};

// Packs `count` rows (or columns) of `depth` elements, 16 per step, padded with zeros.
template <class T>
void pack(const T* from, int64_t across, int64_t along, int64_t count, int64_t depth, T* to);

// Elements of the scratch memory of `multiply`.
inline int64_t packed_size(int64_t cols, int64_t depth) {
  return (ceil_div(cols, kTile) + 1) * kTile * depth;
}

// out (rows, cols) = or += a b, for a (rows, depth) and b (depth, cols). With `lower`, only the tiles that reach the
// diagonal or lie below it. `room` holds packed_size(cols, depth) elements.
template <class T>
void multiply(const Strided<T>& a, const Strided<T>& b, int64_t rows, int64_t cols, int64_t depth, T* out, int64_t ld,
              bool lower, bool add, T* room);

}  // namespace sslkern
