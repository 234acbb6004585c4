// Log-sum-exp over a bank of keys in one pass: its keys are read once, in any layout, and weighed while they are in
// cache. Nothing of them is kept for the gradients of the queries.
#pragma once

#include "pair_rows.h"
#include "pairwise.h"

namespace sslkern {

// For queries x (n, d): log sum_j exp(c <x_i, y_j>), and the mean of the keys y_j with the weights of these terms.
// The exponents of a row are taken relative to one of them that is not much smaller than the largest. Where a later
// block of keys has a much larger one, the sums so far are scaled down.
template <class T>
class BankSums {
 public:
  // A key shorter than `eps` is divided by eps, and other keys by their length. An eps of 0 leaves keys as they are.
  BankSums(const Tensor& like, const T* x, int64_t n, const Matrix& bank, T scale, T eps, bool means)
      : x_(like, x, n, bank.cols, true, false, false),
        bank_(bank),
        scale_(scale),
        eps_(eps),
        parts_(std::clamp<int64_t>(bank.rows / std::max<int64_t>(kLeast, 2 * n), 1, kMostParts)),
        part_(round_up(ceil_div(bank.rows, parts_), kKeys)),
        ld_(means ? round_up(bank.cols, kTile) : 0),
        memory_(fresh(like, {parts_ * x_.padded * ld_}, dtype_of<T>())),
        sum_(parts_ * n),
        most_(parts_ * n, -std::numeric_limits<T>::infinity()) {
    const int64_t strips = ceil_div(n, kQueries);
    in_parallel(strips * parts_, std::min(n, kQueries) * part_ * bank.cols, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) add(k % strips * kQueries, k / strips);
    });
  }

  // The log-sum-exp of each row and, if they were asked for, the means (n, d).
  void write(T* over, T* mean) const {
    const int64_t n = x_.n, d = x_.d;
    in_parallel(n, parts_ * d, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        T most = -std::numeric_limits<T>::infinity();
        for (int64_t p = 0; p < parts_; ++p) most = std::max(most, most_[p * n + i]);
        const T base = finite(most);
        double sum = 0;
        for (int64_t p = 0; p < parts_; ++p) sum += sum_[p * n + i] * std::exp(double(finite(most_[p * n + i])) - base);
        over[i] = static_cast<T>(base + std::log(sum));
        if (mean == nullptr) continue;
        T* to = mean + i * d;
        std::fill_n(to, d, T(0));
        for (int64_t p = 0; p < parts_; ++p) {
          const T share = static_cast<T>(std::exp(double(finite(most_[p * n + i])) - base) / sum);
          const T* from = means(p) + i * ld_;
          for (int64_t k = 0; k < d; ++k) to[k] += share * from[k];
        }
      }
    });
  }

 private:
  static constexpr int64_t kQueries = 256, kKeys = 128;    // a block of products
  static constexpr int64_t kLeast = 512, kMostParts = 16;  // keys of a part, and parts
  static constexpr T kRise = 16;                           // a larger exponent by more than this becomes the base

  static T finite(T x) {
    return x == -std::numeric_limits<T>::infinity() ? T(0) : x;
  }

  T* means(int64_t part) const {
    return data<T>(memory_) + part * x_.padded * ld_;
  }

  // Adds the keys of a part to the sums of up to kQueries rows from i0 on.
  void add(int64_t i0, int64_t part) {
    const TileProduct<T> product;
    const int64_t d = x_.d, rows = std::min(kQueries, x_.n - i0), ld = kKeys + kTile, panels = ceil_div(d, kTile);
    const auto room = room_for<T>(kQueries * ld + kKeys * d + kKeys * panels * kTile);
    T *tile = room.get(), *across = tile + kQueries * ld, *along = across + kKeys * d;
    if (ld_ > 0) std::fill_n(means(part) + i0 * ld_, round_up(rows, kTile) * ld_, T(0));
    const int64_t end = std::min(bank_.rows, (part + 1) * part_);
    for (int64_t j0 = part * part_; j0 < end; j0 += kKeys) {
      const int64_t keys = std::min(kKeys, end - j0);
      read(j0, keys, across, along);
      for (int64_t j = 0; j < keys; j += 2 * kTile)
        for (int64_t i = 0; i < rows; i += kTile)
          product(x_.across + (i0 + i) * d, 1, kTile, across + j * d, kTile * d, keys - j > kTile ? 2 : 1, d,
                  tile + i * ld + j, ld, false);
      for (int64_t r = 0; r < rows; ++r) {
        T* t = tile + r * ld;
        scale_row(t, keys, scale_);
        const int64_t at = part * x_.n + i0 + r;
        const T base = rise(at, largest(t, keys), ld_ > 0 ? means(part) + (i0 + r) * ld_ : nullptr);
        sum_[at] += ld_ > 0 ? keep_exp_row(t, keys, base) : exp_row(t, keys, T(1), base);
      }
      for (int64_t t = 0; t < panels && ld_ > 0; t += 2)
        for (int64_t i = 0; i < rows; i += kTile)
          product(tile + i * ld, ld, 1, along + t * kKeys * kTile, kKeys * kTile, std::min<int64_t>(2, panels - t),
                  keys, means(part) + (i0 + i) * ld_ + t * kTile, ld_, true);
    }
  }

  // Packs keys for products, across, and for sums, along, and divides them by their length.
  void read(int64_t j0, int64_t keys, T* across, T* along) const {
    const int64_t d = x_.d, row = bank_.row_stride, col = bank_.col_stride;
    const T* from = reinterpret_cast<const T*>(bank_.at(j0, 0));
    for (int64_t j = 0; j < keys; j += kTile)
      pack(from + j * row, row, col, std::min(kTile, keys - j), d, across + j * d);
    T inverse[kKeys];
    if (eps_ > 0) {
      for (int64_t g = 0; g < keys; g += kTile) divide(across + g * d, d, inverse + g);
    }
    for (int64_t t = 0; t < d && ld_ > 0; t += kTile) {
      T* to = along + t * kKeys;
      pack(from + t * col, col, row, std::min(kTile, d - t), keys, to);
      for (int64_t j = 0; j < keys && eps_ > 0; ++j) scale_row(to + j * kTile, kTile, inverse[j]);
    }
  }

  // Divides 16 packed keys by their lengths.
  void divide(T* keys, int64_t d, T* inverse) const {
    T squares[kTile] = {};
    for (int64_t k = 0; k < d; ++k)
      for (int64_t j = 0; j < kTile; ++j) squares[j] += keys[k * kTile + j] * keys[k * kTile + j];
    for (int64_t j = 0; j < kTile; ++j) inverse[j] = 1 / std::max(eps_, std::sqrt(squares[j]));
    for (int64_t k = 0; k < d; ++k)
      for (int64_t j = 0; j < kTile; ++j) keys[k * kTile + j] *= inverse[j];
  }

  // The base of a row's exponents, for the largest exponent of a block.
  T rise(int64_t at, T largest, T* mean) {
    T& most = most_[at];
    if (largest > most && (most == -std::numeric_limits<T>::infinity() || largest - most > kRise)) {
      if (most != -std::numeric_limits<T>::infinity()) {
        const double factor = std::exp(static_cast<double>(most) - static_cast<double>(largest));
        sum_[at] *= factor;
        if (mean != nullptr) scale_row(mean, ld_, static_cast<T>(factor));
      }
      most = largest;
    }
    return finite(most);
  }

  const Rows<T> x_;
  const Matrix bank_;
  const T scale_, eps_;
  const int64_t parts_, part_, ld_;
  const Tensor memory_;
  std::vector<double> sum_;
  std::vector<T> most_;
};

}  // namespace sslkern
