// Conversions between fp32 and the 16-bit types. fp16 uses the F16C instructions where the processor has them.
#include "types.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace sslkern {
namespace {

template <class From, class To>
SSLKERN_INLINE void convert_body(const From* x, int64_t n, To* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (sizeof(From) < sizeof(To)) {
      out[j] = wide(x[j]);
    } else {
      out[j] = narrow<To>(x[j]);
    }
  }
}
SSLKERN_CLONES static void widen(const BFloatBits* x, int64_t n, float* out) {
  convert_body(x, n, out);
}
SSLKERN_CLONES static void narrow(const float* x, int64_t n, BFloatBits* out) {
  convert_body(x, n, out);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("f16c"))) void widen(const HalfBits* x, int64_t n, float* out) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + j))));
  for (; j < n; ++j) out[j] = _cvtsh_ss(x[j].bits);
}
__attribute__((target("f16c"))) void narrow(const float* x, int64_t n, HalfBits* out) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + j), _MM_FROUND_TO_NEAREST_INT));
  for (; j < n; ++j) out[j].bits = _cvtss_sh(x[j], _MM_FROUND_TO_NEAREST_INT);
}
// Reads cpuid, because older compilers do not know __builtin_cpu_supports("f16c").
bool finds_halves() {
  unsigned a, b, c = 0, d;
  return __builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool has_halves() {
  static const bool has = finds_halves();
  return has;
}
#else
void widen(const HalfBits* x, int64_t n, float* out) {
  convert_body(x, n, out);
}
void narrow(const float* x, int64_t n, HalfBits* out) {
  convert_body(x, n, out);
}
bool has_halves() {
  return false;
}
#endif

}  // namespace

void convert(const BFloatBits* x, int64_t n, float* out) {
  widen(x, n, out);
}
void convert(const HalfBits* x, int64_t n, float* out) {
  has_halves() ? widen(x, n, out) : convert_body(x, n, out);
}
void convert(const float* x, int64_t n, BFloatBits* out) {
  narrow(x, n, out);
}
void convert(const float* x, int64_t n, HalfBits* out) {
  has_halves() ? narrow(x, n, out) : convert_body(x, n, out);
}

}  // namespace sslkern
