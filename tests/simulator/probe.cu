// Kernels that try the simulator itself, right ones and wrong ones.
#include <bindings.h>

namespace {

namespace py = pybind11;
using simulator::pointer;

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... arguments) {
  const cudaLaunchConfig_t config{grid, block, shared_bytes};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T>
__device__ T* shared() {
  return reinterpret_cast<T*>(simulator::shared_memory());
}

// out (rows, threads): the sum of a row of x (rows, threads), in every thread. kWithout names a barrier to leave out.
template <int kWithout>
__global__ void block_sums(int rows, const float* x, float* out) {
  float* sums = shared<float>();
  const int threads = blockDim.x, t = threadIdx.x;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    sums[t] = x[row * threads + t];
    if constexpr (kWithout != 1) __syncthreads();
    for (int half = threads / 2; half > 0; half /= 2) {
      if (t < half) sums[t] += sums[t + half];
      if constexpr (kWithout != 2) __syncthreads();
    }
    out[row * threads + t] = sums[0];
    if constexpr (kWithout != 3) __syncthreads();
  }
}

void call_block_sums(int blocks, const py::array& x, const py::array& out, int without) {
  const auto rows = x.shape(0), threads = x.shape(1);
  constexpr decltype(&block_sums<0>) kernels[] = {block_sums<0>, block_sums<1>, block_sums<2>, block_sums<3>};
  simulator::check(launch(kernels[without], blocks, threads, threads * sizeof(float), static_cast<int>(rows),
                          pointer<const float>(x, {rows, threads}), pointer<float>(out, {rows, threads})));
}

// out: the sum of x, which the last block to come by takes, in the order of blocks.
__global__ void grid_sum(int n, const float* x, float* partial, unsigned* arrived, float* out) {
  float sum = 0;
  for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < n; k += gridDim.x * blockDim.x) sum += x[k];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  unsigned last = 0;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(arrived, 1) == gridDim.x - 1;
  }
  if (!__shfl_sync(~0u, last, 0) || threadIdx.x != 0) return;
  __threadfence();
  *out = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) *out += partial[b];
}

// out (5, threads): what each kind of shuffle reads
template <class T>
__global__ void shuffles(int by, int width, const T* x, T* out) {
  const unsigned n = blockDim.x * blockDim.y, t = threadIdx.y * blockDim.x + threadIdx.x;
  out[t] = __shfl_sync(~0u, x[t], by, width);
  out[n + t] = __shfl_up_sync(~0u, x[t], by, width);
  out[2 * n + t] = __shfl_down_sync(~0u, x[t], by, width);
  out[3 * n + t] = __shfl_xor_sync(~0u, x[t], by, width);
  T sum = x[t];
  for (int lanes = width / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes, width);
  out[4 * n + t] = sum;
}

template <class T>
void bind_shuffles(py::module_& m, const char* name) {
  m.def(name, [](int by, int width, const py::array& x, const py::array& out) {
    const auto warps = x.shape(0);
    simulator::check(launch(shuffles<T>, 1, dim3(8, 4 * warps), 0, by, width, pointer<const T>(x, {warps, 32}),
                            pointer<T>(out, {5, warps, 32})));
  });
}

// out (3, 32): ballot, any and all of x > 0 among odd lanes and, for themselves, among even ones
__global__ void votes(const float* x, unsigned* out) {
  const unsigned t = threadIdx.x, mask = t % 2 ? 0xaaaaaaaau : 0x55555555u;
  out[t] = __ballot_sync(mask, x[t] > 0);
  out[32 + t] = __any_sync(mask, x[t] > 0);
  out[64 + t] = __all_sync(mask, x[t] > 0);
}

// How often x holds each number, the sum and the maximum of x, and twice its size
__global__ void atomics(const int* x, int* counts, double* sum, int* most, unsigned* doubled) {
  const int number = x[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(counts + number, 1);
  atomicAdd(sum, number);
  atomicMax(most, number);
  for (unsigned old = *doubled, seen; (seen = atomicCAS(doubled, old, old + 2)) != old;) old = seen;
}

// out: the rank of each thread of the grid, in the order that they run.
__global__ void ranks(unsigned* count, unsigned* out) {
  out[atomicAdd(count, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void uninitialised(float* out) {
  out[threadIdx.x] = shared<float>()[threadIdx.x];
}

__global__ void nothing() {}

int alive = 0;

struct Local {
  Local() {
    ++alive;
  }
  ~Local() {
    --alive;
  }
};

[[gnu::noinline]] __device__ void overflow() {
  volatile char large[simulator::kStackBytes];
  for (size_t k = 0; k < sizeof(large); ++k) large[k] = 1;
}

constexpr const char* kMistakes[] = {"none",          "returned",      "other barrier", "at a shuffle",
                                     "inactive lane", "returned lane", "no caller",     "other mask",
                                     "width",         "thrown",        "stack",         "past shared"};

// The mistake that kMistakes names, of blocks of a warp and a half
__global__ void mistake(int kind) {
  const Local local;
  const unsigned t = threadIdx.x;
  const std::string_view name = kMistakes[kind];
  if (name == "returned" && t == 40) return;
  if (name == "other barrier" && t == 40) __syncthreads();
  if (name == "at a shuffle" && t == 40) __shfl_sync(~0u, t, 8);
  __syncthreads();
  if (name == "inactive lane" && t < 8) __shfl_sync(0xff, t, 8);
  if (name == "returned lane" && t == 31) return;
  if (name == "returned lane" && t < 32) __shfl_down_sync(~0u, t, 1);
  if (name == "no caller" && t < 8) __shfl_sync(0x7f, t, 0);
  if (name == "other mask" && t < 8) __syncwarp(t < 4 ? 0xff : 0xfe);
  if (name == "width") __shfl_sync(~0u, t, 0, 12);
  if (name == "thrown" && t == 40) throw std::out_of_range("thrown in a kernel");
  if (name == "stack" && t == 40) overflow();
  if (name == "past shared") shared<unsigned char>()[16] = 1;
  __syncthreads();
}

// What was said to `allowed` bytes of shared memory, to the launch, and by cudaGetLastError, asked twice.
py::tuple limits(const std::vector<unsigned>& grid, const std::vector<unsigned>& block, size_t shared_bytes,
                 int allowed) {
  const cudaError_t set = cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
  cudaGetLastError();
  const cudaError_t error =
      launch(nothing, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes);
  const cudaError_t last = cudaGetLastError(), cleared = cudaGetLastError();
  return py::make_tuple(cudaGetErrorString(set), cudaGetErrorString(error), cudaGetErrorString(last),
                        cudaGetErrorString(cleared));
}

}  // namespace

PYBIND11_MODULE(probe, m) {
  simulator::bind(m);
  m.def("block_sums", call_block_sums, py::arg("blocks"), py::arg("x"), py::arg("out"), py::arg("without") = 0);
  m.def("grid_sum", [](int blocks, const py::array& x, const py::array& partial, const py::array& out) {
    unsigned arrived = 0;
    simulator::check(launch(grid_sum, blocks, 32, 0, static_cast<int>(x.size()), pointer<const float>(x, {x.size()}),
                            pointer<float>(partial, {blocks}), &arrived, pointer<float>(out, {1})));
  });
  bind_shuffles<float>(m, "shuffles_float32");
  bind_shuffles<double>(m, "shuffles_float64");
  bind_shuffles<int>(m, "shuffles_int32");
  bind_shuffles<unsigned>(m, "shuffles_uint32");
  bind_shuffles<long long>(m, "shuffles_int64");
  m.def("votes", [](const py::array& x, const py::array& out) {
    simulator::check(launch(votes, 1, 32, 0, pointer<const float>(x, {32}), pointer<unsigned>(out, {3, 32})));
  });
  m.def("atomics", [](const py::array& x, const py::array& counts) {
    double sum = 0;
    int most = 0;
    unsigned doubled = 0;
    simulator::check(launch(atomics, x.shape(0), x.shape(1), 0, pointer<const int>(x, {x.shape(0), x.shape(1)}),
                            pointer<int>(counts, {counts.size()}), &sum, &most, &doubled));
    return py::make_tuple(sum, most, doubled);
  });
  m.def("ranks", [](const py::array& out) {
    unsigned count = 0;
    simulator::check(
        launch(ranks, out.shape(0), out.shape(1), 0, &count, pointer<unsigned>(out, {out.shape(0), out.shape(1)})));
  });
  m.def("uninitialised", [](const py::array& out) {
    simulator::check(launch(uninitialised, 1, out.size(), out.nbytes(), pointer<float>(out, {out.size()})));
  });
  m.def("mistake", [](const std::string& name) {
    const auto kind = std::find(std::begin(kMistakes), std::end(kMistakes), name) - std::begin(kMistakes);
    simulator::check(launch(mistake, dim3(1, 2), 48, 16, static_cast<int>(kind)));
  });
  m.def("alive", [] { return alive; });
  m.def("limits", limits);
}
