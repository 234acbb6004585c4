// Products of a large matrix with few columns, from both sides in one read: X right and X'left.
#pragma once

#include "../common.h"
#include "tiles.h"

namespace sslkern {

constexpr int64_t kChunk = 256;   // most columns per chunk; one thread processes a chunk
constexpr int64_t kDepth = 32;    // rows of a chunk that stay in L1
constexpr int64_t kFew = 4;       // up to this many columns, a tile would be mostly zeros
constexpr int64_t kPieces = 16;   // tasks for the threads to share in a tall matrix
constexpr int64_t kSplit = 1024;  // least rows per task
constexpr int64_t kPadded = kChunk + kTile;

// Prefetches some rows of a matrix.
template <class T>
inline void fetch(const T* from, int64_t ld, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(from + i * ld + j, 0, 2);
}

// out (rows, n) += c in, where `in` is (count, n).
template <class T>
void add_product(T* out, int64_t out_ld, int64_t rows, const T* in, int64_t in_ld, int64_t count, const T* c,
                 int64_t c_row, int64_t c_col, int64_t n);

// out (4, 2) = the products of 4 rows of u with 2 rows of w.
template <class T>
void dots(const T* u, int64_t u_ld, const T* w, int64_t w_ld, int64_t n, T* out);

// out (rows, count) = the products of rows of u with rows of w.
template <class T>
void dots_with(const T* u, int64_t u_ld, int64_t rows, const T* w, int64_t w_ld, int64_t count, int64_t n, T* out,
               int64_t out_ld) {
  T block[8];
  for (int64_t i = 0; i < rows; i += rows - i < 4 ? 1 : 4)
    for (int64_t q = 0; q < count; q += 2) {
      const int64_t height = rows - i < 4 ? 1 : 4, width = std::min<int64_t>(2, count - q);
      dots(u + i * u_ld, height > 1 ? u_ld : 0, w + q * w_ld, width > 1 ? w_ld : 0, n, block);
      for (int64_t r = 0; r < height; ++r) std::copy_n(block + 2 * r, width, out + (i + r) * out_ld + q);
    }
}

// X (n, p), left (n, k), right (p, m), all row-major; k or m may be 0. Sums over rows run in order. Sums over columns
// run by chunks whose size depends on p alone, so the bits do not depend on the number of threads.
template <class T>
class SkinnyProducts {
 public:
  SkinnyProducts(const T* x, int64_t n, int64_t p, const T* left, int64_t k, const T* right = nullptr, int64_t m = 0)
      : x_(x),
        n_(n),
        p_(p),
        k_(k),
        m_(m),
        few_(k <= kFew && m <= kFew),
        chunk_(p < 2048 ? kChunk / 2 : kChunk),
        splits_(std::clamp<int64_t>(ceil_div(kPieces, std::max<int64_t>(1, chunks())), 1, ceil_div(n + 1, kSplit))),
        k_tiles_(ceil_div(k, kTile)),
        m_tiles_(ceil_div(m, kTile)),
        rows_(round_up(n, kTile)),
        left_(room_for<T>(few_ ? 0 : k_tiles_ * kTile * n)),
        right_(room_for<T>(few_ ? m * p : m_tiles_ * kTile * p)),
        parts_(room_for<T>(chunks() * rows_ * (few_ ? m : m_tiles_ * kTile))),
        given_(left) {
    for (int64_t t = 0; t < k_tiles_ && !few_; ++t)
      pack(left + t * kTile, 1, k, std::min(kTile, k - t * kTile), n, left_.get() + t * kTile * n);
    for (int64_t t = 0; t < m_tiles_ && !few_; ++t)
      pack(right + t * kTile, 1, m, std::min(kTile, m - t * kTile), p, right_.get() + t * kTile * p);
    for (int64_t j = 0; j < p && few_; ++j)
      for (int64_t r = 0; r < m; ++r) right_[r * p + j] = right[j * m + r];
  }

  int64_t chunks() const {
    return ceil_div(p_, chunk_);
  }

  // Calls use(chunk, j0, cols, sums) for chunks of the columns of X. `sums` has X'left for these columns; `sum` reads
  // it. The rows of a tall X are split too.
  template <class F>
  void run(const F& use) const {
    const int64_t size = std::max<int64_t>(k_tiles_, 1) * kChunk * kTile,
                  per_split = round_up(ceil_div(n_, splits_), kDepth);
    const auto sums = room_for<T>(splits_ > 1 ? chunks() * splits_ * size : 0);
    in_parallel(chunks() * splits_, per_split * chunk_ * (k_ + m_), [&](int64_t first, int64_t last) {
      std::vector<T> slab(kDepth * kPadded), own(splits_ > 1 ? 0 : size);
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t chunk = piece / splits_, j0 = chunk * chunk_, cols = std::min(chunk_, p_ - j0);
        const int64_t begin = piece % splits_ * per_split, end = std::min(n_, begin + per_split);
        T* const to = splits_ > 1 ? sums.get() + piece * size : own.data();
        if (few_ || begin >= end) std::fill_n(to, size, T(0));
        for (int64_t i0 = begin; i0 < end; i0 += kDepth)
          few_ ? stream(chunk, i0, j0, cols, to) : tile(chunk, i0, j0, cols, slab.data(), to, i0 > begin);
        if (splits_ == 1) use(chunk, j0, cols, to);
      }
    });
    if (splits_ == 1) return;
    in_parallel(chunks(), splits_ * size, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        T* const to = sums.get() + chunk * splits_ * size;
        for (int64_t split = 1; split < splits_; ++split)
          for (int64_t at = 0; at < size; ++at) to[at] += to[split * size + at];
        use(chunk, chunk * chunk_, std::min(chunk_, p_ - chunk * chunk_), to);
      }
    });
  }

  // Entry (j0 + j, r) of X'left.
  static T sum(const T* sums, bool few, int64_t r, int64_t j) {
    return few ? sums[r * kChunk + j] : sums[(r / kTile * kChunk + j) * kTile + r % kTile];
  }

  // Calls use(i, row) for every row of X right, in parallel. Only after `run`.
  template <class F>
  void rows(const F& use) const {
    if (m_ == 0) return;
    const int64_t stride = few_ ? m_ : m_tiles_ * kTile;
    in_parallel(ceil_div(rows_, kDepth), kDepth * m_ * chunks(), [&](int64_t first, int64_t last) {
      std::vector<T> sum(m_);
      for (int64_t i = first * kDepth; i < std::min(n_, last * kDepth); ++i) {
        std::fill(sum.begin(), sum.end(), T(0));
        for (int64_t chunk = 0; chunk < chunks(); ++chunk)
          for (int64_t r = 0; r < m_; ++r) sum[r] += parts_[(chunk * rows_ + i) * stride + r];
        use(i, sum.data());
      }
    });
  }

  bool few() const {
    return few_;
  }

 private:
  const T* const x_;
  const int64_t n_, p_, k_, m_;
  const bool few_;
  const int64_t chunk_, splits_, k_tiles_, m_tiles_, rows_;
  const std::unique_ptr<T[]> left_, right_;  // in tiles of 16 columns; with few columns, `right` is transposed
  const std::unique_ptr<T[]> parts_;         // (chunks, rows, m): X right, summed over the columns of a chunk
  const T* const given_;

  // Processes some rows of a chunk through a copy of them. In place, the lines of a column of X with rows of 2^n
  // elements would evict each other from L1.
  void tile(int64_t chunk, int64_t i0, int64_t j0, int64_t cols, T* slab, T* sums, bool add) const {
    const TileProduct<T> product;
    const int64_t depth = std::min(kDepth, n_ - i0), side = m_tiles_ * kTile;
    for (int64_t i = 0; i < depth; ++i) std::copy_n(x_ + (i0 + i) * p_ + j0, cols, slab + i * kPadded);
    const int64_t next = std::min(kDepth, n_ - i0 - depth);
    for (int64_t j = 0; j < cols; j += kTile) {
      fetch(x_ + (i0 + depth) * p_ + j0 + j, p_, next, kTile);
      for (int64_t t = 0; t < k_tiles_; ++t)
        product(slab + j, 1, kPadded, left_.get() + (t * n_ + i0) * kTile, depth, sums + (t * kChunk + j) * kTile,
                kTile, add);
    }
    for (int64_t i = 0; i < depth; i += kTile)
      for (int64_t t = 0; t < m_tiles_; ++t)
        product(slab + i * kPadded, kPadded, 1, right_.get() + (t * p_ + j0) * kTile, cols,
                parts_.get() + (chunk * rows_ + i0 + i) * side + t * kTile, side, false);
  }

  void stream(int64_t chunk, int64_t i0, int64_t j0, int64_t cols, T* sums) const {
    const int64_t depth = std::min(kDepth, n_ - i0);
    const T* x = x_ + i0 * p_ + j0;
    if (k_ > 0) add_product(sums, kChunk, k_, x, p_, depth, given_ + i0 * k_, 1, k_, cols);
    dots_with(x, p_, depth, right_.get() + j0, p_, m_, cols, parts_.get() + (chunk * rows_ + i0) * m_, m_);
  }
};

}  // namespace sslkern
