// All pairs of rows, in square blocks that stay in cache: products by register tiles, similarities, masks, gradients.
// Memory is one block per thread, plus what is stored per row.
#pragma once

#include "pair_order.h"
#include "pair_rows.h"

namespace sslkern {

constexpr int64_t kPairRows = 256;  // most rows per side of a block
// Bits of a mask: drop the diagonal, keep equal labels, keep different labels.
constexpr int64_t kOffdiag = 1, kSame = 2, kDifferent = 4;

struct Block {
  int64_t i0, rows, j0, cols;
  bool diagonal;  // a block on the diagonal of a matrix with itself
};

// Turns products into exponents: scaled products or scaled squared distances.
template <class T>
struct Similarity {
  T scale;
  bool squared, self_pairs;
  const T *x_squares, *y_squares;

  void operator()(T* t, const Block& b, int64_t r) const {
    const int64_t i = b.i0 + r;
    if (!squared) return scale_row(t, b.cols, scale);
    distance_row(t, b.cols, scale, x_squares[i], y_squares + b.j0);
    if (self_pairs && b.diagonal) t[r] = 0;
  }
};

// Drops the pairs that a mask excludes.
class Mask {
 public:
  // x and y: labels of n rows and m columns, or null. Columns come in blocks of `size`. A `partner` of p > 0 also drops
  // the pairs of i with i - p and i + p.
  Mask(int64_t bits, const int64_t* x, const int64_t* y, int64_t m, int64_t size, int64_t partner = 0)
      : bits_(bits), size_(size), partner_(partner), x_(x), y_(y) {
    for (int64_t j = 0; x != nullptr && j < m; j += size) {
      const auto [least, most] = std::minmax_element(y + j, y + std::min(m, j + size));
      ranges_.push_back({*least, *most});
    }
  }

  template <class T>
  void drop(T* t, const Block& b, int64_t r, T value) const {
    if (bits_ == 0) return;
    const int64_t i = b.i0 + r, at = i - b.j0;
    if ((bits_ & kOffdiag) && at >= 0 && at < b.cols) t[at] = value;
    for (const int64_t j : {at - partner_, at + partner_})
      if (partner_ > 0 && j >= 0 && j < b.cols) t[j] = value;
    if (x_ == nullptr) return;
    const bool equal = (bits_ & kDifferent) != 0;
    const auto [least, most] = ranges_[b.j0 / size_];
    if (x_[i] >= least && x_[i] <= most) {
      drop_row(t, b.cols, x_[i], y_ + b.j0, equal, value);
    } else if (!equal) {  // no label of the block is equal, as often with sorted labels
      std::fill_n(t, b.cols, value);
    }
  }

 private:
  const int64_t bits_, size_, partner_;
  const int64_t *const x_, *const y_;
  std::vector<std::pair<int64_t, int64_t>> ranges_;
};

// Rows per block. The pairs of a block stay in L2, and there are at least 4 blocks per side. Rows of 768 elements do
// not stay in L2 too, but still need large blocks: reads grow with the side of a block, and arithmetic with its square.
inline int64_t block_rows(int64_t n) {
  int64_t rows = kPairRows;
  while (rows > kTile && 4 * rows > n) rows /= 2;
  return rows;
}

// The same for products of rows of d elements. Blocks that would take only microseconds are made larger.
inline int64_t block_rows(int64_t n, int64_t d) {
  constexpr int64_t least = 1 << 17;  // multiplications
  int64_t rows = block_rows(n);
  while (rows < std::min(kPairRows, n) && 4 * rows * rows * d <= least) rows *= 2;
  return rows;
}

template <class T>
class Pairs {
 public:
  Pairs(const Rows<T>& x, const Rows<T>& y, bool self_pairs)
      : Pairs(x, y, self_pairs, block_rows(std::min(x.n, y.n), x.d), kTile) {}
  Pairs(const Rows<T>& x, const Rows<T>& y, bool self_pairs, int64_t size, int64_t padding)
      : x_(x), y_(y), self_pairs_(self_pairs), size_(size), ld_(size + padding) {}

  int64_t ld() const {
    return ld_;
  }
  int64_t size() const {
    return size_;
  }
  int64_t row_blocks() const {
    return ceil_div(x_.n, size_);
  }

  template <class F>
  void each_block(const F& f) const {
    const int64_t work = size_ * size_ * x_.d;
    for_pairs(ceil_div(x_.n, size_), ceil_div(y_.n, size_), self_pairs_, work, [&](int64_t i, int64_t j) {
      f(Block{i * size_, std::min(size_, x_.n - i * size_), j * size_, std::min(size_, y_.n - j * size_),
              self_pairs_ && i == j});
    });
  }

  // Calls f(block, tile, spare). tile (rows, ld) has the products of rows of x and y; spare is a buffer of the same
  // size.
  template <class F>
  void run(const F& f) const {
    each_block([&](const Block& block) {
      const auto room = room_for<T>(2 * size_ * ld_);
      products(x_, y_, block, room.get());
      f(block, room.get(), room.get() + size_ * ld_);
    });
  }

  // left right' over a block, for two sides of equal width.
  void products(const Rows<T>& left, const Rows<T>& right, const Block& b, T* out) const {
    const TileProduct<T> product;
    const int64_t d = left.d;
    for (int64_t j = 0; j < b.cols; j += 2 * kTile)
      for (int64_t i = 0; i < b.rows; i += kTile)
        product(left.across + (b.i0 + i) * d, 1, kTile, right.across + (b.j0 + j) * d, kTile * d,
                b.cols - j > kTile ? 2 : 1, d, out + i * ld_ + j, ld_, false);
  }

  // Row sums += tile right. `add_transposed`: column sums += tile' left.
  void add(const T* tile, const Block& b, const Rows<T>& right, RowSums<T>& to) const {
    const TileProduct<T> product;
    for (int64_t t = 0; t < right.panels; t += 2)
      for (int64_t i = 0; i < b.rows; i += kTile)
        product(tile + i * ld_, ld_, 1, right.along + (t * right.n + b.j0) * kTile, right.n * kTile,
                std::min<int64_t>(2, right.panels - t), b.cols, to.sums + (b.i0 + i) * to.ld + t * kTile, to.ld, true);
  }
  void add_transposed(const T* tile, const Block& b, const Rows<T>& left, RowSums<T>& to) const {
    const TileProduct<T> product;
    for (int64_t t = 0; t < left.panels; t += 2)
      for (int64_t j = 0; j < b.cols; j += kTile)
        product(tile + j, 1, ld_, left.along + (t * left.n + b.i0) * kTile, left.n * kTile,
                std::min<int64_t>(2, left.panels - t), b.rows, to.sums + (b.j0 + j) * to.ld + t * kTile, to.ld, true);
  }

  // Adds the row and column sums of a tile.
  void add_weights(const T* tile, const Block& b, std::vector<double>* rows, std::vector<double>* columns) const {
    T of_rows[kPairRows], of_columns[kPairRows] = {};
    sum_block(tile, b.rows, b.cols, ld_, of_rows, columns != nullptr ? of_columns : nullptr);
    for (int64_t i = 0; rows != nullptr && i < b.rows; ++i) (*rows)[b.i0 + i] += of_rows[i];
    for (int64_t j = 0; columns != nullptr && j < b.cols; ++j) (*columns)[b.j0 + j] += of_columns[j];
  }

 private:
  const Rows<T>&x_, &y_;
  const bool self_pairs_;
  const int64_t size_, ld_;
};

// Gradients with respect to x and y, from weights w_ij: sum_j w_ij y_j, or 2 sum_j w_ij (x_i - y_j) for distances. For
// a matrix with itself, w_ij is the weight of both (i, j) and (j, i).
template <class T>
class Gradients {
 public:
  Gradients(const Tensor& like, const Rows<T>& x, const Rows<T>& y, bool self_pairs, bool squared, bool need_x,
            bool need_y)
      : x_(x),
        y_(y),
        self_pairs_(self_pairs),
        squared_(squared),
        need_x_(need_x),
        need_y_(need_y && !self_pairs),
        of_x_(like, need_x ? x.padded : 0, x.d),
        of_y_(like, need_y_ ? y.padded : 0, y.d) {}

  void add(const Pairs<T>& pairs, T* tile, const Block& b) {
    for (int64_t r = 0; r < b.rows && squared_ && b.diagonal; ++r)
      tile[r * (pairs.ld() + 1)] = 0;  // distance 0: its terms cancel, but not to the last bit
    RowSums<T>& below = self_pairs_ ? of_x_ : of_y_;
    const bool columns = self_pairs_ ? need_x_ && !b.diagonal : need_y_;
    if (need_x_) pairs.add(tile, b, y_, of_x_);
    if (columns) pairs.add_transposed(tile, b, x_, below);
    if (squared_) pairs.add_weights(tile, b, need_x_ ? &of_x_.weights : nullptr, columns ? &below.weights : nullptr);
  }

  void write(T* grad_x, T* grad_y) const {
    if (need_x_) write(x_, of_x_, grad_x);
    if (need_y_) write(y_, of_y_, grad_y);
  }

 private:
  void write(const Rows<T>& side, const RowSums<T>& from, T* to) const {
    in_parallel(side.n, side.d, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T *sum = from.sums + i * from.ld, *x = side.x + i * side.d;
        T* out = to + i * side.d;
        const T w = static_cast<T>(from.weights[i]);
        for (int64_t k = 0; k < side.d; ++k) out[k] = squared_ ? 2 * (w * x[k] - sum[k]) : sum[k];
      }
    });
  }

  const Rows<T>&x_, &y_;
  const bool self_pairs_, squared_, need_x_, need_y_;
  RowSums<T> of_x_, of_y_;
};

}  // namespace sslkern
