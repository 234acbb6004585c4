// Products of tiles in shared memory, by one warp. A large matrix is read in tiles whose rows are 128 bytes, and the
// matrices with few columns in tiles of 64 or 128 bytes.
#pragma once

#include "launch.cuh"

namespace sslkern::cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int64_t kBlocks = 264;  // blocks of a pass over a large matrix: two per SM of an H100

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <class T>
constexpr int kStep = 8 * kLanes<T>;  // columns of the large matrix per step of a warp
template <class T, bool kWide>
constexpr int kTile = (kWide ? 8 : 4) * kLanes<T>;  // columns of the other matrices per step of a warp

// sums += left right. A lane takes every eighth row of `left` from its first row on, and every fourth vector of columns
// of `right`.
template <int kInner, class T, int R, int H, int L>
__device__ __forceinline__ void multiply(const T* left, int left_stride, const T* right, int right_stride,
                                         T (&sums)[R][H][L]) {
#pragma unroll
  for (int q = 0; q < kInner; q += L) {
    T x[R][L];
#pragma unroll
    for (int r = 0; r < R; ++r) load(left + r * 8 * left_stride + q, x[r]);
#pragma unroll
    for (int s = 0; s < L; ++s) {
      T y[H][L];
#pragma unroll
      for (int h = 0; h < H; ++h) load(right + (q + s) * right_stride + 4 * L * h, y[h]);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int h = 0; h < H; ++h)
#pragma unroll
          for (int l = 0; l < L; ++l) sums[r][h][l] += x[r][s] * y[h][l];
    }
  }
}

// sums += left'right. A lane takes a vector of columns of `left`, and every fourth vector of columns of `right`.
template <int kInner, class T, int H, int L>
__device__ __forceinline__ void multiply_transposed(const T* left, int left_stride, const T* right, int right_stride,
                                                    T (&sums)[L][H][L]) {
#pragma unroll 8
  for (int q = 0; q < kInner; ++q) {
    T x[L], y[H][L];
    load(left + q * left_stride, x);
#pragma unroll
    for (int h = 0; h < H; ++h) load(right + q * right_stride + 4 * L * h, y[h]);
#pragma unroll
    for (int r = 0; r < L; ++r)
#pragma unroll
      for (int h = 0; h < H; ++h)
#pragma unroll
        for (int l = 0; l < L; ++l) sums[r][h][l] += x[r] * y[h][l];
  }
}

// One of 8 x 4 places for the lanes of a warp. In a load of 16 bytes by `eighth` or by `fourth` alone, lanes 1 or 2
// apart read the same address, so that shared memory serves half a warp at a time.
struct LanePlace {
  int eighth, fourth;

  __device__ explicit LanePlace(int lane) : eighth(lane / 2 % 8), fourth(lane % 2 + lane / 16 * 2) {}
};

}  // namespace sslkern::cuda
