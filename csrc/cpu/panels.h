// Operands of products by tiles, packed in panels.
#pragma once

#include <vector>

#include "columns.h"
#include "tiles.h"

namespace sslkern {

constexpr int64_t kPacked = 128;   // columns that are packed at a time
constexpr int64_t kStretch = 256;  // rows of them

// A matrix (rows, columns) with any strides and dtype, in panels of 16 columns (rows, 16) that are padded with zeros.
template <class T>
class Panels {
 public:
  Panels(const Matrix& from, const Tensor& like)
      : from_(from), memory_(fresh(like, {padded() * from_.rows}, dtype_of<T>())) {}

  int64_t count() const {
    return ceil_div(from_.cols, kTile);
  }

  // Columns of all panels.
  int64_t padded() const {
    return count() * kTile;
  }

  // Panel t from row k on.
  T* at(int64_t t, int64_t k) const {
    return data<T>(memory_) + (t * from_.rows + k) * kTile;
  }

  // Writes some panels, a stretch of rows at a time.
  void write(int64_t first, int64_t last) const {
    if (from_.dtype == dtype_of<T>() && from_.row_stride == 1) {
      for (int64_t t = first; t < last; ++t)
        pack(reinterpret_cast<const T*>(from_.at(0, t * kTile)), from_.col_stride, 1,
             std::min(kTile, from_.cols - t * kTile), from_.rows, at(t, 0));
      return;
    }
    std::vector<T> scratch;
    int64_t ld = 0;
    for (int64_t t0 = first; t0 < last; t0 += kPacked / kTile) {
      const int64_t t1 = std::min(last, t0 + kPacked / kTile), j0 = t0 * kTile, j1 = std::min(from_.cols, t1 * kTile);
      for (int64_t k0 = 0; k0 < from_.rows; k0 += kStretch) {
        const int64_t k1 = std::min(from_.rows, k0 + kStretch);
        const T* x = tile(from_, k0, k1, j0, j1, scratch, ld);
        for (int64_t t = t0; t < t1; ++t)
          pack(x + (t - t0) * kTile, 1, ld, std::min(kTile, j1 - t * kTile), k1 - k0, at(t, k0));
      }
    }
  }

 private:
  const Matrix from_;
  const Tensor memory_;
};

}  // namespace sslkern
