// The first steps of a rank-k update: M = U'a, W = [M b], K = W'W, A = a'a, and the coefficients C and D. Also how a
// matrix is cut, and the workspace between the steps.
#pragma once

#include "coefficients.cuh"
#include "tiles.cuh"

namespace sslkern::cuda {

constexpr int kColumns = 32;         // columns of U per step of `gather`
constexpr int kDepth = 8 * kWarps;   // rows of a in shared memory
constexpr int64_t kGathers = 32;     // most partial sums of K and A; one block adds them up
constexpr int64_t kShare = 512;      // least rows of a per partial sum
constexpr int64_t kSmall = 1 << 16;  // most elements of a matrix that one block updates
constexpr int64_t kAlone = 1 << 14;  // the same for a small stack, which leaves the GPU idle
constexpr int64_t kMany = 256;       // matrices of a stack that keep the GPU busy
constexpr int64_t kResident = 1024;  // matrices per launch, where one block updates one
constexpr int64_t kTogether = 64;    // the same for large matrices

template <class T, bool kWide>
constexpr int kProjected = kWide ? 16 : 2 * kLanes<T>;  // columns of a per thread in `project`

// A stack of matrices: U (n, p), a (n, k), b (p, k). With `pairs`, elements are complex and b is (p / 2, k). Since n >=
// p, indices of columns and of places in a panel fit an int.
template <class T>
struct Problem {
  T* u;
  const T *a, *b;
  int64_t n;
  int p, k;
  bool pairs;
  int retraction;

  __host__ __device__ Problem at(int64_t index) const {
    Problem one = *this;
    one.u += index * n * p;
    one.a += index * n * k;
    one.b += index * (pairs ? p / 2 : p) * k;
    return one;
  }
};

// How a matrix is cut, from its shape alone. W has m columns and p rows, stored with ld columns and `padded` rows; the
// padding is zero.
struct Cut {
  int m, ld, tiles, padded, splits, gathers, per_gather;
  int64_t per_split, per_share;  // rows of U per split; rows of a per partial sum of A
  int slices, team;              // slices of U's columns, each for one warp; warps per panel
  bool wide;                     // W has more columns than the narrow tile
};

template <class T>
Cut cut_of(int64_t n, int64_t p, int64_t k) {
  Cut c{};
  c.m = 2 * k;
  c.wide = c.m > kTile<T, false>;
  const int64_t tile = c.wide ? kTile<T, true> : kTile<T, false>, tiles = ceil_div(c.m, tile);
  c.tiles = tiles;
  c.ld = tiles * tile;
  c.padded = ceil_div(p, kColumns) * kColumns;
  const int64_t each = c.wide ? kProjected<T, true> : kProjected<T, false>;
  const int64_t blocks = ceil_div(p, 32 * kLanes<T>) * ceil_div(k, each);
  const int64_t splits = std::clamp<int64_t>(ceil_div(kBlocks, blocks), 1, ceil_div(n, 2 * kDepth));
  c.per_split = ceil_div(ceil_div(n, splits), kDepth) * kDepth;
  c.splits = ceil_div(n, c.per_split);
  c.per_gather = ceil_div(c.padded, kGathers * kColumns) * kColumns;
  c.gathers = std::max(ceil_div(c.padded, c.per_gather), std::min(ceil_div(n, kShare), kGathers));
  c.per_share = ceil_div(n, c.gathers);
  c.slices = std::clamp<int64_t>(kWarps / tiles, 1, power_of_two_from(ceil_div(p, kStep<T>)));
  c.team = std::min<int64_t>(power_of_two_from(tiles * c.slices), kWarps);
  return c;
}

// Workspace of one matrix. The workspace of the next matrix is `each` bytes further.
template <class T>
struct Room {
  T *partial, *w, *transposed, *factor, *scale;  // (splits, k, padded), (padded, ld), (ld, padded), (m + k, ld), (m)
  double *grams, *small;                         // (gathers, m m + k k); memory of SmallMatrices
  unsigned* arrived;
  int64_t each;

  __host__ __device__ Room at(int64_t index) const {
    Room one = *this;
    const auto move = [&](auto*& pointer) { pointer += index * each / static_cast<int64_t>(sizeof(*pointer)); };
    move(one.partial), move(one.w), move(one.transposed), move(one.factor), move(one.scale);
    move(one.grams), move(one.small), move(one.arrived);
    return one;
  }
  Room(unsigned char* memory, const Cut& c, int64_t k) {
    unsigned char* next = memory;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
      next += ceil_div(count * sizeof(*pointer), kVectorBytes) * kVectorBytes;
    };
    take(partial, c.splits * k * c.padded);
    take(w, c.padded * c.ld);
    take(transposed, c.padded * c.ld);
    take(factor, (c.m + k) * c.ld);
    take(scale, c.m);
    take(grams, c.gathers * (c.m * c.m + k * k));
    take(small, SmallMatrices::numbers(k));
    take(arrived, 1);
    each = next - memory;
  }
};

// Partial sums of columns k0, k0 + 1, ... of M over a split of the rows, for a tile of its rows (columns of U). Each
// lane has V columns; each warp has 8 of every 64 rows.
template <class T, int V, bool kWide>
__device__ void project(const Problem<T>& q, const Cut& c, int tile, int split, int k0, T* partial) {
  constexpr int K = kProjected<T, kWide>, L = kLanes<T>, kRows = kDepth / kWarps, kAtOnce = 4;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int j = (tile * 32 + lane) * V;
  const int64_t begin = split * c.per_split;
  const int rows = q.n - begin < c.per_split ? q.n - begin : c.per_split;
  const T *const from = q.u + begin * q.p + j, *const a = q.a + begin * q.k + k0;
  T sums[K][V] = {};
  for (int i0 = 0; i0 < rows; i0 += kDepth) {
    T u[kAtOnce][V];
    const auto fetch = [&](int first) {
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const int i = i0 + warp * kRows + first + e;
#pragma unroll
        for (int v = 0; v < V; ++v) u[e][v] = 0;
        if (i < rows && j < q.p) load(from + static_cast<int64_t>(i) * q.p, u[e]);
      }
    };
    fetch(0);
    __syncthreads();  // all threads have read the rows before
    for (int at = threadIdx.x; at < kDepth * K; at += kThreads) {
      const int i = i0 + at / K, r = at % K;
      shared[at] = i < rows && k0 + r < q.k ? a[static_cast<int64_t>(i) * q.k + r] : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int first = 0; first < kRows; first += kAtOnce) {
      if (first > 0) fetch(first);
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e)
#pragma unroll
        for (int r = 0; r < K; r += L) {
          T x[L];
          load(shared + (warp * kRows + first + e) * K + r, x);
#pragma unroll
          for (int l = 0; l < L; ++l)
#pragma unroll
            for (int v = 0; v < V; ++v) sums[r + l][v] += x[l] * u[e][v];
        }
    }
  }
  for (int half = kWarps / 2; half > 0; half /= 2) {
    T* const given = shared + (warp % half * K * V) * 32 + lane;
    __syncthreads();
#pragma unroll
    for (int at = 0; at < K * V; ++at)
      if (warp >= half && warp < 2 * half) given[at * 32] = sums[at / V][at % V];
    __syncthreads();
#pragma unroll
    for (int at = 0; at < K * V; ++at)
      if (warp < half) sums[at / V][at % V] += given[at * 32];
  }
  if (warp > 0 || j >= q.p) return;
#pragma unroll
  for (int r = 0; r < K; ++r)
    if (k0 + r < q.k) store(sums[r], partial + static_cast<int64_t>(split * q.k + k0 + r) * c.padded + j);
}

// a'a of some rows, (S, S) sums a thread. With few of them, several threads share the rows of each.
template <int S, class T>
__device__ void square(const T* a, int rows, int k, double* out) {
  const int across = k / S, tiles = across * across, parts = tiles < kThreads ? kThreads / tiles : 1;
  double* const shares = parts > 1 ? reinterpret_cast<double*>(shared_memory()) : out;
  each(tiles * parts, [&](int at) {
    const int part = at / tiles, r = at % tiles / across, t = at % across;
    double sums[S][S] = {};
    for (int i = part; i < rows; i += parts) {
      const T* const row = a + static_cast<int64_t>(i) * k;
#pragma unroll
      for (int x = 0; x < S; ++x)
#pragma unroll
        for (int y = 0; y < S; ++y) sums[x][y] += static_cast<double>(row[r + x * across]) * row[t + y * across];
    }
#pragma unroll
    for (int x = 0; x < S; ++x)
#pragma unroll
      for (int y = 0; y < S; ++y) shares[(part * k + r + x * across) * k + t + y * across] = sums[x][y];
  });
  if (parts > 1)
    each(k * k, [&](int at) { out[at] = sum_of<8>(parts, [&](int part) { return shares[part * k * k + at]; }); });
}

// Computes the rows of W for some columns of U and their part of K, and the part of A from some rows of a.
template <class T>
__device__ void gather(const Problem<T>& q, const Cut& c, int index, const Room<T>& room) {
  const int k = q.k, m = c.m, w_stride = m + 1;
  T *const sums = reinterpret_cast<T*>(shared_memory()), *const w = sums + k * (kColumns + 1);
  double* const gram = room.grams + index * (m * m + k * k);
  const int begin = index * c.per_gather, end = min(begin + c.per_gather, c.padded);
  for (int j0 = begin; j0 < end; j0 += kColumns) {
    each(k * kColumns, [&](int at) {
      const int r = at / kColumns;
      const int j = j0 + at % kColumns;
      const T* const partial = room.partial + r * c.padded + j;
      const double sum = sum_of<8>(j < q.p ? c.splits : 0, [&](int64_t s) { return partial[s * k * c.padded]; });
      sums[r * (kColumns + 1) + at % kColumns] = static_cast<T>(sum);
    });
    each(c.ld * kColumns, [&](int at) {
      const int x = at % c.ld, row = at / c.ld, r = x % k, part = row % 2;
      T number = 0;
      if (x < m && j0 + row < q.p && !q.pairs) {
        number = x < k ? sums[r * (kColumns + 1) + row] : q.b[(j0 + row) * k + r];
      } else if (x < m && j0 + row < q.p) {  // conj(u) a, or b: a column for the real part and one for the imaginary
        const T *first = sums + (r - r % 2) * (kColumns + 1) + row - part, *second = first + kColumns + 1;
        const T* b = q.b + (j0 + row) / 2 * k + r - r % 2;
        const T real = x < k ? first[0] + second[1] : b[0], imaginary = x < k ? second[0] - first[1] : b[1];
        number = r % 2 == part ? real : part == 0 ? imaginary : -imaginary;
      }
      if (x < m) w[row * w_stride + x] = number;
      room.w[(j0 + row) * c.ld + x] = number;
    });
    for (int at = threadIdx.x; at < c.ld * kColumns; at += blockDim.x) {
      const int x = at / kColumns, row = at % kColumns;
      room.transposed[x * c.padded + j0 + row] = x < m ? w[row * w_stride + x] : T(0);
    }
    const auto left = [=](int x, int row) { return static_cast<double>(w[row * w_stride + x]); };
    const auto right = [=](int row, int x) { return static_cast<double>(w[row * w_stride + x]); };
    square_products(m, kColumns, left, right,
                    [=](int x, int y, double sum) { gram[x * m + y] = j0 == begin ? sum : gram[x * m + y] + sum; });
  }
  if (begin >= end) each(m * m, [&](int at) { gram[at] = 0; });
  const int64_t first = index * c.per_share, rest = q.n - first;
  const int rows = rest < 0 ? 0 : rest < c.per_share ? rest : c.per_share;
  if (k >= 64 && k % 4 == 0)
    square<4>(q.a + first * k, rows, k, gram + m * m);
  else if (k % 2 == 0)
    square<2>(q.a + first * k, rows, k, gram + m * m);
  else
    square<1>(q.a + first * k, rows, k, gram + m * m);
}

// C above D, and the scales that make the columns of a and b equally long.
template <class T>
__device__ void coefficients(const Problem<T>& q, const Cut& c, const Room<T>& room, double* memory) {
  const SmallMatrices small(memory, q.k);
  const int k = q.k, m = c.m;
  double *const raw = small.free[0], *const scale = small.free[1];  // unscaled A (k, k), and the scales (m)
  each(m * m + k * k, [&](int at) {
    const double sum = sum_of<16>(c.gathers, [&](int64_t g) { return room.grams[g * (m * m + k * k) + at]; });
    (at < m * m ? small.gram[at] : raw[at - m * m]) = sum;
  });
  each(k, [&](int r) {
    const auto square = [&](int s) { return raw[s * k + s]; };
    const double squares = q.pairs ? square(r - r % 2) + square(r - r % 2 + 1) : square(r);
    const double ratio = sqrt(sqrt(squares / small.gram[(k + r) * (m + 1)]));
    const bool usable = isfinite(ratio) && ratio > 0;
    room.scale[r] = static_cast<T>(usable ? 1 / ratio : 1);
    room.scale[k + r] = static_cast<T>(usable ? ratio : 1);
    scale[r] = room.scale[r];
    scale[k + r] = room.scale[k + r];
  });
  each(k * k, [&](int at) {
    const int r = at / k, s = at % k;
    double sum = raw[at];
    if (q.pairs) {
      const double* block = raw + (r - r % 2) * k + s - s % 2;
      const double real = block[0] + block[k + 1], imaginary = block[1] - block[k];
      sum = r % 2 == s % 2 ? real : r % 2 == 0 ? imaginary : -imaginary;
    }
    small.outer[at] = sum * scale[r] * scale[s];
  });
  each(m * m, [&](int at) { small.gram[at] *= scale[at / m] * scale[at % m]; });
  each((m + k) * (c.ld - m), [&](int at) { room.factor[at / (c.ld - m) * c.ld + m + at % (c.ld - m)] = 0; });
  Solver(small, k, sizeof(T) == 8 ? 1e-17 : 1e-9).solve(q.retraction, [&](int i, int j, double number) {
    room.factor[i * c.ld + j] = static_cast<T>(number);
  });
}

}  // namespace sslkern::cuda
