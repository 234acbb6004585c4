// Rank-k updates of orthogonal and unitary matrices on a GPU, U += (U W C + a D) W' with W = [M b] and M = U'a. There
// are four steps. `project` sums up M. `gather` forms W and partial sums of K = W'W and A = a'a. `coefficients` solves
// for C and D. `update` updates panels of rows. Large matrices take three kernels of many blocks. Small ones, of which
// a stack may have hundreds, take one kernel with one block each. Both do the same work in the same order, so the bits
// agree.
//
// A complex matrix (n, p) is a real one (n, 2p), with pairs as elements. A real W with twice the columns, [[Re, Im],
// [-Im, Re]] per element, gives the same products. C and D belong to columns of a and b with equal norms; a and b
// themselves are not rescaled, so `scale` converts the products with W.
#pragma once

#include "panels.cuh"

namespace sslkern::cuda {

template <class T, int V, bool kWide>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    project_kernel(Problem<T> all, Cut c, Room<T> rooms) {
  const Problem<T> q = all.at(blockIdx.z);
  const Room<T> room = rooms.at(blockIdx.z);
  constexpr int K = kProjected<T, kWide>;
  const int across = (q.k + K - 1) / K;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *room.arrived = 0;  // a counter of the next kernel
  project<T, V, kWide>(q, c, blockIdx.x / across, blockIdx.y, blockIdx.x % across * K, room.partial);
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    gather_kernel(Problem<T> all, Cut c, Room<T> rooms, bool in_shared) {
  const Problem<T> q = all.at(blockIdx.z);
  const Room<T> room = rooms.at(blockIdx.z);
  gather(q, c, blockIdx.x, room);
  __threadfence();
  __syncthreads();
  int* const last = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) *last = atomicAdd(room.arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  const bool mine = *last;
  __syncthreads();
  if (!mine) return;
  __threadfence();
  coefficients(q, c, room, in_shared ? reinterpret_cast<double*>(shared_memory()) : room.small);
}

template <class T, int V, bool kWide, int R>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 && R == 2 ? 2 : 1)
    update_kernel(Problem<T> all, Cut c, Room<T> rooms) {
  update<T, V, kWide, R>(all.at(blockIdx.z), c, blockIdx.x, rooms.at(blockIdx.z));
}

// All steps of one matrix, in one block.
template <class T, int V, bool kWide>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    small_kernel(Problem<T> all, Cut c, Room<T> rooms, bool in_shared) {
  constexpr int K = kProjected<T, false>;
  const Problem<T> q = all.at(blockIdx.x);
  const Room<T> room = rooms.at(blockIdx.x);
  for (int split = 0; split < c.splits; ++split)
    for (int tile = 0; tile * 32 * V < q.p; ++tile)
      for (int k0 = 0; k0 < q.k; k0 += K) project<T, V, false>(q, c, tile, split, k0, room.partial);
  __syncthreads();
  for (int g = 0; g < c.gathers; ++g) gather(q, c, g, room);
  __syncthreads();
  coefficients(q, c, room, in_shared ? reinterpret_cast<double*>(shared_memory()) : room.small);
  for (int panel = 0; panel * Stage<T, kWide, 2>::kRows < q.n; panel += kWarps / c.team)
    update<T, V, kWide, 2>(q, c, panel, room);
}

// How a stack is processed.
struct UpdatePlan {
  Cut cut;
  bool vectors, small, tall, in_shared;  // 16-byte vectors; one block per matrix; panels of 32 rows; SmallMatrices
  int64_t together;                      // matrices per launch, each with a workspace
  size_t project, gather, update;        // bytes of shared memory per step
};

template <class T>
UpdatePlan plan_for(const Problem<T>& q, int64_t stack, size_t shared_limit, bool small, int64_t together) {
  UpdatePlan p{};
  p.cut = cut_of<T>(q.n, q.p, q.k);
  const Cut& c = p.cut;
  p.vectors = aligned(q.u) && q.p % kLanes<T> == 0;
  p.small = small;
  p.together = std::min(stack, together);
  const int projected = c.wide ? kProjected<T, true> : kProjected<T, false>;
  p.project = sizeof(T) * projected * std::max(kDepth, kWarps / 2 * 32 * (p.vectors ? kLanes<T> : 1));
  p.gather = std::max(sizeof(T) * (q.k * (kColumns + 1) + kColumns * (c.m + 1)), sizeof(double) * 4 * kThreads);
  const auto update = [&](auto rows) {
    const int teams = p.small ? kWarps / c.team : 1;
    return c.wide ? Stage<T, true, rows>::bytes(c, teams) : Stage<T, false, rows>::bytes(c, teams);
  };
  const size_t tall = update(std::integral_constant<int, 4>());
  p.tall = !p.small && ceil_div(q.n, 32) * p.together >= 128 && tall <= shared_limit;
  p.update = p.tall ? tall : update(std::integral_constant<int, 2>());
  const size_t solver = SmallMatrices::numbers(q.k) * sizeof(double);
  p.in_shared = solver <= shared_limit;
  if (p.in_shared) p.gather = std::max(p.gather, solver);
  return p;
}

template <class T>
UpdatePlan plan_for(const Problem<T>& q, int64_t stack, size_t shared_limit) {
  const bool small = q.n * q.p <= (stack < kMany ? kAlone : kSmall);
  return plan_for(q, stack, shared_limit, small, small ? kResident : kTogether);
}

template <class T>
int64_t workspace_bytes(const Problem<T>& q, const UpdatePlan& p) {
  return p.together * Room<T>(nullptr, p.cut, q.k).each;
}

template <class T, int V, bool kWide>
cudaError_t some_updates(const Problem<T>& q, unsigned count, const UpdatePlan& p, const Room<T>& room,
                         cudaStream_t stream) {
  const Cut& c = p.cut;
  if (p.small)
    return launch_large(small_kernel<T, V, kWide>, count, kThreads, std::max({p.project, p.gather, p.update}), stream,
                        q, c, room, p.in_shared);
  const unsigned projects = ceil_div(q.p, 32 * V) * ceil_div(q.k, kProjected<T, kWide>);
  cudaError_t error = launch_large(project_kernel<T, V, kWide>, dim3(projects, c.splits, count), kThreads, p.project,
                                   stream, q, c, room);
  if (error != cudaSuccess) return error;
  error =
      launch_large(gather_kernel<T>, dim3(c.gathers, 1, count), kThreads, p.gather, stream, q, c, room, p.in_shared);
  if (error != cudaSuccess) return error;
  return launch_large(p.tall ? update_kernel<T, V, kWide, 4> : update_kernel<T, V, kWide, 2>,
                      dim3(ceil_div(q.n, p.tall ? 32 : 16), 1, count), 32 * c.team, p.update, stream, q, c, room);
}

// `memory` has workspace_bytes bytes.
template <class T>
cudaError_t rank_k_update(const Problem<T>& q, int64_t stack, const UpdatePlan& p, void* memory, cudaStream_t stream) {
  constexpr int L = kLanes<T>;
  const auto run = p.vectors ? (p.cut.wide ? some_updates<T, L, true> : some_updates<T, L, false>)
                             : (p.cut.wide ? some_updates<T, 1, true> : some_updates<T, 1, false>);
  const Room<T> room(static_cast<unsigned char*>(memory), p.cut, q.k);
  for (int64_t first = 0; first < stack; first += p.together) {
    const cudaError_t error = run(q.at(first), std::min(p.together, stack - first), p, room, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sslkern::cuda
