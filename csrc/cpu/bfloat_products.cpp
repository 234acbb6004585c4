// Products of bf16 matrices by AVX512-BF16: packing, and tiles of 8 x 32 sums in registers.
#include "bfloat_products.h"

#include "tiles.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SSLKERN_BFLOAT __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#include <immintrin.h>
#endif

namespace sslkern {
namespace {

constexpr int64_t kRows = 8, kCols = 32;
constexpr int64_t kDepth = 128;     // pairs in a step: two panels of b are 16 KB, and stay in L1
constexpr int64_t kLeft = 1 << 16;  // pairs of a that stay in L2 for all of b: 256 KB

#ifdef SSLKERN_BFLOAT
// out (8, 32) = or += a b', for half a panel of a and two panels of b.
SSLKERN_BFLOAT void tile(const uint32_t* a, const uint32_t* b, int64_t panel, int64_t pairs, float* out, int64_t ld,
                         bool add) {
  __m512 sum[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, a += BfloatPanels::kPanel, b += BfloatPanels::kPanel) {
    const __m512bh left = (__m512bh)_mm512_loadu_si512(b), right = (__m512bh)_mm512_loadu_si512(b + panel);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r]));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], both, left);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], both, right);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      float* to = out + r * ld + c * BfloatPanels::kPanel;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][c]) : sum[r][c]);
    }
}

bool finds_bfloat() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}
#else
bool finds_bfloat() {
  return false;
}
#endif

// The same in plain C++, which is slow.
void portable_pairs(const uint32_t* a, const uint32_t* b, int64_t panel, int64_t pairs, float* out, int64_t ld,
                    bool add) {
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < kCols; ++c) {
      const uint32_t *x = a + r, *y = b + c / BfloatPanels::kPanel * panel + c % BfloatPanels::kPanel;
      float sum = 0;
      for (int64_t k = 0; k < pairs * BfloatPanels::kPanel; k += BfloatPanels::kPanel)
        sum += float_of(x[k] << 16) * float_of(y[k] << 16) + float_of(x[k] & ~0xffffu) * float_of(y[k] & ~0xffffu);
      out[r * ld + c] = (add ? out[r * ld + c] : 0.f) + sum;
    }
}

using PairTile = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, float*, int64_t, bool);

PairTile tile_of_processor() {
#ifdef SSLKERN_BFLOAT
  if (finds_bfloat()) return tile;
#endif
  return portable_pairs;
}

// Packs a panel whose 16 lines are neighbours in memory.
SSLKERN_CLONES static void interleave(const BFloatBits* from, int64_t along, int64_t pairs, uint32_t* to) {
  for (int64_t k = 0; k < pairs; ++k, from += 2 * along, to += BfloatPanels::kPanel) {
#pragma omp simd
    for (int r = 0; r < BfloatPanels::kPanel; ++r)
      to[r] = from[r].bits | static_cast<uint32_t>(from[along + r].bits) << 16;
  }
}

// Packs one panel of `lines` lines.
void pack_panel(const BFloatBits* from, int64_t across, int64_t along, int64_t lines, int64_t depth, uint32_t* to) {
  const int64_t whole = depth / 2, pairs = ceil_div(depth, 2);
  if (lines < BfloatPanels::kPanel) std::fill_n(to, BfloatPanels::kPanel * pairs, 0u);
  if (across == 1 && lines == BfloatPanels::kPanel) {
    interleave(from, along, whole, to);
  } else {
    for (int64_t r = 0; r < lines; ++r) {
      const BFloatBits* line = from + r * across;
      for (int64_t k = 0; k < whole; ++k)
        to[k * BfloatPanels::kPanel + r] =
            line[2 * k * along].bits | static_cast<uint32_t>(line[(2 * k + 1) * along].bits) << 16;
    }
  }
  if (whole == pairs) return;
  std::fill_n(to + whole * BfloatPanels::kPanel, BfloatPanels::kPanel, 0u);
  for (int64_t r = 0; r < lines; ++r)
    to[whole * BfloatPanels::kPanel + r] = from[r * across + (depth - 1) * along].bits;
}

}  // namespace

bool has_bfloat_products() {
  static const bool has = asked("bf16") || (finds_bfloat() && !asked("avx2") && !asked("mm") && !asked("onednn"));
  return has;
}

std::string bfloat_products() {
  if (!has_bfloat_products()) return "";
  return finds_bfloat() ? "AVX512-BF16" : "plain C++";
}

void BfloatPanels::pack(const BFloatBits* from, int64_t across, int64_t along, int64_t begin, int64_t end,
                        int64_t depth) const {
  for (int64_t line = begin; line < end; line += kPanel)
    pack_panel(from + (line - begin) * across, across, along, std::min(kPanel, end - line), depth, at(line));
  for (int64_t line = round_up(end, kPanel); line < round_up(end, kLines); line += kPanel)
    std::fill_n(at(line), kPanel * pairs_, 0u);
}

void multiply(const BfloatPanels& a, int64_t i0, int64_t i1, const BfloatPanels& b, int64_t j0, int64_t j1, float* out,
              int64_t ld, bool lower, bool add) {
  static const PairTile tile = tile_of_processor();
  const int64_t pairs = a.pairs(), panel = BfloatPanels::kPanel * pairs;
  const int64_t chunk = std::max(kDepth, kLeft / (i1 - i0) / kDepth * kDepth);
  const auto one = [&](int64_t i, int64_t j, int64_t k, int64_t depth, bool more) {
    const int64_t first = i / BfloatPanels::kPanel * BfloatPanels::kPanel;
    const uint32_t* left = a.at(first) + k * BfloatPanels::kPanel + (i - first);
    const uint32_t* right = b.at(j) + k * BfloatPanels::kPanel;
    float* to = out + (i - i0) * ld + (j - j0);
    if (i + kRows <= i1 && j + kCols <= j1) return tile(left, right, panel, depth, to, ld, more);
    float corner[kRows * kCols];
    tile(left, right, panel, depth, corner, kCols, false);
    for (int64_t r = 0; r < std::min(kRows, i1 - i); ++r)
      for (int64_t c = 0; c < std::min(kCols, j1 - j); ++c)
        to[r * ld + c] = (more ? to[r * ld + c] : 0.f) + corner[r * kCols + c];
  };
  for (int64_t k0 = 0; k0 < pairs; k0 += chunk)
    for (int64_t j = j0; j < j1; j += kCols)
      for (int64_t k = k0; k < std::min(pairs, k0 + chunk); k += kDepth)
        for (int64_t i = lower ? i0 + (j - j0) : i0; i < i1; i += kRows)
          one(i, j, k, std::min(kDepth, pairs - k), add || k > 0);
}

}  // namespace sslkern
