// Operators for rank-k updates of CUDA tensors.
#include "bindings.h"
#include "rank_k_update.cuh"

namespace sslkern::cuda {
namespace {

// Bytes of shared memory that a block may use.
size_t shared_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "rank_k_update_");
  return bytes;
}

template <class T>
void run(const Tensor& u, const Tensor& a, const Tensor& b, int64_t retraction, bool pairs) {
  const int64_t parts = pairs ? 2 : 1, stack = stack_size(u);
  const Problem<T> q{static_cast<T*>(u.mutable_data_ptr()),
                     data<T>(a),
                     data<T>(b),
                     u.size(-2),
                     static_cast<int>(u.size(-1) * parts),
                     static_cast<int>(a.size(-1) * parts),
                     pairs,
                     static_cast<int>(retraction)};
  const size_t limit = shared_limit(u.get_device_index());
  const UpdatePlan p = plan_for(q, stack, limit);
  STD_TORCH_CHECK(std::max(p.gather, p.update) <= limit, "a and b have too many columns, ", a.size(-1),
                  ", for the shared memory of this GPU: take fewer at a time, or sslkern.backend.use('reference')");
  const Tensor memory = stable::new_empty(u, {workspace_bytes(q, p)}, ScalarType::Byte);
  check(rank_k_update(q, stack, p, memory.mutable_data_ptr(), current_stream(u)), "rank_k_update_");
}

void rank_k_update_(Tensor u, const Tensor a, const Tensor b, int64_t retraction) {
  check_cuda(u, "u");
  const stable::accelerator::DeviceGuard guard(u.get_device_index());
  switch (u.scalar_type()) {
    case ScalarType::Float: return run<float>(u, a, b, retraction, false);
    case ScalarType::Double: return run<double>(u, a, b, retraction, false);
    case ScalarType::ComplexFloat: return run<float>(u, a, b, retraction, true);
    default: return run<double>(u, a, b, retraction, true);
  }
}

}  // namespace
}  // namespace sslkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CUDA, m) {
  m.impl("rank_k_update_", TORCH_BOX(&sslkern::cuda::rank_k_update_));
}
