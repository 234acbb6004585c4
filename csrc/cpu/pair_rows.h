// The rows of one side of a pairwise matrix, packed for tiles, and sums that belong to these rows.
#pragma once

#include "../common.h"
#include "column_loops.h"
#include "exponents.h"
#include "tiles.h"

namespace sslkern {

// Kernels index contiguous memory; other layouts are copied first.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : stable::contiguous(t);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t.has_value() ? std::make_optional(dense(*t)) : std::nullopt;
}

// Rows of a matrix (n, d), packed for tiles.
template <class T>
struct Rows {
  const T* x;
  int64_t n, d, padded, panels;
  const Tensor across_memory, along_memory;
  T* const across;  // (n / 16, d, 16): groups of 16 rows, column by column
  T* const along;   // (d / 16, n, 16): groups of 16 columns, row by row
  std::vector<T> squares;

  Rows(const Tensor& like, const T* x, int64_t n, int64_t d, bool for_products, bool for_sums, bool with_squares)
      : x(x),
        n(n),
        d(d),
        padded(round_up(n, kTile)),
        panels(ceil_div(d, kTile)),
        across_memory(fresh(like, {for_products ? padded * d : 0}, dtype_of<T>())),
        along_memory(fresh(like, {for_sums ? panels * kTile * n : 0}, dtype_of<T>())),
        across(data<T>(across_memory)),
        along(data<T>(along_memory)) {
    if (for_products) {
      in_parallel(padded / kTile, kTile * d, [&](int64_t first, int64_t last) {
        for (int64_t g = first; g < last; ++g)
          pack(x + g * kTile * d, d, 1, std::min(kTile, n - g * kTile), d, across + g * kTile * d);
      });
    }
    if (for_sums) {
      in_parallel(panels, kTile * n, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
          pack(x + t * kTile, 1, d, std::min(kTile, d - t * kTile), n, along + t * kTile * n);
      });
    }
    if (!with_squares) return;
    squares.resize(padded);
    for (int64_t i = 0; i < n; ++i) squares[i] = dot_row(x + i * d, x + i * d, d);
  }

  // The largest norm of a row; NaN if a row has a NaN.
  T largest_norm() const {
    T most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T square = dot_row(x + i * d, x + i * d, d);
      if (!(square <= most)) most = square;
      if (std::isnan(most)) break;
    }
    return std::sqrt(most);
  }
};

// Sums over pairs, accumulated per row of a side: (padded, panels * 16) elements, and one weight per row.
template <class T>
struct RowSums {
  int64_t ld;
  const Tensor memory;
  T* const sums;
  std::vector<double> weights;

  RowSums(const Tensor& like, int64_t padded, int64_t d)
      : ld(round_up(d, kTile)),
        memory(fresh(like, {padded * ld}, dtype_of<T>())),
        sums(data<T>(memory)),
        weights(padded) {
    in_parallel(padded, ld, [&](int64_t first, int64_t last) { std::fill(sums + first * ld, sums + last * ld, T(0)); });
  }
};

}  // namespace sslkern
