// All pairs of rows by square blocks that stay in cache: their products by tiles in registers, what becomes of these,
// and the gradients. No more is kept than a block per thread and what belongs to the rows.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>

#include "../common.h"
#include "exponents.h"
#include "tiles.h"

namespace sslkern {

// Kernels index contiguous memory; any other layout is copied first.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : stable::contiguous(t);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t.has_value() ? std::make_optional(dense(*t)) : std::nullopt;
}

constexpr int64_t kPairRows = 256;                         // of a side, at most
constexpr int64_t kOthers = 1, kSame = 2, kDifferent = 4;  // bits of a mask

// Rows of a matrix (n, d) as tiles take them.
template <class T>
struct Rows {
  const T* x;
  int64_t n, d, padded, panels;
  const Tensor across_memory, along_memory;
  T* const across;  // (n / 16, d, 16): 16 rows, a column of them at a time
  T* const along;   // (d / 16, n, 16): 16 columns, a row of them at a time
  std::vector<T> squares;

  Rows(const Tensor& like, const T* x, int64_t n, int64_t d, bool for_products, bool for_sums, bool with_squares)
      : x(x),
        n(n),
        d(d),
        padded(round_up(n, kTile)),
        panels(ceil_div(d, kTile)),
        across_memory(fresh(like, {for_products ? padded * d : 0}, dtype_of<T>())),
        along_memory(fresh(like, {for_sums ? panels * kTile * n : 0}, dtype_of<T>())),
        across(data<T>(across_memory)),
        along(data<T>(along_memory)) {
    if (for_products) {
      in_parallel(padded / kTile, kTile * d, [&](int64_t first, int64_t last) {
        for (int64_t g = first; g < last; ++g)
          pack(x + g * kTile * d, d, 1, std::min(kTile, n - g * kTile), d, across + g * kTile * d);
      });
    }
    if (for_sums) {
      in_parallel(panels, kTile * n, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
          pack(x + t * kTile, 1, d, std::min(kTile, d - t * kTile), n, along + t * kTile * n);
      });
    }
    if (!with_squares) return;
    squares.resize(padded);
    for (int64_t i = 0; i < n; ++i) squares[i] = dot_row(x + i * d, x + i * d, d);
  }

  // The largest norm; NaN where there is one.
  T largest_norm() const {
    T most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T square = dot_row(x + i * d, x + i * d, d);
      if (!(square <= most)) most = square;
      if (std::isnan(most)) break;
    }
    return std::sqrt(most);
  }
};

// Sums over pairs that belong to the rows of a side: (padded, panels * 16) numbers, and one per row beside them.
template <class T>
struct RowSums {
  int64_t ld;
  const Tensor memory;
  T* const sums;
  std::vector<double> weights;

  RowSums(const Tensor& like, int64_t padded, int64_t d)
      : ld(round_up(d, kTile)),
        memory(fresh(like, {padded * ld}, dtype_of<T>())),
        sums(data<T>(memory)),
        weights(padded) {
    in_parallel(padded, ld, [&](int64_t first, int64_t last) { std::fill(sums + first * ld, sums + last * ld, T(0)); });
  }
};

struct Block {
  int64_t i0, rows, j0, cols;
  bool diagonal;  // of a matrix with itself: all pairs of some rows
};

// What makes an exponent of a product.
template <class T>
struct Similarity {
  T scale;
  bool squared, own;
  const T *x_squares, *y_squares;

  void operator()(T* t, const Block& b, int64_t r) const {
    const int64_t i = b.i0 + r;
    if (!squared) return scale_row(t, b.cols, scale);
    distance_row(t, b.cols, scale, x_squares[i], y_squares + b.j0);
    if (own && b.diagonal) t[r] = 0;
  }
};

// Pairs that do not count.
class Mask {
 public:
  // Labels of n rows and m columns, or null; columns by blocks of `size`.
  Mask(int64_t bits, const int64_t* x, const int64_t* y, int64_t m, int64_t size)
      : bits_(bits), size_(size), x_(x), y_(y) {
    for (int64_t j = 0; x != nullptr && j < m; j += size) {
      const auto [least, most] = std::minmax_element(y + j, y + std::min(m, j + size));
      ranges_.push_back({*least, *most});
    }
  }

  template <class T>
  void drop(T* t, const Block& b, int64_t r, T value) const {
    if (bits_ == 0) return;
    const int64_t i = b.i0 + r, at = i - b.j0;
    if ((bits_ & kOthers) && at >= 0 && at < b.cols) t[at] = value;
    if (x_ == nullptr) return;
    const bool equal = (bits_ & kDifferent) != 0;
    const auto [least, most] = ranges_[b.j0 / size_];
    if (x_[i] >= least && x_[i] <= most) {
      drop_row(t, b.cols, x_[i], y_ + b.j0, equal, value);
    } else if (!equal) {  // labels in order, as samples have them, meet no other label of a block
      std::fill_n(t, b.cols, value);
    }
  }

 private:
  const int64_t bits_, size_;
  const int64_t *const x_, *const y_;
  std::vector<std::pair<int64_t, int64_t>> ranges_;
};

// f(i, j) for the pairs (i, j) = pair(k), k in [0, count), i and j out of `things`, or i < 0 where there is none; to
// each thing one thread at a time, in the order of k, whatever the number of threads. Whoever is free takes the next
// pair, and waits for those before it that share a thing with it: all of these are being worked on. At a barrier all
// would wait for the slowest.
template <class Pair, class F>
void for_each_in_order(int64_t count, int64_t things, int64_t work, const Pair& pair, const F& f) {
  std::mutex taking;
  int64_t next = 0;
  std::vector<int64_t> taken(things);
  std::vector<std::atomic<int64_t>> done(things);
  std::atomic<bool> failed{false};
  const auto await = [&](int64_t thing, int64_t turn) {
    for (int spins = 0; done[thing].load(std::memory_order_acquire) < turn && !failed; ++spins)
      if (spins > 1000) std::this_thread::yield();
  };
  in_parallel(count, work, [&](int64_t, int64_t) {
    try {
      while (!failed) {
        std::unique_lock lock(taking);
        if (next == count) return;
        const auto [i, j] = pair(next++);
        if (i < 0) continue;
        const int64_t turn_i = taken[i]++, turn_j = i == j ? turn_i : taken[j]++;
        lock.unlock();
        await(i, turn_i);
        await(j, turn_j);
        if (!failed) f(i, j);
        done[i].fetch_add(1, std::memory_order_release);
        if (i != j) done[j].fetch_add(1, std::memory_order_release);
      }
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

// f(i, j) for all pairs of `nx` and `ny` blocks, or, of one side's `own`, for i <= j; in rounds, in each of which no
// block meets two others.
template <class F>
void for_pairs(int64_t nx, int64_t ny, bool own, int64_t work, const F& f) {
  using Two = std::pair<int64_t, int64_t>;
  if (own) {
    const int64_t half = ceil_div(nx, 2), others = 2 * half - 1;  // as a tournament: one stays, the others go round
    const auto pair = [&](int64_t k) -> Two {
      if (k < nx) return {k, k};
      const int64_t round = (k - nx) / half, place = (k - nx) % half;
      const int64_t a = place == 0 ? others : (round + place) % others, b = (round - place + others) % others;
      return a < nx && b < nx ? Two{std::min(a, b), std::max(a, b)} : Two{-1, -1};
    };
    return for_each_in_order(nx + (nx > 1 ? others * half : 0), nx, work, pair, f);
  }
  const int64_t few = std::min(nx, ny), many = std::max(nx, ny);
  const auto pair = [&](int64_t k) -> Two { return {k % few, few + (k / few + k % few) % many}; };
  for_each_in_order(few * many, few + many, work, pair,
                    [&](int64_t a, int64_t b) { nx == few ? f(a, b - few) : f(b - few, a); });
}

// Rows of a block: its pairs stay in L2, and there are 4 blocks or more. Rows of 768 numbers do not stay there as well,
// and still want large blocks: what is read grows with a block's side, and what is done with its square.
inline int64_t block_rows(int64_t n) {
  int64_t rows = kPairRows;
  while (rows > kTile && 4 * rows > n) rows /= 2;
  return rows;
}

template <class T>
class Pairs {
 public:
  Pairs(const Rows<T>& x, const Rows<T>& y, bool own) : Pairs(x, y, own, block_rows(std::min(x.n, y.n)), kTile) {}
  Pairs(const Rows<T>& x, const Rows<T>& y, bool own, int64_t size, int64_t padding)
      : x_(x), y_(y), own_(own), size_(size), ld_(size + padding) {}

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
    for_pairs(ceil_div(x_.n, size_), ceil_div(y_.n, size_), own_, work, [&](int64_t i, int64_t j) {
      f(Block{i * size_, std::min(size_, x_.n - i * size_), j * size_, std::min(size_, y_.n - j * size_),
              own_ && i == j});
    });
  }

  // f(block, tile, spare), tile (rows, ld) being products of rows of x and y; spare is as large as it.
  template <class F>
  void run(const F& f) const {
    each_block([&](const Block& block) {
      const auto room = room_for<T>(2 * size_ * ld_);
      products(x_, y_, block, room.get());
      f(block, room.get(), room.get() + size_ * ld_);
    });
  }

  // left right' of two sides of equal width, over a block.
  void products(const Rows<T>& left, const Rows<T>& right, const Block& b, T* out) const {
    const TileProduct<T> product;
    const int64_t d = left.d;
    for (int64_t j = 0; j < b.cols; j += 2 * kTile)
      for (int64_t i = 0; i < b.rows; i += kTile)
        product(left.across + (b.i0 + i) * d, 1, kTile, right.across + (b.j0 + j) * d, kTile * d,
                b.cols - j > kTile ? 2 : 1, d, out + i * ld_ + j, ld_, false);
  }

  // sums of rows += tile right, and with `transposed` those of columns += tile' left.
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

  // The sums of a tile's rows and of its columns.
  void add_weights(const T* tile, const Block& b, std::vector<double>* rows, std::vector<double>* columns) const {
    T of_rows[kPairRows], of_columns[kPairRows] = {};
    sum_block(tile, b.rows, b.cols, ld_, of_rows, columns != nullptr ? of_columns : nullptr);
    for (int64_t i = 0; rows != nullptr && i < b.rows; ++i) (*rows)[b.i0 + i] += of_rows[i];
    for (int64_t j = 0; columns != nullptr && j < b.cols; ++j) (*columns)[b.j0 + j] += of_columns[j];
  }

 private:
  const Rows<T>&x_, &y_;
  const bool own_;
  const int64_t size_, ld_;
};

// Gradients by x and y of what depends on their similarities by weights: sum_j w_ij y_j, or for distances
// 2 sum_j w_ij (x_i - y_j). Of a matrix with itself, w_ij is the weight of both orders.
template <class T>
class Gradients {
 public:
  Gradients(const Tensor& like, const Rows<T>& x, const Rows<T>& y, bool own, bool squared, bool need_x, bool need_y)
      : x_(x),
        y_(y),
        own_(own),
        squared_(squared),
        need_x_(need_x),
        need_y_(need_y && !own),
        of_x_(like, need_x ? x.padded : 0, x.d),
        of_y_(like, need_y_ ? y.padded : 0, y.d) {}

  void add(const Pairs<T>& pairs, T* tile, const Block& b) {
    for (int64_t r = 0; r < b.rows && squared_ && b.diagonal; ++r)
      tile[r * (pairs.ld() + 1)] = 0;  // of a distance of 0: it cancels, but not to the last digit
    RowSums<T>& below = own_ ? of_x_ : of_y_;
    const bool columns = own_ ? need_x_ && !b.diagonal : need_y_;
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
  const bool own_, squared_, need_x_, need_y_;
  RowSums<T> of_x_, of_y_;
};

}  // namespace sslkern
