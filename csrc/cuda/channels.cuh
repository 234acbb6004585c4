// Walks over the channels of x, (M, C), whose channels are columns, or (N, C, L), whose channels are planes. Sums of
// threads, blocks and splits are merged in a fixed order.
#pragma once

#include "launch.cuh"

namespace sslkern::cuda {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;                 // vectors that a thread loads at once
constexpr int64_t kReducingBlocks = 1024;  // blocks of a reducing grid: about one wave
constexpr int64_t kMappingBlocks = 8192;

struct Layout {
  int64_t rows, channels, length;  // x is (rows, channels), or (rows, channels, length)
  bool columns;

  int64_t count() const {
    return rows * length;
  }
};

// How a layout is cut. A unit is one row of a tile of columns, or one vector of a channel's planes. A block processes
// `down` units at a time.
struct ChannelPlan {
  bool wide;  // 16-byte vectors
  int64_t units, per_split;
  dim3 grid, block;  // (tiles of columns or channels, splits), (vectors across, down)
};

inline ChannelPlan plan(const Layout& v, int64_t element_size, bool all_aligned, int64_t blocks) {
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

// A thread's position in its split: `left` more vectors, the next one at `offset`. The lanes of a vector belong to one
// channel (planes), or to V channels from `channel` on (columns).
template <int V, bool kColumns>
struct Walk {
  static constexpr int kSlots = kColumns ? V : 1;

  bool inside = true;  // false past the last column of x
  int64_t channel, left, offset, step;
  int64_t place = 0, place_step = 0, places = 1, jump = 0;  // position in a plane, in vectors; step to its next plane

  __device__ Walk(const Layout& v, const ChannelPlan& p) {
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
  // Elements that `vectors` vectors hold for one slot.
  __device__ static constexpr int each(int vectors) {
    return kColumns ? vectors : vectors * V;
  }
  // Writes the offsets of the next vectors, at most kAtOnce, and returns their number.
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

// Merges `own` along y in pairs. The result is valid where threadIdx.y is 0. All threads take part.
template <class State, int S>
__device__ void merge_block(State (&own)[S]) {
  State* shared = reinterpret_cast<State*>(shared_memory());
  const int across = blockDim.x, y = threadIdx.y, at = y * across + threadIdx.x;
  const int given = across * (blockDim.y - 1);  // the first row of threads only receives
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (y >= half && y < 2 * half)
      for (int s = 0; s < S; ++s) shared[s * given + at - across] = own[s];
    __syncthreads();
    if (y < half)
      for (int s = 0; s < S; ++s) own[s].merge(shared[s * given + at + half * across - across]);
  }
}

template <class State>
size_t merging_bytes(dim3 block, int slots) {
  return sizeof(State) * block.x * (block.y - 1) * slots;
}

// Passes the result to `finish` if a channel has one block. Otherwise stores it in `splits`, (gridDim.y, channels), for
// `merge_kernel`.
template <class State, int S, class Finish>
__device__ void finish_block(State (&own)[S], bool inside, int64_t channel, int64_t channels, State* splits,
                             const Finish& finish) {
  merge_block(own);
  if (!inside || threadIdx.y != 0) return;
  for (int s = 0; s < S; ++s) {
    if (gridDim.y == 1)
      finish(channel + s, own[s]);
    else
      splits[blockIdx.y * channels + channel + s] = own[s];
  }
}

// Merges the `count` splits of each channel, with a column of threads per channel. A single thread would read up to a
// thousand splits one after the other.
template <class State, class Finish>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(int64_t channels, int64_t count, const State* __restrict__ splits, Finish finish) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  State own[1];
  const int64_t mine = channel < channels ? count : 0;
#pragma unroll 4
  for (int64_t k = threadIdx.y; k < mine; k += blockDim.y) own[0].merge(splits[k * channels + channel]);
  merge_block(own);
  if (channel < channels && threadIdx.y == 0) finish(channel, own[0]);
}

// Bytes of device memory for the splits of a reduction; 0 for one split.
template <class State>
int64_t split_bytes(const Layout& v, const ChannelPlan& p) {
  return p.grid.y > 1 ? p.grid.y * v.channels * sizeof(State) : 0;
}

template <class State, class Finish>
cudaError_t merge_splits(const Layout& v, const ChannelPlan& p, const State* splits, const Finish& finish,
                         cudaStream_t stream) {
  if (p.grid.y == 1) return cudaSuccess;
  const int64_t down = std::min<int64_t>(power_of_two_from(p.grid.y), kThreads / 4), across = kThreads / down;
  const dim3 block(across, down);
  return launch(merge_kernel<State, Finish>, dim3(ceil_div(v.channels, across)), block, merging_bytes<State>(block, 1),
                stream, v.channels, static_cast<int64_t>(p.grid.y), splits, finish);
}

}  // namespace sslkern::cuda
