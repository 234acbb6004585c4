// The last step of a rank-k update, U += (U W C + a D) W', by panels of rows. A warp multiplies tiles of 8 R rows by 4
// H vectors of columns: each lane holds R rows, 8 apart, and H vectors, 4 apart.
#pragma once

#include "factors.cuh"

namespace sslkern::cuda {

// A warp copies (kRows, kCols). Both strides are multiples of a vector.
template <int kRows, int kCols, class T>
__device__ __forceinline__ void copy_tile(const T* from, int from_stride, T* to, int to_stride) {
  constexpr int L = kLanes<T>, kAcross = kCols / L;
#pragma unroll 4
  for (int at = threadIdx.x % 32; at < kRows * kAcross; at += 32) {
    T vector[L];
    load(from + at / kAcross * from_stride + at % kAcross * L, vector);
    store(vector, to + at / kAcross * to_stride + at % kAcross * L);
  }
}

// Loads the first `count` elements of a vector; all or none if V is its length.
template <int V, class T, int L>
__device__ __forceinline__ void load_some(const T* from, int count, T (&to)[L]) {
#pragma unroll
  for (int l = 0; l < L; ++l) to[l] = 0;
  if constexpr (V == L) {
    if (count > 0) load(from, to);
  } else {
#pragma unroll
    for (int l = 0; l < L; ++l)
      if (l < count) to[l] = from[l];
  }
}

template <int V, class T, int L>
__device__ __forceinline__ void store_some(const T (&from)[L], T* to, int count) {
  if constexpr (V == L) {
    if (count > 0) store(from, to);
  } else {
#pragma unroll
    for (int l = 0; l < L; ++l)
      if (l < count) to[l] = from[l];
  }
}

// Shared memory of `update`: a tile of U and a tile of W per warp, and the factors of the panel per team of warps.
template <class T, bool kWide, int R>
struct Stage {
  static constexpr int L = kLanes<T>, kRows = 8 * R;
  static constexpr int kUStride = kStep<T> + L, kWStride = kTile<T, kWide> + L;
  static constexpr int kWarp = kRows * kUStride + kStep<T> * kWStride;  // elements

  static __host__ __device__ int right_stride(const Cut& c) {
    return c.ld + L;
  }
  static __host__ __device__ int left_stride(const Cut& c) {
    return c.m + c.m / 2;
  }
  static __host__ __device__ int team(const Cut& c) {
    return kRows * right_stride(c) + ceil_div(kRows * left_stride(c), L) * L;
  }
  static size_t bytes(const Cut& c, int teams) {
    return sizeof(T) * teams * (c.team * kWarp + team(c));
  }
};

// Updates panels of 8 R rows from `panel` on, one per team of warps: left = [U W, a], right = left [C; D], U += right
// W'. The second pass takes the columns backwards, because the last ones read are still in cache.
template <class T, int V, bool kWide, int R>
__device__ void update(const Problem<T>& q, const Cut& c, int panel, const Room<T>& room) {
  using S = Stage<T, kWide, R>;
  constexpr int L = kLanes<T>, kCols = kStep<T>, kW = kTile<T, kWide>, H = kW / (4 * L), kAcross = kCols / V;
  constexpr int kLoads = S::kRows * kAcross / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = warp / c.team, member = warp % c.team;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  T *const tile_u = shared + warp * S::kWarp, *const tile_w = tile_u + S::kRows * S::kUStride;
  T* const right = shared + blockDim.x / 32 * S::kWarp + team * S::team(c);
  T* const left = right + S::kRows * S::right_stride(c);
  const int tiles = c.tiles, first_row = lane / 4, first_col = lane % 4 * L;
  const int left_stride = S::left_stride(c), right_stride = S::right_stride(c);
  const int depth = q.retraction == kTangent ? c.m : c.m + q.k;
  const int64_t i0 = static_cast<int64_t>(panel + team) * S::kRows, below = q.n - i0;
  const int rows = below < 0 ? 0 : below < S::kRows ? below : S::kRows;
  T* const u = q.u + i0 * q.p;

  for (int job = member; rows > 0 && job < tiles * c.slices; job += c.team) {
    const int tile = job % tiles, slice = job / tiles;
    T sums[R][H][L] = {}, next[kLoads][V];
    const auto fetch = [&](int j0) {
#pragma unroll
      for (int e = 0; e < kLoads; ++e) {
        const int row = (e * 32 + lane) / kAcross;
        const int j = j0 + (e * 32 + lane) % kAcross * V;
#pragma unroll
        for (int v = 0; v < V; ++v) next[e][v] = 0;
        if (row < rows && j < q.p) load(u + row * q.p + j, next[e]);
      }
    };
    fetch(slice * kCols);
    for (int j0 = slice * kCols; j0 < c.padded; j0 += c.slices * kCols) {
      __syncwarp();
#pragma unroll
      for (int e = 0; e < kLoads; ++e) {
        const int at = e * 32 + lane;
        store(next[e], tile_u + at / kAcross * S::kUStride + at % kAcross * V);
      }
      copy_tile<kCols, kW>(room.w + j0 * c.ld + tile * kW, c.ld, tile_w, S::kWStride);
      __syncwarp();
      fetch(j0 + c.slices * kCols);
      multiply<kCols>(tile_u + first_row * S::kUStride, S::kUStride, tile_w + first_col, S::kWStride, sums);
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < H; ++h)
#pragma unroll
        for (int l = 0; l < L; ++l) {
          const int row = first_row + 8 * r, col = first_col + 4 * L * h + l, x = tile * kW + col;
          if (c.slices > 1)
            tile_u[row * S::kUStride + col] = sums[r][h][l];
          else if (x < c.m)
            left[row * left_stride + x] = sums[r][h][l] * room.scale[x];
        }
  }
  __syncthreads();
  for (int row = member; row < S::kRows; row += c.team)
    for (int x = lane + (c.slices > 1 ? 0 : c.m); x < depth; x += 32) {
      T number = 0;
      if (x >= c.m) {
        if (row < rows) number = q.a[(i0 + row) * q.k + x - c.m] * room.scale[x - c.m];
      } else {
        const T* from = shared + (team * c.team + x / kW) * S::kWarp + row * S::kUStride + x % kW;
        for (int slice = 0; slice < c.slices; ++slice) number += from[slice * tiles * S::kWarp];
        number *= room.scale[x];
      }
      left[row * left_stride + x] = number;
    }
  __syncthreads();
  for (int group = member; rows > 0 && group < 8; group += c.team)
    for (int x = lane; x < c.ld; x += 32) {
      T sums[R] = {};
#pragma unroll 8
      for (int s = 0; s < depth; ++s)
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r] += left[(group * R + r) * left_stride + s] * room.factor[s * c.ld + x];
#pragma unroll
      for (int r = 0; r < R; ++r) right[(group * R + r) * right_stride + x] = x < c.m ? sums[r] * room.scale[x] : T(0);
    }
  __syncthreads();
  const int steps = rows > 0 ? (q.p + kCols - 1) / kCols : 0;
  for (int step = steps - 1 - member; step >= 0; step -= c.team) {
    const int j = step * kCols + first_col;
    T old[R][2][L], sums[R][2][L] = {};
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + 8 * r;
        load_some<V>(u + row * q.p + j + 4 * L * h, row < rows ? q.p - j - 4 * L * h : 0, old[r][h]);
      }
    for (int tile = 0; tile < tiles; ++tile) {
      __syncwarp();
      copy_tile<kW, kCols>(room.transposed + tile * kW * c.padded + step * kCols, c.padded, tile_w, S::kUStride);
      __syncwarp();
      multiply<kW>(right + first_row * right_stride + tile * kW, right_stride, tile_w + first_col, S::kUStride, sums);
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + 8 * r;
#pragma unroll
        for (int l = 0; l < L; ++l) old[r][h][l] += sums[r][h][l];
        store_some<V>(old[r][h], u + row * q.p + j + 4 * L * h, row < rows ? q.p - j - 4 * L * h : 0);
      }
  }
}

}  // namespace sslkern::cuda
