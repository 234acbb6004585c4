// Log-sum-exp over pairs of rows, of each row and of each column, and its gradients.
#pragma once

#include "pairwise_call.h"

namespace sslkern {

// The base that exponents are taken relative to. A row without pairs has a sum of 0, and any finite base works.
template <class T>
T base_of(T x) {
  return x == -std::numeric_limits<T>::infinity() ? T(0) : x;
}

// Whether all exponentials can be taken relative to the largest possible exponent and stay normal numbers.
template <class T>
bool in_range(const std::pair<T, T>& bounds) {
  return bounds.second - bounds.first <= (sizeof(T) == 4 ? T(80) : T(690));
}

// Rows of exponents, with -inf for dropped pairs. Where possible, the scale is left to the exponential as `factor`.
template <class T>
struct Exponents {
  const PairSlice<T>& slice;
  const bool folded;
  const T factor, dropped;

  Exponents(const PairSlice<T>& slice, bool fold)
      : slice(slice),
        folded(fold && !slice.similarity.squared && slice.similarity.scale != 0),
        factor(folded ? slice.similarity.scale : T(1)),
        dropped(std::copysign(std::numeric_limits<T>::infinity(), -factor)) {}

  void operator()(T* t, const Block& b, int64_t r) const {
    if (!folded) slice.similarity(t, b, r);
    slice.mask.drop(t, b, r, dropped);
  }
};

// Sums of exponentials, each relative to the base of its row.
template <class T>
struct Sums {
  std::vector<double> sum;
  std::vector<T> most;

  explicit Sums(int64_t n) : sum(n), most(n, -std::numeric_limits<T>::infinity()) {}

  // Raises the base of row i to at least `at`, and returns it.
  T raise(int64_t i, T at) {
    if (at > most[i]) {
      if (most[i] != -std::numeric_limits<T>::infinity())
        sum[i] *= std::exp(static_cast<double>(most[i]) - static_cast<double>(at));
      most[i] = at;
    }
    return base_of(most[i]);
  }

  void write(T* to, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(base_of(most[i]) + std::log(sum[i]));
  }
};

// The gradient and log-sum-exp of every row. For a fixed shift, `share` is the row's factor of exp(t - shift).
template <class T>
struct Shares {
  const T *grad, *over;
  std::vector<T> base, share;

  Shares(const T* grad, const T* over, int64_t n, T shift, bool fixed)
      : grad(grad), over(over), base(n), share(fixed ? n : 0) {
    for (int64_t i = 0; i < n; ++i) {
      base[i] = base_of(over[i]);
      if (fixed) share[i] = base[i] == over[i] || std::isnan(over[i]) ? grad[i] * std::exp(shift - over[i]) : T(0);
    }
  }
};

// The results of the sums and their gradients. Those of columns are null where columns are not summed.
template <class T>
struct Upstream {
  const T *grad_rows, *grad_columns, *over_rows, *over_columns;
};

// The log-sum-exp over a slice. `keep` keeps the exponentials of `sums` for one call of `gradients`, which then needs
// no products of rows and no exponentials. They are kept where all have one shift and take at most 8 times the memory
// of the rows.
template <class T>
class LogSumExp {
 public:
  LogSumExp(const PairSlice<T>& slice, bool columns, bool keep)
      : slice_(slice),
        columns_(columns),
        both_(slice.self_pairs || columns),
        bounds_(slice.bounds()),
        in_range_(in_range(bounds_)) {
    if (keep && in_range_ && kept_numbers() <= std::min(kMostKept, 8 * (slice.x.n + slice.y.n) * slice.x.d))
      kept_ = room_for<T>(kept_numbers());
  }

  void sums(T* over_rows, T* over_columns) const {
    const bool fixed = in_range_, self_pairs = slice_.self_pairs;
    const T shift = bounds_.second;
    const Exponents<T> exponents(slice_, fixed);
    Sums<T> of_rows(slice_.x.n), of_columns(columns_ && !self_pairs ? slice_.y.n : 0);
    Sums<T>& below = self_pairs ? of_rows : of_columns;
    run([&](const Block& b, T* tile) {
      slice_.pairs.products(slice_.x, slice_.y, b, tile);
      const bool down = both_ && !b.diagonal, kept = kept_ != nullptr;
      T sums[kPairRows], most[kPairRows];
      std::fill_n(sums, b.cols, T(0));
      for (int64_t j = 0; j < b.cols && down && !fixed; ++j) most[j] = below.most[b.j0 + j];
      for (int64_t r = 0; r < b.rows; ++r) {
        T* t = tile + r * slice_.pairs.ld();
        exponents(t, b, r);
        const int64_t i = b.i0 + r;
        if (kept) {
          of_rows.sum[i] += keep_exp(t, b.cols, exponents.factor, shift, sums);
          continue;
        }
        if (fixed) {
          of_rows.sum[i] +=
              down ? exp_both(t, b.cols, exponents.factor, shift, sums) : exp_row(t, b.cols, exponents.factor, shift);
          continue;
        }
        const T base = of_rows.raise(i, largest(t, b.cols));
        of_rows.sum[i] += exp_row(t, b.cols, T(1), base);
        if (down) largest_columns(t, b.cols, most);
      }
      if (!down) return;
      for (int64_t j = 0; j < b.cols && !fixed; ++j) most[j] = below.raise(b.j0 + j, most[j]);
      for (int64_t r = 0; r < b.rows && !fixed; ++r) exp_columns(tile + r * slice_.pairs.ld(), b.cols, most, sums);
      for (int64_t j = 0; j < b.cols; ++j) below.sum[b.j0 + j] += sums[j];
    });
    if (fixed) std::fill(of_rows.most.begin(), of_rows.most.end(), shift);
    if (fixed) std::fill(of_columns.most.begin(), of_columns.most.end(), shift);
    of_rows.write(over_rows, slice_.x.n);
    if (columns_) (self_pairs ? of_rows : of_columns).write(over_columns, slice_.y.n);
  }

  // The gradients with respect to the rows of both sides, divided by the scale. The slice must be packed for sums.
  void gradients(const Upstream<T>& from, bool need_x, bool need_y, T* grad_x, T* grad_y) const {
    const bool kept = kept_ != nullptr, fixed = (both_ || kept) && in_range_;
    const T shift = bounds_.second;
    const Exponents<T> exponents(slice_, fixed);
    const Shares<T> of_rows(from.grad_rows, from.over_rows, slice_.x.n, shift, fixed);
    const std::optional<Shares<T>> of_columns =
        columns_ && !slice_.self_pairs
            ? std::make_optional<Shares<T>>(from.grad_columns, from.over_columns, slice_.y.n, shift, fixed)
            : std::nullopt;
    const Shares<T>& other = of_columns.has_value() ? *of_columns : of_rows;
    Gradients<T> gradients(slice_.like, slice_.x, slice_.y, slice_.self_pairs, slice_.similarity.squared, need_x,
                           need_y);
    run([&](const Block& b, T* tile) {
      if (!kept) slice_.pairs.products(slice_.x, slice_.y, b, tile);
      for (int64_t r = 0; r < b.rows; ++r) {
        T* t = tile + r * slice_.pairs.ld();
        const int64_t i = b.i0 + r, j = b.j0;
        if (kept && both_) {
          weigh_both(t, b.cols, of_rows.share[i], other.share.data() + j);
        } else if (kept) {
          scale_row(t, b.cols, of_rows.share[i]);
        } else {
          exponents(t, b, r);
          if (fixed) {
            share_both(t, b.cols, exponents.factor, shift, of_rows.share[i], other.share.data() + j);
          } else if (both_) {
            share_each(t, b.cols, of_rows.base[i], of_rows.grad[i], other.base.data() + j, other.grad + j);
          } else {
            share_row(t, b.cols, of_rows.base[i], of_rows.grad[i]);
          }
        }
      }
      gradients.add(slice_.pairs, tile, b);
    });
    gradients.write(grad_x, grad_y);
  }

 private:
  static constexpr int64_t kMostKept = 5 << 20;  // numbers; 20 MB in fp32 stay in L3

  int64_t kept_numbers() const {
    const int64_t nx = slice_.pairs.row_blocks(), ny = ceil_div(slice_.y.n, slice_.pairs.size());
    return (slice_.self_pairs ? nx * (nx + 1) / 2 : nx * ny) * tile_numbers();
  }
  int64_t tile_numbers() const {
    return slice_.pairs.size() * slice_.pairs.ld();
  }

  // Calls f(block, tile) for every block, with its kept tile or with scratch memory.
  template <class F>
  void run(const F& f) const {
    slice_.pairs.each_block([&](const Block& b) {
      if (kept_ == nullptr) return f(b, room_for<T>(tile_numbers()).get());
      const int64_t size = slice_.pairs.size(), i = b.i0 / size, j = b.j0 / size;
      const int64_t place = slice_.self_pairs ? j * (j + 1) / 2 + i : i * ceil_div(slice_.y.n, size) + j;
      f(b, kept_.get() + place * tile_numbers());
    });
  }

  const PairSlice<T>& slice_;
  const bool columns_, both_;
  const std::pair<T, T> bounds_;
  const bool in_range_;
  std::unique_ptr<T[]> kept_;
};

}  // namespace sslkern
