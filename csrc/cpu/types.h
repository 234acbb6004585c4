// Storage and arithmetic types: fp64, fp32, and two 16-bit types that are converted in vectors.
#pragma once

#include "../loops.h"

namespace sslkern {

// Conversions between fp32 and the 16-bit types by bit arithmetic, without branches, so that the compiler vectorises
// them.
SSLKERN_INLINE uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
SSLKERN_INLINE float float_of(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

// fp16 to fp32. A half below 2^-14 has no leading one; a subtraction normalises it. Infinity and NaN keep the largest
// exponent.
SSLKERN_INLINE float widen_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
  const uint32_t small = bits_of(float_of(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t usual = magnitude + (magnitude >= 31u << 23 ? 224u << 23 : 112u << 23);
  return float_of(sign | (magnitude < 1u << 23 ? small : usual));
}

// fp32 to fp16, to nearest even. Below 2^-14 a half has steps of 2^-24, as fp32 has at 0.5.
SSLKERN_INLINE uint16_t narrow_half(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t small = bits_of(float_of(magnitude) + .5f) - bits_of(.5f);
  const uint32_t usual = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  const uint32_t finite = magnitude < 113u << 23 ? small : usual < 0x7c00u ? usual : 0x7c00u;
  return static_cast<uint16_t>(sign | (magnitude > 255u << 23 ? 0x7e00u : finite));
}

SSLKERN_INLINE uint16_t narrow_bfloat(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t nearest = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 255u << 23 ? 0x7fc0u : nearest);
}

// The 16-bit types in loops: aggregates, whose operations inline into vector code.
struct BFloatBits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

SSLKERN_INLINE double wide(double x) {
  return x;
}
SSLKERN_INLINE float wide(float x) {
  return x;
}
SSLKERN_INLINE float wide(BFloatBits x) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}
SSLKERN_INLINE float wide(HalfBits x) {
  return widen_half(x.bits);
}

// The type of arithmetic on values stored as S.
template <class S>
using Wide = decltype(wide(S{}));

template <class S>
SSLKERN_INLINE S narrow(Wide<S> x) {
  if constexpr (std::is_same_v<S, BFloatBits>) return {narrow_bfloat(x)};
  if constexpr (std::is_same_v<S, HalfBits>) return {narrow_half(x)};
  if constexpr (std::is_same_v<S, Wide<S>>) return x;
}

// Converts `n` elements. The 16-bit versions are compiled once, in types.cpp.
void convert(const BFloatBits* x, int64_t n, float* out);
void convert(const HalfBits* x, int64_t n, float* out);
void convert(const float* x, int64_t n, BFloatBits* out);
void convert(const float* x, int64_t n, HalfBits* out);
template <class From, class To>
void convert(const From* x, int64_t n, To* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<To>(wide(x[j]));
}

// The same for rows with strides ld and out_ld.
template <class From, class To>
void convert_rows(const From* x, int64_t ld, int64_t rows, int64_t cols, To* out, int64_t out_ld) {
  if (rows == 1 || (ld == cols && out_ld == cols)) return convert(x, rows * cols, out);
  for (int64_t i = 0; i < rows; ++i) convert(x + i * ld, cols, out + i * out_ld);
}

}  // namespace sslkern
