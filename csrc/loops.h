// Macros and integer helpers for loops. Includes no torch headers, because they take longer to parse than some files
// take to compile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

// Compiles a function for three instruction sets; the loader picks one. Works for `static`, non-template functions
// only. The targets are levels or features, because a clone for arch=haswell would run on that Intel processor only.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SSLKERN_CLONES __attribute__((unused, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SSLKERN_CLONES __attribute__((unused, target_clones("avx512f", "avx2", "default")))
#endif
#else
#define SSLKERN_CLONES [[maybe_unused]]
#endif
#define SSLKERN_INLINE inline __attribute__((always_inline))
#define SSLKERN_LAMBDA __attribute__((always_inline))

namespace sslkern {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t x, int64_t to) {
  return ceil_div(x, to) * to;
}

}  // namespace sslkern
