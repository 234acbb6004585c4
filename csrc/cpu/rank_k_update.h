// Rank-k update of one orthogonal or unitary matrix on the CPU, U += (U W C + a D) W' with W = [M b] and M = U'a. U is
// read once for M, then read and written once, in panels of rows that stay in cache. A complex matrix (n, p) is a real
// one (n, 2p), with real and imaginary parts side by side; a real W with twice the columns then gives the same
// products.
#pragma once

#include "skinny_products.h"
#include "small_matrices.h"

namespace sslkern {

constexpr int64_t kAhead = 64;  // columns of U per prefetch

// The update of one matrix. T is real; with `complex`, an element is a pair of T.
template <class T>
class RankKUpdate {
 public:
  RankKUpdate(T* u, const T* a, const T* b, int64_t n, int64_t p, int64_t rank, bool complex, int64_t retraction)
      : u_(u),
        n_(n),
        p_(complex ? 2 * p : p),
        k_(complex ? 2 * rank : rank),
        complex_(complex),
        retraction_(retraction),
        few_(k_ <= kFew),
        m_(2 * k_),
        m_tiles_(ceil_div(m_, kTile)),
        p_tiles_(ceil_div(p_, kTile)),
        a_(room_for<T>(round_up(n, kTile) * k_)),
        b_(room_for<T>(p * k_)),
        w_(room_for<T>(m_tiles_ * kTile * p_tiles_ * kTile)),
        wt_(room_for<T>(m_tiles_ * kTile * p_tiles_ * kTile)) {
    balance(a, b, p, rank);
  }

  void run() {
    const Small gram = first_pass();
    const int64_t of_a = retraction_ == kTangent ? 0 : k_;
    const Small c = coefficients(gram, of_a > 0 ? outer() : Small(k_, k_), retraction_);
    few_ ? second_pass_of_few(c) : second_pass(c, of_a);
  }

 private:
  T* const u_;
  const int64_t n_, p_, k_;
  const bool complex_;
  const int64_t retraction_;
  const bool few_;
  const int64_t m_, m_tiles_, p_tiles_;
  // a (n, k) and b (p, k), with all real parts before the imaginary parts. W is stored in tiles of 16 columns (p, 16),
  // and its transpose in tiles of 16 columns (m, 16), both padded with zeros. With few columns, the transpose is (m,
  // p).
  const std::unique_ptr<T[]> a_, b_, w_, wt_;

  // Rescales the columns of a and b to equal norms, which leaves a b' unchanged.
  void balance(const T* a, const T* b, int64_t p, int64_t rank) {
    std::vector<double> squares(2 * rank);
    const auto add = [&](const T* x, int64_t rows, double* square) {
      const int64_t parts = complex_ ? 2 : 1;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t part = 0; part < parts; ++part) {
            const double v = x[(i * rank + r) * parts + part];
            square[r] += v * v;
          }
    };
    add(a, n_, squares.data());
    add(b, p, squares.data() + rank);
    std::vector<T> down(rank, T(1)), up(rank, T(1));
    for (int64_t r = 0; r < rank; ++r) {
      const double ratio = std::sqrt(std::sqrt(squares[r] / squares[rank + r]));
      if (!std::isfinite(ratio) || ratio == 0) continue;
      up[r] = static_cast<T>(ratio);
      down[r] = static_cast<T>(1 / ratio);
    }
    copy(a, n_, rank, down, a_.get());
    copy(b, p, rank, up, b_.get());
    std::fill(a_.get() + n_ * k_, a_.get() + round_up(n_, kTile) * k_, T(0));
  }

  void copy(const T* from, int64_t rows, int64_t rank, const std::vector<T>& scale, T* to) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t r = 0; r < rank; ++r) {
        if (!complex_) {
          to[i * k_ + r] = from[i * k_ + r] * scale[r];
          continue;
        }
        to[i * k_ + r] = from[i * k_ + 2 * r] * scale[r];
        to[i * k_ + rank + r] = from[i * k_ + 2 * r + 1] * scale[r];
      }
  }

  // Writes M = U'a and b to W and its transpose, and returns K = W'W.
  Small first_pass() {
    const SkinnyProducts<T> pass(u_, n_, p_, a_.get(), k_);
    const int64_t side = m_tiles_ * kTile;
    std::vector<double> grams(pass.chunks() * side * side);
    pass.run([&](int64_t chunk, int64_t j0, int64_t cols, const T* sums) {
      put_chunk(sums, j0, cols);
      gram_of(j0, cols, grams.data() + chunk * side * side);
    });
    Small gram(m_, m_);
    for (int64_t chunk = 0; chunk < pass.chunks(); ++chunk)
      for (int64_t i = 0; i < m_; ++i)
        for (int64_t j = 0; j < m_; ++j)
          gram.at(i, j) += grams[(chunk * side + std::max(i, j)) * side + std::min(i, j)];
    return gram;
  }

  void put(int64_t column, int64_t j, T value) {
    if (few_) {
      wt_[column * p_ + j] = value;
      return;
    }
    w_[((column / kTile) * p_tiles_ * kTile + j) * kTile + column % kTile] = value;
    wt_[((j / kTile) * m_tiles_ * kTile + column) * kTile + j % kTile] = value;
  }

  // Writes the rows of W that belong to columns j0 ... of U.
  void put_chunk(const T* sums, int64_t j0, int64_t cols) {
    const auto sum = [&](int64_t r, int64_t j) { return SkinnyProducts<T>::sum(sums, few_, r, j); };
    for (int64_t j = 0; j < cols; ++j) {
      if (!complex_) {
        for (int64_t r = 0; r < k_; ++r) put(r, j0 + j, sum(r, j));
        for (int64_t r = 0; r < k_; ++r) put(k_ + r, j0 + j, b_[(j0 + j) * k_ + r]);
        continue;
      }
      if (j % 2 == 1) continue;
      const int64_t half = k_ / 2;
      const T* b = b_.get() + (j0 + j) / 2 * k_;
      for (int64_t r = 0; r < half; ++r) {
        put_complex(r, half, j0 + j, sum(r, j) + sum(half + r, j + 1), sum(half + r, j) - sum(r, j + 1));
        put_complex(k_ + r, half, j0 + j, b[r], b[half + r]);
      }
    }
    for (int64_t j = j0; !few_ && j < j0 + round_up(cols, kTile); ++j)
      for (int64_t q = j < j0 + cols ? m_ : 0; q < m_tiles_ * kTile; ++q) put(q, j, T(0));
  }

  // Writes a complex element as two real columns: with a row of U, one gives the real part of their product and the
  // other the imaginary part.
  void put_complex(int64_t column, int64_t half, int64_t j, T real, T imaginary) {
    put(column, j, real);
    put(column, j + 1, -imaginary);
    put(column + half, j, imaginary);
    put(column + half, j + 1, real);
  }

  // The lower tiles of W'W, over some rows of W.
  void gram_of(int64_t j0, int64_t cols, double* gram) const {
    if (few_) {
      for (int64_t i = 0; i < m_; ++i)
        for (int64_t j = 0; j <= i; ++j) {
          const T *v = wt_.get() + i * p_ + j0, *w = wt_.get() + j * p_ + j0;
          for (int64_t q = 0; q < cols; ++q) gram[i * m_tiles_ * kTile + j] += static_cast<double>(v[q]) * w[q];
        }
      return;
    }
    const TileProduct<T> product;
    const int64_t rows = round_up(cols, kTile);
    T corner[kTile * kTile];
    for (int64_t s = 0; s < m_tiles_; ++s)
      for (int64_t t = 0; t <= s; ++t) {
        product(w_.get() + (s * p_tiles_ * kTile + j0) * kTile, 1, kTile,
                w_.get() + (t * p_tiles_ * kTile + j0) * kTile, rows, corner, kTile, false);
        for (int64_t i = 0; i < kTile; ++i)
          for (int64_t j = 0; j < kTile; ++j)
            gram[(s * kTile + i) * m_tiles_ * kTile + t * kTile + j] = corner[i * kTile + j];
      }
  }

  // a'a in the form of the small matrices.
  Small outer() const {
    constexpr int64_t share = 2048;
    const int64_t shares = ceil_div(n_, share);
    std::vector<double> sums(shares * k_ * k_);
    in_parallel(shares, share * k_ * k_, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part)
        add_gram(a_.get() + part * share * k_, std::min(share, n_ - part * share), k_, sums.data() + part * k_ * k_);
    });
    Small out(k_, k_);
    for (int64_t part = 0; part < shares; ++part)
      for (int64_t at = 0; at < k_ * k_; ++at) out.values[at] += sums[part * k_ * k_ + at];
    if (!complex_) return out;
    const int64_t half = k_ / 2;
    Small complex(k_, k_);
    for (int64_t r = 0; r < half; ++r)
      for (int64_t s = 0; s < half; ++s) {
        complex.at(r, s) = complex.at(half + r, half + s) = out.at(r, s) + out.at(half + r, half + s);
        complex.at(r, half + s) = out.at(r, half + s) - out.at(half + r, s);
        complex.at(half + r, s) = -complex.at(r, half + s);
      }
    return complex;
  }

  // U += [U W, a] [C; D] W'. of_a is the number of columns of a: k, or 0 where D is zero.
  void second_pass(const Small& given, int64_t of_a) {
    const int64_t side = m_tiles_ * kTile, depth = side + of_a;
    std::vector<T> c(m_tiles_ * kTile * depth);  // [C; D] in tiles of 16 columns; rows of padding columns of W are zero
    for (int64_t i = 0; i < given.rows; ++i)
      for (int64_t j = 0; j < m_; ++j)
        c[(j / kTile * depth + (i < m_ ? i : side + i - m_)) * kTile + j % kTile] = static_cast<T>(given.at(i, j));
    const int64_t groups = ceil_div(n_, kTile), each = p_ >= 4096 ? 2 : 4;
    in_parallel(ceil_div(groups, each), 2 * each * kTile * p_ * m_, [&](int64_t first, int64_t last) {
      std::vector<T> slab(kTile * kPadded), left(each * kTile * depth), right(each * kTile * side);
      for (int64_t panel = first; panel < last; ++panel)
        update_panel(panel * each, std::min(groups, (panel + 1) * each), of_a, c.data(), slab.data(), left.data(),
                     right.data());
    });
  }

  // The same for a W with few columns, 4 rows at a time.
  void second_pass_of_few(const Small& given) {
    std::vector<T> c(given.values.begin(), given.values.end());
    const int64_t depth = given.rows;
    in_parallel(ceil_div(n_, kTile), 2 * kTile * p_ * m_, [&](int64_t first, int64_t last) {
      for (int64_t i0 = first * kTile; i0 < std::min(n_, last * kTile); i0 += 4) {
        T left[4 * 3 * kFew], right[4 * 2 * kFew];
        const int64_t rows = std::min<int64_t>(4, n_ - i0);
        T* u = u_ + i0 * p_;
        dots_with(u, p_, rows, wt_.get(), p_, m_, p_, left, depth);
        for (int64_t i = 0; i < rows; ++i) std::copy_n(a_.get() + (i0 + i) * k_, depth - m_, left + i * depth + m_);
        std::fill_n(right, rows * m_, T(0));
        add_product(right, m_, rows, c.data(), m_, depth, left, depth, 1, m_);
        add_product(u, p_, rows, wt_.get(), p_, m_, right, m_, 1, p_);
      }
    });
  }

  // Updates a panel, 16 rows at a time. All its rows pass before the next columns of W.
  void update_panel(int64_t first, int64_t last, int64_t of_a, const T* c, T* slab, T* left, T* right) {
    const TileProduct<T> product;
    const int64_t side = m_tiles_ * kTile, depth = side + of_a;
    for (int64_t j0 = 0; j0 < p_; j0 += kChunk) {
      const int64_t cols = std::min(kChunk, p_ - j0);
      for (int64_t group = first; group < last; ++group) {
        const int64_t i0 = group * kTile, rows = std::min(kTile, n_ - i0);
        for (int64_t i = 0; i < rows; ++i) std::copy_n(u_ + (i0 + i) * p_ + j0, cols, slab + i * kPadded);
        for (int64_t i = rows; i < kTile && j0 == 0; ++i) std::fill_n(slab + i * kPadded, kPadded, T(0));
        const bool more = group + 1 < last;
        const int64_t next_i = more ? i0 + kTile : first * kTile, next_j = more ? j0 : j0 + kChunk;
        for (int64_t q = 0; q < cols; q += kAhead) {
          fetch(u_ + next_i * p_ + next_j + q, p_, std::min(kTile, n_ - next_i), std::min(kAhead, p_ - next_j - q));
          for (int64_t t = 0; t < m_tiles_; ++t)
            product(slab + q, kPadded, 1, w_.get() + (t * p_tiles_ * kTile + j0 + q) * kTile,
                    std::min(kAhead, cols - q), left + (group - first) * kTile * depth + t * kTile, depth, j0 + q > 0);
        }
      }
    }
    for (int64_t group = first; group < last; ++group) {
      T *l = left + (group - first) * kTile * depth, *r = right + (group - first) * kTile * side;
      for (int64_t i = 0; i < kTile; ++i) std::copy_n(a_.get() + (group * kTile + i) * k_, of_a, l + i * depth + side);
      for (int64_t t = 0; t < m_tiles_; ++t)
        product(l, depth, 1, c + t * depth * kTile, depth, r + t * kTile, side, false);
    }
    for (int64_t j = 0; j < p_; j += kTile) {
      const T* w = wt_.get() + j * side;
      for (int64_t group = first; group < last; ++group) {
        const int64_t i0 = group * kTile, rows = std::min(kTile, n_ - i0), cols = std::min(kTile, p_ - j);
        const T* r = right + (group - first) * kTile * side;
        T* to = u_ + i0 * p_ + j;
        if (rows == kTile && cols == kTile) {
          product(r, side, 1, w, m_, to, p_, true);
          continue;
        }
        T corner[kTile * kTile];
        product(r, side, 1, w, m_, corner, kTile, false);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t q = 0; q < cols; ++q) to[i * p_ + q] += corner[i * kTile + q];
      }
    }
  }
};

}  // namespace sslkern
