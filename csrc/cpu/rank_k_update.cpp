// Rank-k updates of orthogonal and unitary matrices on the CPU.
#include "rank_k_update.h"

namespace sslkern {
namespace {

template <class T>
void update_all(const Tensor& u, const Tensor& a, const Tensor& b, int64_t retraction, bool complex) {
  const int64_t count = stack_size(u), n = u.size(-2), p = u.size(-1), k = a.size(-1), parts = complex ? 2 : 1;
  const auto one = [&](int64_t s) {
    RankKUpdate<T>(static_cast<T*>(u.mutable_data_ptr()) + s * n * p * parts, data<T>(a) + s * n * k * parts,
                   data<T>(b) + s * p * k * parts, n, p, k, complex, retraction)
        .run();
  };
  if (count == 1 || n * p > 1 << 18) {
    for (int64_t s = 0; s < count; ++s) one(s);
    return;
  }
  in_parallel(count, 5 * n * p * k * parts * parts, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) one(s);
  });
}

void rank_k_update_(Tensor u, const Tensor a, const Tensor b, int64_t retraction) {
  switch (u.scalar_type()) {
    case ScalarType::Float: return update_all<float>(u, a, b, retraction, false);
    case ScalarType::Double: return update_all<double>(u, a, b, retraction, false);
    case ScalarType::ComplexFloat: return update_all<float>(u, a, b, retraction, true);
    default: return update_all<double>(u, a, b, retraction, true);
  }
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("rank_k_update_", TORCH_BOX(&sslkern::rank_k_update_));
}
