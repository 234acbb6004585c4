// Matrix products by the library that is fastest on the processor.
#include "gemm.h"

namespace sslkern {
namespace {

// x w' for matrices that are contiguous, or transposes of such.
Tensor matrix_product(const Tensor x, const Tensor w) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.numel() > 0 && w.numel() > 0, "two matrices with numbers");
  STD_TORCH_CHECK(x.size(1) == w.size(1), "the sides that are summed over must be the same");
  return matmul_nt(x, w, !is_double(x) && use_onednn());
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("matrix_product", TORCH_BOX(&sslkern::matrix_product));
}
