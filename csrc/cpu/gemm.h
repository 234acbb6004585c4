// Matrix products by the vendor library, through torch's dispatcher.
#pragma once

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>

#include "../common.h"

namespace sslkern {

inline Tensor onednn_linear(const Tensor& x, const Tensor& w) {
  using torch::stable::detail::from;
  StableIValue stack[6] = {from(x),
                           from(w),
                           from(std::optional<Tensor>()),
                           from(std::string("none")),
                           from(std::vector<double>{}),
                           from(std::optional<std::string>(std::string()))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// `.out`, because autocast rewrites plain `mm` to bf16 and leaves this overload alone.
inline Tensor aten_mm(const Tensor& x, const Tensor& y) {
  using torch::stable::detail::from;
  Tensor out = fresh(x, {x.size(0), y.size(1)}, x.scalar_type());
  StableIValue stack[3] = {from(x), from(y), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline bool is_amd() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// On AMD, oneDNN runs fp32 at twice the rate of the MKL behind torch.mm (470 against 200 GF/s on 2 cores). Chosen by
// vendor, never by timing. SSLKERN_CPU_GEMM=mm or =onednn overrides it.
inline bool use_onednn() {
  static const bool chosen = [] {
    const char* asked = std::getenv("SSLKERN_CPU_GEMM");
    if (asked != nullptr && std::strcmp(asked, "mm") == 0) return false;
    if (!is_amd() && (asked == nullptr || std::strcmp(asked, "onednn") != 0)) return false;
    try {  // a private operator of torch: absent, it leaves us with mm
      const auto cpu = torch::stable::Device(torch::headeronly::DeviceType::CPU);
      Tensor one = stable::empty({1, 1}, ScalarType::Float, std::nullopt, cpu);
      *data<float>(one) = 1.f;
      return *data<float>(onednn_linear(one, one)) == 1.f;
    } catch (...) {
      return false;
    }
  }();
  return chosen;
}

// Up to so many columns, MKL's product of tall blocks is the faster one: 5 against 10 ms at (1000000, 16).
constexpr int64_t kThin = 64;

template <class T>
bool takes_onednn() {
  return std::is_same_v<T, float> && use_onednn();
}

inline Tensor transposed(const Tensor& t) {
  return stable::transpose(const_cast<Tensor&>(t), 0, 1);
}

inline Tensor row_range(const Tensor& t, int64_t begin, int64_t end) {
  if (begin == 0 && end == t.size(0)) return t;  // a call into the dispatcher costs 2 us
  return stable::narrow(const_cast<Tensor&>(t), 0, begin, end - begin);
}

// x w' in a new tensor. With oneDNN both may be whole transposed views, never narrowed ones: it takes seconds over
// those.
inline Tensor matmul_nt(const Tensor& x, const Tensor& w, bool onednn) {
  return onednn ? onednn_linear(x, w) : aten_mm(x, transposed(w));
}

// Rows per panel of a symmetric product: 4 panels are best at 256 rows, 8 from 512 on; below, one product.
inline int64_t panel_rows(int64_t n) {
  const int64_t panels = n < 192 ? 1 : n < 512 ? 4 : 8;
  return ceil_div(ceil_div(n, panels), 8) * 8;
}

// gram (m, m) = or += x y', by row panels; with y = x only its lower triangle. x and y are (m, k), contiguous or, for
// mm, transposed.
template <class T>
void add_product(const Tensor& x, const Tensor& y, T* gram, bool symmetric, bool first, bool onednn) {
  const int64_t m = x.size(0), step = panel_rows(m);
  for (int64_t i0 = 0; i0 < m; i0 += step) {
    const int64_t i1 = std::min(m, i0 + step), cols = symmetric ? i1 : m;
    const Tensor panel = matmul_nt(row_range(x, i0, i1), row_range(y, 0, cols), onednn);
    const T* from = data<T>(panel);
    stable::parallel_for(i0, i1, ceil_div(16384, cols), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* p = from + (i - i0) * cols;
        T* g = gram + i * m;
        if (first) {
          std::copy_n(p, cols, g);
        } else {
          for (int64_t j = 0; j < cols; ++j) g[j] += p[j];
        }
      }
    });
  }
}

template <class T>
void add_gram(const Tensor& x, T* gram, bool first, bool onednn) {
  add_product(x, x, gram, true, first, onednn);
}

// Scales gram, mirrors its lower triangle, zeroes the diagonal if asked, and returns <gram, other>, the sum of squares
// if `other` is gram itself.
template <class T>
double finish_gram(T* gram, const T* other, int64_t m, T scale, bool zero_diagonal) {
  constexpr int64_t strip = 32;
  const int64_t strips = ceil_div(m, strip);
  std::vector<double> partial(strips);
  auto finish_strip = [&](int64_t s) {
    double total = 0;
    const int64_t i0 = s * strip, i1 = std::min(m, i0 + strip);
    for (int64_t j0 = 0; j0 < i1; j0 += strip) {
      for (int64_t i = i0; i < i1; ++i) {
        T sum = 0;
        T* row = gram + i * m;
        const T* with = other + i * m;
        const int64_t j1 = std::min(j0 + strip, i);
        for (int64_t j = j0; j < j1; ++j) row[j] *= scale;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = j0; j < j1; ++j) sum += row[j] * with[j];
        for (int64_t j = j0; j < j1; ++j) gram[j * m + i] = row[j];
        total += 2. * sum;
      }
    }
    for (int64_t i = i0; i < i1; ++i) {
      T& diagonal = gram[i * m + i];
      diagonal = zero_diagonal ? diagonal * 0 : diagonal * scale;  // NaN stays NaN
      total += static_cast<double>(diagonal) * other[i * m + i];
    }
    partial[s] = total;
  };
  // a short strip with a long one, so that equal shares of pairs are equal shares of work
  const int64_t pairs = ceil_div(strips, 2);
  stable::parallel_for(0, pairs, ceil_div(16, pairs), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      finish_strip(p);
      if (strips - 1 - p != p) finish_strip(strips - 1 - p);
    }
  });
  double total = 0;
  for (double x : partial) total += x;
  return total;
}

}  // namespace sslkern
