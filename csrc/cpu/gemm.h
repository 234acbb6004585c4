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

inline bool takes_onednn(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float && use_onednn();
}

inline Tensor transposed(const Tensor& t) {
  return stable::transpose(const_cast<Tensor&>(t), 0, 1);
}

inline Tensor row_range(const Tensor& t, int64_t begin, int64_t end) {
  return stable::narrow(const_cast<Tensor&>(t), 0, begin, end - begin);
}

// x w' in a new tensor. Both may be whole transposed views, never a narrowed one: oneDNN takes seconds over those.
inline Tensor matmul_nt(const Tensor& x, const Tensor& w) {
  return takes_onednn(x) ? onednn_linear(x, w) : aten_mm(x, transposed(w));
}

// Rows per panel of a symmetric product: 4 panels are best at 256 rows, 8 from 512 on; below, one product.
inline int64_t panel_rows(int64_t n) {
  const int64_t panels = n < 192 ? 1 : n < 512 ? 4 : 8;
  return ceil_div(ceil_div(n, panels), 8) * 8;
}

}  // namespace sslkern
