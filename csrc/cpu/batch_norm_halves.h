// Loops of batch norm over fp16. A few rows at a time are converted to fp32 in a buffer that stays in L1, because the
// conversions are separate instructions. Conversions of bf16 are so short that they are part of the loops.
#pragma once

#include "batch_norm.h"

namespace sslkern {

constexpr int64_t kStaged = 4096;  // elements converted at a time
static_assert(kStaged >= kPiece && kStaged >= kBlockCols, "a row of a piece must fit");

// Calls f(i, some) for rows [i, i + some) of a piece. Where it fits, `some` is a multiple of `kAtOnce`, so the sums are
// grouped as without conversion.
template <class F>
void for_staged(int64_t rows, int64_t cols, const F& f) {
  const int64_t fit = kStaged / cols, step = fit < kAtOnce ? 1 : fit / kAtOnce * kAtOnce;
  for (int64_t i = 0; i < rows; i += step) f(i, std::min(step, rows - i));
}

inline void add_powers(const HalfBits* x, int64_t ld, int64_t rows, int64_t cols, const float* pivot, float* sum,
                       float* square) {
  float wide_x[kStaged];
  for_staged(rows, cols, [&](int64_t i, int64_t some) {
    convert_rows(x + i * ld, ld, some, cols, wide_x, cols);
    add_powers(wide_x, cols, some, cols, pivot, sum, square);
  });
}

inline void add_squares(const HalfBits* x, int64_t ld, int64_t rows, int64_t cols, const float* pivot,
                        const float* shift, float* square) {
  float wide_x[kStaged];
  for_staged(rows, cols, [&](int64_t i, int64_t some) {
    convert_rows(x + i * ld, ld, some, cols, wide_x, cols);
    add_squares(wide_x, cols, some, cols, pivot, shift, square);
  });
}

inline void add_gradients(const HalfBits* dy, const HalfBits* x, int64_t ld, int64_t rows, int64_t cols,
                          const Affine<float>& f, float* sum, float* dot) {
  float wide_dy[kStaged], wide_x[kStaged];
  for_staged(rows, cols, [&](int64_t i, int64_t some) {
    convert_rows(dy + i * ld, ld, some, cols, wide_dy, cols);
    convert_rows(x + i * ld, ld, some, cols, wide_x, cols);
    add_gradients(wide_dy, wide_x, cols, some, cols, f, sum, dot);
  });
}

inline void plane_powers(const HalfBits* x, int64_t n, float pivot, float& sum, float& square) {
  float wide_x[kStaged];
  convert(x, n, wide_x);
  plane_powers(wide_x, n, pivot, sum, square);
}

inline void plane_gradients(const HalfBits* dy, const HalfBits* x, int64_t n, float mean, float scale, float bias,
                            bool relu, double& sum, double& dot) {
  float wide_dy[kStaged], wide_x[kStaged];
  convert(dy, n, wide_dy);
  convert(x, n, wide_x);
  plane_gradients(wide_dy, wide_x, n, mean, scale, bias, relu, sum, dot);
}

inline void affine(const HalfBits* x, int64_t ld, int64_t rows, int64_t cols, bool runs, const Affine<float>& f,
                   HalfBits* out) {
  float wide_x[kStaged];
  for_staged(rows, cols, [&](int64_t i, int64_t some) {
    const int64_t c = runs ? i : 0;
    convert_rows(x + i * ld, ld, some, cols, wide_x, cols);
    affine(wide_x, cols, some, cols, runs, {f.mean + c, f.scale + c, f.bias + c, f.relu}, wide_x);
    convert_rows(wide_x, cols, some, cols, out + i * ld, ld);
  });
}

inline void write_input_gradient(const HalfBits* dy, const HalfBits* x, int64_t ld, int64_t rows, int64_t cols,
                                 bool runs, const Affine<float>& f, const float* slope, const float* offset,
                                 HalfBits* out) {
  float wide_dy[kStaged], wide_x[kStaged];
  for_staged(rows, cols, [&](int64_t i, int64_t some) {
    const int64_t c = runs ? i : 0;
    convert_rows(dy + i * ld, ld, some, cols, wide_dy, cols);
    convert_rows(x + i * ld, ld, some, cols, wide_x, cols);
    write_input_gradient(wide_dy, wide_x, cols, some, cols, runs, {f.mean + c, f.scale + c, f.bias + c, f.relu},
                         slope + c, offset + c, wide_dy);
    convert_rows(wide_dy, cols, some, cols, out + i * ld, ld);
  });
}

}  // namespace sslkern
