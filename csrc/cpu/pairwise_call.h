// The arguments of a pairwise operator, and one slice of them.
#pragma once

#include <string>

#include "pairwise.h"

namespace sslkern {

using Labels = std::optional<Tensor>;

// Calls f(slice) for every slice of a stack: small slices run one per thread. A single slice uses all threads itself.
// Its bits are the same, because pairs of blocks are added up in a fixed order for any number of threads.
template <class F>
void for_pair_slices(int64_t count, int64_t numbers, const F& f) {
  if (count == 1) return f(0);
  for_slices(count, numbers, f);
}

// The arguments that all pairwise operators share.
struct Call {
  const Tensor x, y, scale;
  const bool self_pairs, squared;
  const std::string kernel;
  const Labels x_labels, y_labels;
  const int64_t mask;

  Call(const Tensor& x, const std::optional<Tensor>& y, const Tensor& scale, const Labels& x_labels,
       const Labels& y_labels, int64_t mask, const std::string& kernel)
      : x(dense(x)),
        y(y.has_value() ? dense(*y) : this->x),
        scale(dense(scale)),
        self_pairs(!y.has_value()),
        squared(kernel == "sqeuclidean" || kernel == "rbf"),
        kernel(kernel),
        x_labels(dense(x_labels)),
        y_labels(self_pairs ? this->x_labels : dense(y_labels)),
        mask(mask) {}

  int64_t n() const {
    return x.size(-2);
  }
  int64_t m() const {
    return y.size(-2);
  }
  int64_t d() const {
    return x.size(-1);
  }

  template <class F>
  void for_each_slice(const F& f) const {
    for_pair_slices(stack_size(x), n() * m(), [&](int64_t s) {
      is_double(x) ? f.template operator()<double>(s) : f.template operator()<float>(s);
    });
  }
};

// One slice of the arguments, packed for tiles.
template <class T>
struct PairSlice {
  const Tensor like;  // makes tensors of its device
  const Rows<T> x;
  const std::optional<Rows<T>> other;
  const Rows<T>& y;
  const Pairs<T> pairs;
  const Similarity<T> similarity;
  const Mask mask;
  const bool self_pairs;

  PairSlice(const Call& c, int64_t s, bool for_sums)
      : like(c.x),
        x(c.x, data<T>(c.x) + s * c.n() * c.d(), c.n(), c.d(), true, for_sums, c.squared),
        other(c.self_pairs ? std::nullopt
                           : std::make_optional<Rows<T>>(c.y, data<T>(c.y) + s * c.m() * c.d(), c.m(), c.d(), true,
                                                         for_sums, c.squared)),
        y(c.self_pairs ? x : *other),
        pairs(x, y, c.self_pairs),
        similarity{data<T>(c.scale)[s], c.squared, c.self_pairs, x.squares.data(), y.squares.data()},
        mask(c.mask, labels(c.x_labels, s, c.n()), labels(c.y_labels, s, c.m()), c.m(), pairs.size()),
        self_pairs(c.self_pairs) {}

  // Products of the rows of x (n, d) and y (m, d), contiguous; y is null to compare x with itself. `mask` and `partner`
  // are those of `Mask`.
  PairSlice(const Tensor& like, const T* x, int64_t n, const T* y, int64_t m, int64_t d, T scale, int64_t mask,
            int64_t partner, bool for_sums)
      : like(like),
        x(like, x, n, d, true, for_sums, false),
        other(y == nullptr ? std::nullopt : std::make_optional<Rows<T>>(like, y, m, d, true, for_sums, false)),
        y(y == nullptr ? this->x : *other),
        pairs(this->x, this->y, y == nullptr),
        similarity{scale, false, y == nullptr, nullptr, nullptr},
        mask(mask, nullptr, nullptr, m, pairs.size(), partner),
        self_pairs(y == nullptr) {}

  // Bounds of all exponents.
  std::pair<T, T> bounds() const {
    const T a = x.largest_norm(), b = self_pairs ? a : y.largest_norm();
    const T most = std::abs(similarity.scale) * (similarity.squared ? (a + b) * (a + b) : a * b);
    if (!similarity.squared) return {-most, most};
    return similarity.scale < 0 ? std::pair<T, T>(-most, 0) : std::pair<T, T>(0, most);
  }

 private:
  static const int64_t* labels(const Labels& given, int64_t s, int64_t n) {
    return given.has_value() ? data<int64_t>(*given) + s * n : nullptr;
  }
};

// Allocates the gradients of x and y; empty ones where they are not needed.
inline std::pair<Tensor, Tensor> room_for_gradients(const Call& c, bool need_x, bool need_y) {
  const auto room = [](const Tensor& z, bool needed) {
    return needed ? fresh(z, stacked(z, {z.size(-2), z.size(-1)}), z.scalar_type()) : fresh(z, {0}, z.scalar_type());
  };
  return {room(c.x, need_x), room(c.y, need_y && !c.self_pairs)};
}

template <class T>
T* at(const Tensor& t, int64_t s, int64_t numbers) {
  return t.numel() == 0 ? nullptr : data<T>(t) + s * numbers;
}

}  // namespace sslkern
