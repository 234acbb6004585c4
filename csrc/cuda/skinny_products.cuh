// X right and X^H left on a GPU, from one read of X. A block owns a split of the rows and a strip of the columns of X.
// It keeps the rows of `right` for this strip in shared memory and takes steps down the split. In each step, a warp
// multiplies a tile of X, 32 rows of 128 bytes, from both sides. The sums of X^H left stay in its registers to the end.
// The products with `right` are added up over the warps and written.
//
// If X has several strips, x_right is written as one partial sum per strip, and `combine` adds them up; the same for
// x_left and splits. Square blocks have the fewest partial sums. For n = p = 4096 and m = k = 16 in fp32, X has 67 MB,
// and 16 x 16 blocks of 256 x 256 elements, which an H100 runs at once, write 8 MB of partial sums and read them again.
// Panels of rows would need no sums over strips, but 132 panels, one per SM, would write 35 MB of sums over splits. A
// small matrix of a stack, such as 64 x 64, is one block, with a warp per tile, and has no partial sums.
//
// A complex matrix (n, p) is a real one (n, 2p), with pairs as elements. A real `right` of twice the rows and columns,
// [[Re, Im], [-Im, Re]] per element, gives its product. X'left has four real products per element, which are folded
// into a pair at the end.
#pragma once

#include "tiles.cuh"

namespace sslkern::cuda {

constexpr int kTileRows = 32;
constexpr int64_t kLeastRows = 64;           // of a split, as long as blocks are few
constexpr int64_t kLongestSum = 2048;        // rows that a thread adds up one by one
constexpr int64_t kPartialBytes = 64 << 20;  // of partial sums per launch, if they are of more than one matrix
constexpr int64_t kMostSlices = 65535;       // blocks that a grid may have along y

// A stack of matrices: X (n, p), right (p, m), left (n, k), x_right (n, m), x_left (p, k). With `pairs`, elements are
// complex, p, m and k are twice the number of columns, and right and x_left have p / 2 rows.
template <class T>
struct SkinnyProblem {
  const T *x, *right, *left;
  T *x_right, *x_left;
  int64_t n, p, m, k;
  bool pairs;

  __host__ __device__ int64_t columns() const {
    return pairs ? p / 2 : p;
  }
  __host__ __device__ SkinnyProblem at(int64_t index) const {
    SkinnyProblem one = *this;
    one.x += index * n * p;
    one.right += index * columns() * m;
    one.left += index * n * k;
    one.x_right += index * n * m;
    one.x_left += index * columns() * k;
    return one;
  }
};

// How a stack is processed. All but `together` follows from the sizes and the address of one matrix.
struct SkinnyPlan {
  bool vectors, wide;             // 16-byte loads of X; more columns than the narrow tile
  int across, groups;             // warps of a block beside each other, and below each other
  int passes, strips, splits;     // blocks by columns of right and left, by columns of X, by rows of X
  int64_t per_split;              // rows
  int64_t right_each, left_each;  // elements of a partial sum, a multiple of a vector; 0 if there is but one sum
  int64_t each, together;         // elements of all partial sums of a matrix; matrices per launch
  size_t shared;                  // bytes
};

template <class T>
SkinnyPlan plan_for(const SkinnyProblem<T>& q, int64_t stack, int64_t partial_bytes = kPartialBytes) {
  constexpr int64_t L = kLanes<T>;
  SkinnyPlan c{};
  const int64_t most = std::max(q.m, q.k);
  c.vectors = aligned(q.x) && q.p % L == 0;
  c.wide = most > kTile<T, false>;
  const int64_t tile = c.wide ? kTile<T, true> : kTile<T, false>;
  c.passes = std::max<int64_t>(ceil_div(most, tile), 1);
  const int64_t pieces = ceil_div(q.p, kStep<T>);
  c.across = ceil_div(pieces, ceil_div(pieces, kWarps));
  c.strips = ceil_div(pieces, c.across);
  c.groups = std::clamp<int64_t>(ceil_div(q.n, kTileRows), 1, kWarps / c.across);
  const int64_t step = c.groups * kTileRows;
  const int64_t wanted = std::clamp<int64_t>(kBlocks / (int64_t{c.strips} * c.passes), 1, ceil_div(q.n, kLeastRows));
  const int64_t splits = std::max(wanted, ceil_div(q.n, c.groups * kLongestSum));
  c.per_split = ceil_div(ceil_div(q.n, splits), step) * step;
  c.splits = ceil_div(q.n, c.per_split);
  c.right_each = c.strips > 1 ? ceil_div(q.n * q.m, L) * L : 0;
  c.left_each = c.splits > 1 ? ceil_div(q.columns() * q.k, L) * L : 0;
  c.each = c.strips * c.right_each + c.splits * c.left_each;
  const int64_t bytes = std::max<int64_t>(c.each * sizeof(T), 1);
  c.together = std::min(stack, std::clamp<int64_t>(partial_bytes / bytes, 1, kMostSlices));
  const int64_t tiles_of_x = c.across * c.groups * kTileRows * (kStep<T> + L);
  c.shared = sizeof(T) * (tiles_of_x + (c.across * kStep<T> + step) * tile);
  return c;
}

// What a block works on: some rows and columns of X, and some columns of right and left. All pointers are to the first
// of them. Where x_right or x_left has partial sums, the pointer is to those of this block.
template <class T, bool kWide>
struct SkinnyBlock {
  static constexpr int L = kLanes<T>, kCols = kStep<T>, kStride = kCols + L, kW = kTile<T, kWide>;
  static constexpr int kPerTile = kTileRows * kStride;

  SkinnyProblem<T> q;
  int rows, columns, right_columns, left_columns;  // the last two are 0 where there are no products
  int across, groups;
  T *tiles, *right, *left;  // shared memory: a tile of X per warp, (across kCols, kW), (groups kTileRows, kW)

  __device__ SkinnyBlock(const SkinnyProblem<T>& all, const SkinnyPlan& c, T* partial)
      : q(all.at(blockIdx.y)), across(c.across), groups(c.groups) {
    const int pass = blockIdx.x % c.passes, strip = blockIdx.x / c.passes % c.strips;
    const int split = blockIdx.x / c.passes / c.strips;
    const int64_t i0 = split * c.per_split, j0 = int64_t{strip} * across * kCols, x0 = int64_t{pass} * kW;
    const int64_t j0_pairs = q.pairs ? j0 / 2 : j0;
    rows = smaller(q.n - i0, c.per_split);
    columns = smaller(q.p - j0, across * kCols);
    right_columns = smaller(q.m - x0, kW);
    left_columns = smaller(q.k - x0, kW);
    partial += blockIdx.y * c.each;
    if (c.strips > 1) q.x_right = partial + strip * c.right_each;
    if (c.splits > 1) q.x_left = partial + c.strips * c.right_each + split * c.left_each;
    q.x += i0 * q.p + j0;
    q.right += j0_pairs * q.m + x0;
    q.left += i0 * q.k + x0;
    q.x_right += i0 * q.m + x0;
    q.x_left += j0_pairs * q.k + x0;
    tiles = reinterpret_cast<T*>(shared_memory());
    right = tiles + across * groups * kPerTile;
    left = right + across * kCols * kW;
  }

  // Copies `right` as a real matrix.
  __device__ void load_right() const {
#pragma unroll 8
    for (int at = threadIdx.x; at < across * kCols * kW; at += blockDim.x) {
      const int64_t row = at / kW;
      const int x = at % kW;
      const bool same = row % 2 == x % 2;  // both real parts or both imaginary parts
      T number = 0;
      if (row < columns && x < right_columns)
        number = q.pairs ? q.right[row / 2 * q.m + x - x % 2 + !same] : q.right[row * q.m + x];
      right[at] = q.pairs && row % 2 > x % 2 ? -number : number;
    }
  }

  // Copies the rows of `left` for a step.
  __device__ void load_left(int first) const {
#pragma unroll 4
    for (int at = threadIdx.x; at < groups * kTileRows * kW; at += blockDim.x) {
      const int64_t row = first + at / kW;
      const int x = at % kW;
      left[at] = row < rows && x < left_columns ? q.left[row * q.k + x] : T(0);
    }
  }

  // Adds up the products with `right` in the tiles of the warps, and writes them.
  __device__ void write_right(int first) const {
    for (int at = threadIdx.x; at < groups * kTileRows * kW; at += blockDim.x) {
      const int row = at / kW, x = at % kW;
      const T* const from = tiles + row / kTileRows * across * kPerTile + row % kTileRows * kStride + x;
      T sum = 0;
      for (int w = 0; w < across; ++w) sum += from[w * kPerTile];
      if (first + row < rows && x < right_columns) q.x_right[(first + row) * q.m + x] = sum;
    }
  }

  // Adds up X'left in the tiles of the warps, where columns of X are rows, and writes it.
  __device__ void write_left() const {
    const int parts = q.pairs ? 2 : 1;
    for (int at = threadIdx.x; at < across * kCols / parts * kW; at += blockDim.x) {
      const int row = at / kW * parts, x = at % kW;
      const T* const from = tiles + row / kCols * kPerTile + row % kCols * kStride;
      T sum = 0, other = 0;
      for (int g = 0; g < groups; ++g) {
        sum += from[g * across * kPerTile + x];
        if (q.pairs) other += from[g * across * kPerTile + kStride + (x ^ 1)];
      }
      if (q.pairs) sum += x % 2 == 0 ? other : -other;
      if (row < columns && x < left_columns) q.x_left[at / kW * q.k + x] = sum;
    }
  }

 private:
  __device__ static int smaller(int64_t left, int64_t most) {
    return left < 0 ? 0 : left < most ? left : most;
  }
};

template <class T, int V, bool kWide>
__global__ void __launch_bounds__(kThreads, 2) skinny_kernel(SkinnyProblem<T> all, SkinnyPlan c, T* partial) {
  using B = SkinnyBlock<T, kWide>;
  constexpr int L = B::L, kStride = B::kStride, kW = B::kW, H = kW / (4 * L), R = kTileRows / 8;
  constexpr int kAcross = B::kCols / V, kDown = 32 / kAcross, kLoads = kTileRows / kDown;
  constexpr bool kEarly = V > 1 && !kWide;  // registers suffice to load the next tile before the products
  const B block(all, c, partial);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, member = warp % c.across, group = warp / c.across;
  const LanePlace place(lane);
  const int row = group * kTileRows + lane / kAcross, column = member * B::kCols + lane % kAcross * V;
  const int rows = column < block.columns ? block.rows : 0, step = c.groups * kTileRows;
  T* const tile = block.tiles + warp * B::kPerTile;

  T next[kLoads][V];
  const auto fetch = [&](int first) {
    const T* from = block.q.x + (first + row) * block.q.p + column;
#pragma unroll
    for (int e = 0; e < kLoads; ++e, from += kDown * block.q.p) {
#pragma unroll
      for (int v = 0; v < V; ++v) next[e][v] = 0;
      if (first + row + e * kDown < rows) load(from, next[e]);
    }
  };
  fetch(0);
  if (block.right_columns > 0) block.load_right();
  T sums_left[L][H][L] = {};
  for (int first = 0; first < block.rows; first += step) {
#pragma unroll
    for (int e = 0; e < kLoads; ++e) store(next[e], tile + (lane / kAcross + e * kDown) * kStride + lane % kAcross * V);
    if (block.left_columns > 0) block.load_left(first);
    __syncthreads();
    if (kEarly) fetch(first + step);
    if (block.left_columns > 0)
      multiply_transposed<kTileRows>(tile + place.eighth * L, kStride,
                                     block.left + group * kTileRows * kW + place.fourth * L, kW, sums_left);
    if (block.right_columns > 0) {
      T sums[R][H][L] = {};
      multiply<B::kCols>(tile + place.eighth * kStride, kStride,
                         block.right + member * B::kCols * kW + place.fourth * L, kW, sums);
      __syncwarp();
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int h = 0; h < H; ++h)
          store(sums[r][h], tile + (place.eighth + 8 * r) * kStride + (4 * h + place.fourth) * L);
    }
    if (!kEarly) fetch(first + step);
    __syncthreads();
    if (block.right_columns == 0) continue;
    block.write_right(first);
    __syncthreads();
  }
  if (block.left_columns == 0) return;
#pragma unroll
  for (int l = 0; l < L; ++l)
#pragma unroll
    for (int h = 0; h < H; ++h)
      store(sums_left[l][h], tile + (place.eighth * L + l) * kStride + (4 * h + place.fourth) * L);
  __syncthreads();
  block.write_left();
}

// Adds up partial sums. Lanes have a vector of elements each, and warps take turns with the partial sums. With the 32
// registers that nvcc takes by itself, it spills.
template <class T>
__global__ void __launch_bounds__(kThreads, 6) combine_kernel(SkinnyProblem<T> all, SkinnyPlan c, const T* partial) {
  constexpr int L = kLanes<T>, kEach = 32 * L;
  const SkinnyProblem<T> q = all.at(blockIdx.y);
  const int64_t of_right = ceil_div(c.right_each, kEach);
  const bool left = blockIdx.x >= of_right;
  const int64_t first = (left ? blockIdx.x - of_right : blockIdx.x) * kEach;
  const int64_t each = left ? c.left_each : c.right_each, count = left ? q.columns() * q.k : q.n * q.m;
  const int parts = left ? c.splits : c.strips;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* from = partial + blockIdx.y * c.each + (left ? c.strips * c.right_each : 0) + first + lane * L + warp * each;
  double sums[L] = {};
  if (first + lane * L < each) {
#pragma unroll 4
    for (int s = warp; s < parts; s += kWarps, from += kWarps * each) {
      T numbers[L];
      load(from, numbers);
#pragma unroll
      for (int l = 0; l < L; ++l) sums[l] += numbers[l];
    }
  }
  double* const shared = reinterpret_cast<double*>(shared_memory());
#pragma unroll
  for (int l = 0; l < L; ++l) shared[warp * kEach + lane * L + l] = sums[l];
  __syncthreads();
  if (threadIdx.x >= kEach || first + threadIdx.x >= count) return;
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[w * kEach + threadIdx.x];
  (left ? q.x_left : q.x_right)[first + threadIdx.x] = static_cast<T>(sum);
}

// `partial` has c.together * c.each elements.
template <class T>
cudaError_t both_products(const SkinnyProblem<T>& q, int64_t stack, const SkinnyPlan& c, T* partial,
                          cudaStream_t stream) {
  const auto kernel = c.vectors ? (c.wide ? skinny_kernel<T, kLanes<T>, true> : skinny_kernel<T, kLanes<T>, false>)
                                : (c.wide ? skinny_kernel<T, 1, true> : skinny_kernel<T, 1, false>);
  constexpr int64_t kEach = 32 * kLanes<T>;
  const int64_t combines = ceil_div(c.right_each, kEach) + ceil_div(c.left_each, kEach);
  for (int64_t first = 0; first < stack; first += c.together) {
    const unsigned count = std::min(c.together, stack - first);
    const SkinnyProblem<T> some = q.at(first);
    cudaError_t error = launch_large(kernel, dim3(int64_t{c.passes} * c.strips * c.splits, count),
                                     32 * c.across * c.groups, c.shared, stream, some, c, partial);
    if (error == cudaSuccess && combines > 0)
      error = launch(combine_kernel<T>, dim3(combines, count), kThreads, sizeof(double) * kWarps * kEach, stream, some,
                     c, partial);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sslkern::cuda
