// Batch moments and batch norm on a GPU, over x (M, C), whose channels are columns, or (N, C, L), whose channels are
// planes. A block walks a channel, or a tile of columns, through its split of the numbers; sums run in fp32 over what a
// thread loads at once and in fp64 from there on, and the last block of a channel merges the splits in order: the same
// bits every time, and no atomics but the count of blocks.
#pragma once

#include "launch.cuh"

namespace sslkern::cuda {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;                 // vectors that a thread has under way
constexpr int64_t kReducingBlocks = 1024;  // of a grid: about one wave
constexpr int64_t kMappingBlocks = 8192;

struct Layout {
  int64_t rows, channels, length;  // x is (rows, channels), or (rows, channels, length)
  bool columns;

  int64_t count() const {
    return rows * length;
  }
};

// How a layout is cut. A unit is a vector's width of a row in a tile of columns, or a vector of a channel's planes;
// threads walk through them `down` at a time.
struct Plan {
  bool wide;  // 16-byte vectors
  int64_t units, per_split;
  dim3 grid, block;  // (tiles of columns or channels, splits), (vectors across, down)
};

inline Plan plan(const Layout& v, int64_t element_size, bool all_aligned, int64_t blocks) {
  const int64_t lanes = kVectorBytes / element_size, run = v.columns ? v.channels : v.length;
  const bool wide = element_size < 8 && all_aligned && run % lanes == 0;
  const int64_t vectors = wide ? run / lanes : run, units = v.columns ? v.rows : v.rows * vectors;
  const int64_t across = v.columns ? std::min<int64_t>(power_of_two_from(vectors), 32) : 1;
  const int64_t down = std::clamp<int64_t>(power_of_two_from(units), ceil_div(32, across), kThreads / across);
  const int64_t tiles = v.columns ? ceil_div(vectors, across) : v.channels;
  const int64_t most = std::min<int64_t>(ceil_div(units, down * kAtOnce), 65535);
  const int64_t per_split = ceil_div(ceil_div(units, std::min(ceil_div(blocks, tiles), most)), down) * down;
  return {wide, units, per_split, dim3(tiles, ceil_div(units, per_split)), dim3(across, down)};
}

// A thread's way through its split: `left` more vectors, the next one at `offset`. Their lanes belong to one channel of
// planes, or to V channels of columns, from `channel` on.
template <int V, bool kColumns>
struct Walk {
  static constexpr int kSlots = kColumns ? V : 1;

  bool inside = true;  // a tile may be wider than what is left of the columns
  int64_t channel, left, offset, step;
  int64_t place = 0, place_step = 0, places = 1, jump = 0;  // in a plane, in vectors; and to the channel's next plane

  __device__ Walk(const Layout& v, const Plan& p) {
    const int64_t begin = blockIdx.y * p.per_split + threadIdx.y, down = blockDim.y;
    const int64_t end = blockIdx.y + 1 < gridDim.y ? (blockIdx.y + 1) * p.per_split : p.units;
    left = begin < end ? ceil_div(end - begin, down) : 0;
    if constexpr (kColumns) {
      channel = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
      inside = channel < v.channels;
      if (!inside) left = 0;
      offset = begin * v.channels + channel;
      step = down * v.channels;
    } else {
      channel = blockIdx.x;
      places = v.length / V;
      place = begin % places;
      place_step = down % places;
      offset = (begin / places * v.channels + channel) * v.length + place * V;
      step = down / places * v.channels * v.length + place_step * V;
      jump = (v.channels - 1) * v.length;
    }
  }
  __device__ static constexpr int slot(int lane) {
    return kColumns ? lane : 0;
  }
  // Numbers of a slot in so many vectors.
  __device__ static constexpr int each(int vectors) {
    return kColumns ? vectors : vectors * V;
  }
  // The offsets of the next vectors, at most kAtOnce; how many there are.
  __device__ int next(int64_t (&offsets)[kAtOnce]) {
    const int valid = left < kAtOnce ? static_cast<int>(left) : kAtOnce;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      offsets[k] = offset;
      offset += step;
      place += place_step;
      if (!kColumns && place >= places) {
        place -= places;
        offset += jump;
      }
    }
    left -= valid;
    return valid;
  }
};

template <class T, int V>
__device__ __forceinline__ void load_all(const T* from, const int64_t (&offsets)[kAtOnce], int valid,
                                         T (&to)[kAtOnce][V]) {
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k)
    if (k < valid) load(from + offsets[k], to[k]);
}

// What a slot has summed up: count numbers of this mean, and squares about it.
template <class A>
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  // Chan's merge. A share in fp32 errs relative to a difference of means, and spares a division in fp64.
  __device__ void merge(const Moments& more) {
    const double total = count + more.count;
    if (total == 0) return;
    const double delta = more.mean - mean, share = static_cast<A>(more.count) / static_cast<A>(total);
    mean += delta * share;
    m2 += more.m2 + delta * delta * share * count;
    count = total;
  }
};

struct Pair {
  double sum = 0, dot = 0;

  __device__ void merge(const Pair& more) {
    sum += more.sum;
    dot += more.dot;
  }
};

// Merges `own` down the block, in pairs; the result is right where threadIdx.y is 0. All threads take part.
template <class State, int S>
__device__ void merge_block(State (&own)[S]) {
  State* shared = reinterpret_cast<State*>(shared_memory());
  const int across = blockDim.x, y = threadIdx.y, at = y * across + threadIdx.x;
  const int given = across * (blockDim.y - 1);  // the first row gives nothing away
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (y >= half && y < 2 * half)
      for (int s = 0; s < S; ++s) shared[s * given + at - across] = own[s];
    __syncthreads();
    if (y < half)
      for (int s = 0; s < S; ++s) own[s].merge(shared[s * given + at + half * across - across]);
  }
}

template <class State>
size_t shared_bytes(const Plan& p, int slots) {
  return std::max<size_t>(sizeof(State) * p.block.x * (p.block.y - 1) * slots, sizeof(int));
}

// Merges what the splits of a channel found, in the last of its blocks to come by: true there, where threadIdx.y is 0,
// with the result in `own`. `splits` holds (gridDim.y, channels) states, `arrived` gridDim.x zeros.
template <class State, int S>
__device__ bool merge_splits(State (&own)[S], bool inside, int64_t channel, int64_t channels, State* splits,
                             unsigned* arrived) {
  merge_block(own);
  const bool owner = inside && threadIdx.y == 0;
  if (gridDim.y == 1) return owner;
  if (owner)
    for (int s = 0; s < S; ++s) splits[blockIdx.y * channels + channel + s] = own[s];
  __threadfence();
  __syncthreads();  // all of the block have written, and read what they merged
  int* last = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0 && threadIdx.y == 0) *last = atomicAdd(arrived + blockIdx.x, 1u) == gridDim.y - 1;
  __syncthreads();
  if (!*last || !owner) return false;
  __threadfence();
  for (int s = 0; s < S; ++s) {
    own[s] = State();
    for (unsigned k = 0; k < gridDim.y; ++k) own[s].merge(splits[k * channels + channel + s]);
  }
  return true;
}

// centre (2, C): the mean as high + low; variance (C): biased. Two passes over what a thread loads at once, about the
// channel's first number.
template <class T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(Layout v, Plan p, const T* __restrict__ x, Moments<Accumulator<T>>* splits, unsigned* arrived,
                   Accumulator<T>* centre, Accumulator<T>* variance) {
  using A = Accumulator<T>;
  Walk<V, kColumns> walk(v, p);
  constexpr int S = Walk<V, kColumns>::kSlots;
  A pivot[S] = {};
  Moments<A> own[S];
  if (walk.inside)
    for (int s = 0; s < S; ++s) pivot[s] = static_cast<A>(x[(walk.channel + s) * (kColumns ? 1 : v.length)]);
  while (walk.left > 0) {
    int64_t offsets[kAtOnce];
    T raw[kAtOnce][V];
    const int valid = walk.next(offsets);
    load_all(x, offsets, valid, raw);
    A sum[S] = {}, square[S] = {};
    A d[kAtOnce][V];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        d[k][lane] = k < valid ? static_cast<A>(raw[k][lane]) - pivot[walk.slot(lane)] : A(0);
        sum[walk.slot(lane)] += d[k][lane];
      }
    const A each = A(1) / walk.each(valid);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        const A e = k < valid ? d[k][lane] - sum[walk.slot(lane)] * each : A(0);
        square[walk.slot(lane)] += e * e;
      }
#pragma unroll
    for (int s = 0; s < S; ++s) {
      Moments<A> more;
      more.count = walk.each(valid);
      more.mean = sum[s] * each;
      more.m2 = square[s];
      own[s].merge(more);
    }
  }
  if (!merge_splits(own, walk.inside, walk.channel, v.channels, splits, arrived)) return;
  for (int s = 0; s < S; ++s) {
    const int64_t c = walk.channel + s;
    const double mean = pivot[s] + own[s].mean;
    const A high = static_cast<A>(mean);
    centre[c] = high;
    centre[v.channels + c] = static_cast<A>(static_cast<double>(pivot[s]) - high + own[s].mean);
    variance[c] = static_cast<A>(own[s].m2 / own[s].count);
  }
}

// What normalises: parameters of shape (C,), in the accumulator's type; centre is (2, C).
template <class A>
struct Statistics {
  const A *weight, *bias, *centre, *variance;
  A eps;
  bool relu;
};

// A channel's y = (x - mean) * scale + bias; the bias makes up for what rounding took from the mean.
template <class A>
struct Affine {
  A mean, scale, bias;

  __device__ A y(A x) const {
    return (x - mean) * scale + bias;
  }
};

template <class A>
__device__ A inverse_std(const Statistics<A>& f, int64_t channel) {
  return A(1) / sqrt(f.variance[channel] + f.eps);
}

template <class A>
__device__ Affine<A> affine_of(const Statistics<A>& f, int64_t channel, int64_t channels) {
  const A scale = f.weight[channel] * inverse_std(f, channel);
  return {f.centre[channel], scale, f.bias[channel] - f.centre[channels + channel] * scale};
}

template <class T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(Layout v, Plan p, const T* __restrict__ x, Statistics<Accumulator<T>> f, T* __restrict__ out) {
  using A = Accumulator<T>;
  Walk<V, kColumns> walk(v, p);
  if (walk.left == 0) return;
  Affine<A> affine[Walk<V, kColumns>::kSlots];
  for (int s = 0; s < walk.kSlots; ++s) affine[s] = affine_of(f, walk.channel + s, v.channels);
  while (walk.left > 0) {
    int64_t offsets[kAtOnce];
    T raw[kAtOnce][V];
    const int valid = walk.next(offsets);
    load_all(x, offsets, valid, raw);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k >= valid) continue;
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        const A y = affine[walk.slot(lane)].y(static_cast<A>(raw[k][lane]));
        raw[k][lane] = static_cast<T>(f.relu && y < 0 ? A(0) : y);  // NaN passes, as in torch
      }
      store(raw[k], out + offsets[k]);
    }
  }
}

// sums (2, C): of dy behind the relu, and of dy (x - mean) / sqrt(var + eps)
template <class T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(Layout v, Plan p, const T* __restrict__ dy, const T* __restrict__ x, Statistics<Accumulator<T>> f,
                Pair* splits, unsigned* arrived, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  Walk<V, kColumns> walk(v, p);
  constexpr int S = Walk<V, kColumns>::kSlots;
  Affine<A> affine[S] = {};
  Pair own[S];
  if (walk.inside)
    for (int s = 0; s < S; ++s) affine[s] = affine_of(f, walk.channel + s, v.channels);
  while (walk.left > 0) {
    int64_t offsets[kAtOnce];
    T raw_x[kAtOnce][V], raw_dy[kAtOnce][V];
    const int valid = walk.next(offsets);
    load_all(x, offsets, valid, raw_x);
    load_all(dy, offsets, valid, raw_dy);
    A sum[S] = {}, dot[S] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k >= valid) continue;
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        const Affine<A>& a = affine[walk.slot(lane)];
        const A number = static_cast<A>(raw_x[k][lane]);
        const A g = f.relu && a.y(number) <= 0 ? A(0) : static_cast<A>(raw_dy[k][lane]);
        sum[walk.slot(lane)] += g;
        dot[walk.slot(lane)] += g * (number - a.mean);
      }
    }
#pragma unroll
    for (int s = 0; s < S; ++s) {
      own[s].sum += sum[s];
      own[s].dot += dot[s];
    }
  }
  if (!merge_splits(own, walk.inside, walk.channel, v.channels, splits, arrived)) return;
  for (int s = 0; s < S; ++s) {
    const int64_t c = walk.channel + s;
    const double dot = own[s].dot - f.centre[v.channels + c] * own[s].sum;
    sums[c] = static_cast<A>(own[s].sum);
    sums[v.channels + c] = static_cast<A>(dot * inverse_std(f, c));
  }
}

// dx = scale (dy - mean of dy - x_hat mean of dy x_hat), the means being `sums` (2, C) times `each`
template <class T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    input_grad_kernel(Layout v, Plan p, const T* __restrict__ dy, const T* __restrict__ x, Statistics<Accumulator<T>> f,
                      const Accumulator<T>* sums, double each, T* __restrict__ out) {
  using A = Accumulator<T>;
  Walk<V, kColumns> walk(v, p);
  if (walk.left == 0) return;
  constexpr int S = Walk<V, kColumns>::kSlots;
  Affine<A> affine[S];
  A slope[S], offset[S];
  for (int s = 0; s < S; ++s) {
    const int64_t c = walk.channel + s;
    affine[s] = affine_of(f, c, v.channels);
    const double along = sums[v.channels + c] * each * inverse_std(f, c);
    slope[s] = static_cast<A>(affine[s].scale * along);
    offset[s] = static_cast<A>(affine[s].scale * (sums[c] * each - along * f.centre[v.channels + c]));
  }
  while (walk.left > 0) {
    int64_t offsets[kAtOnce];
    T raw_x[kAtOnce][V], raw_dy[kAtOnce][V];
    const int valid = walk.next(offsets);
    load_all(x, offsets, valid, raw_x);
    load_all(dy, offsets, valid, raw_dy);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k >= valid) continue;
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        const int s = walk.slot(lane);
        const A number = static_cast<A>(raw_x[k][lane]);
        const A g = f.relu && affine[s].y(number) <= 0 ? A(0) : static_cast<A>(raw_dy[k][lane]);
        raw_x[k][lane] = static_cast<T>(affine[s].scale * g - (slope[s] * (number - affine[s].mean) + offset[s]));
      }
      store(raw_x[k], out + offsets[k]);
    }
  }
}

// The kernel of a plan: 16-byte vectors or single numbers, columns or planes.
#define SSLKERN_KERNEL(name, T, p, v)                                                      \
  ((p).wide ? ((v).columns ? name<T, wide_lanes<T>, true> : name<T, wide_lanes<T>, false>) \
            : ((v).columns ? name<T, 1, true> : name<T, 1, false>))

template <class T>
constexpr int wide_lanes = sizeof(T) < 8 ? kVectorBytes / sizeof(T) : 1;

// Device memory that a reduction works in: `splits` of State per channel, and zeros for the blocks to count in.
template <class State>
struct Workspace {
  State* splits;
  unsigned* arrived;

  static int64_t bytes(const Layout& v, const Plan& p) {
    return p.grid.y > 1 ? p.grid.y * v.channels * sizeof(State) + p.grid.x * sizeof(unsigned) : 0;
  }
  Workspace(void* memory, const Layout& v, const Plan& p)
      : splits(static_cast<State*>(memory)), arrived(reinterpret_cast<unsigned*>(splits + p.grid.y * v.channels)) {}

  cudaError_t clear(const Plan& p, cudaStream_t stream) const {
    return p.grid.y > 1 ? cudaMemsetAsync(arrived, 0, p.grid.x * sizeof(unsigned), stream) : cudaSuccess;
  }
};

// The launchers. `memory` holds `Workspace<State>::bytes` of the reducing plan, State being Moments<A> or Pair.
template <class T>
cudaError_t moments(const Layout& v, const Plan& p, const T* x, void* memory, Accumulator<T>* centre,
                    Accumulator<T>* variance, cudaStream_t stream) {
  const Workspace<Moments<Accumulator<T>>> w(memory, v, p);
  if (const cudaError_t error = w.clear(p, stream); error != cudaSuccess) return error;
  const int slots = v.columns && p.wide ? wide_lanes<T> : 1;
  return launch(SSLKERN_KERNEL(moments_kernel, T, p, v), p.grid, p.block,
                shared_bytes<Moments<Accumulator<T>>>(p, slots), stream, v, p, x, w.splits, w.arrived, centre,
                variance);
}

template <class T>
cudaError_t apply(const Layout& v, const Plan& p, const T* x, const Statistics<Accumulator<T>>& f, T* y,
                  cudaStream_t stream) {
  return launch(SSLKERN_KERNEL(apply_kernel, T, p, v), p.grid, p.block, 0, stream, v, p, x, f, y);
}

template <class T>
cudaError_t gradient_sums(const Layout& v, const Plan& p, const T* dy, const T* x, const Statistics<Accumulator<T>>& f,
                          void* memory, Accumulator<T>* sums, cudaStream_t stream) {
  const Workspace<Pair> w(memory, v, p);
  if (const cudaError_t error = w.clear(p, stream); error != cudaSuccess) return error;
  const int slots = v.columns && p.wide ? wide_lanes<T> : 1;
  return launch(SSLKERN_KERNEL(sums_kernel, T, p, v), p.grid, p.block, shared_bytes<Pair>(p, slots), stream, v, p, dy,
                x, f, w.splits, w.arrived, sums);
}

template <class T>
cudaError_t input_grad(const Layout& v, const Plan& p, const T* dy, const T* x, const Statistics<Accumulator<T>>& f,
                       const Accumulator<T>* sums, double each, T* dx, cudaStream_t stream) {
  return launch(SSLKERN_KERNEL(input_grad_kernel, T, p, v), p.grid, p.block, 0, stream, v, p, dy, x, f, sums, each, dx);
}

#undef SSLKERN_KERNEL

}  // namespace sslkern::cuda
