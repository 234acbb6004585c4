// A call of a kernel over pairs of rows, and one slice of it.
#pragma once

#include "pairwise.h"

namespace sslkern {

using Labels = std::optional<Tensor>;

// What a call of any of the kernels is about; a slice of a stack at a time.
struct Call {
  const Tensor x, y, scale;
  const bool own, squared;
  const std::string kernel;
  const Labels x_labels, y_labels;
  const int64_t mask;

  Call(const Tensor& x, const std::optional<Tensor>& y, const Tensor& scale, const Labels& x_labels,
       const Labels& y_labels, int64_t mask, const std::string& kernel)
      : x(dense(x)),
        y(y.has_value() ? dense(*y) : this->x),
        scale(dense(scale)),
        own(!y.has_value()),
        squared(kernel == "sqeuclidean" || kernel == "rbf"),
        kernel(kernel),
        x_labels(dense(x_labels)),
        y_labels(own ? this->x_labels : dense(y_labels)),
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
    for_slices(stack_size(x), n() * m(),
               [&](int64_t s) { is_double(x) ? f.template operator()<double>(s) : f.template operator()<float>(s); });
  }
};

// One slice of a call.
template <class T>
struct Slice {
  const Rows<T> x;
  const std::optional<Rows<T>> other;
  const Rows<T>& y;
  const Pairs<T> pairs;
  const Similarity<T> similarity;
  const Mask mask;
  const bool own;

  Slice(const Call& c, int64_t s, bool for_sums)
      : x(c.x, data<T>(c.x) + s * c.n() * c.d(), c.n(), c.d(), true, for_sums, c.squared),
        other(c.own ? std::nullopt
                    : std::make_optional<Rows<T>>(c.y, data<T>(c.y) + s * c.m() * c.d(), c.m(), c.d(), true, for_sums,
                                                  c.squared)),
        y(c.own ? x : *other),
        pairs(x, y, c.own),
        similarity{data<T>(c.scale)[s], c.squared, c.own, x.squares.data(), y.squares.data()},
        mask(c.mask, labels(c.x_labels, s, c.n()), labels(c.y_labels, s, c.m()), c.m(), pairs.size()),
        own(c.own) {}

  // Numbers between which all exponents lie.
  std::pair<T, T> bounds() const {
    const T a = x.largest_norm(), b = own ? a : y.largest_norm();
    const T most = std::abs(similarity.scale) * (similarity.squared ? (a + b) * (a + b) : a * b);
    if (!similarity.squared) return {-most, most};
    return similarity.scale < 0 ? std::pair<T, T>(-most, 0) : std::pair<T, T>(0, most);
  }

 private:
  static const int64_t* labels(const Labels& given, int64_t s, int64_t n) {
    return given.has_value() ? data<int64_t>(*given) + s * n : nullptr;
  }
};

// Where gradients of x and y go, empty ones where they are not needed.
inline std::pair<Tensor, Tensor> room_for_gradients(const Call& c, bool need_x, bool need_y) {
  const auto room = [](const Tensor& z, bool needed) {
    return needed ? fresh(z, stacked(z, {z.size(-2), z.size(-1)}), z.scalar_type()) : fresh(z, {0}, z.scalar_type());
  };
  return {room(c.x, need_x), room(c.y, need_y && !c.own)};
}

template <class T>
T* at(const Tensor& t, int64_t s, int64_t numbers) {
  return t.numel() == 0 ? nullptr : data<T>(t) + s * numbers;
}

}  // namespace sslkern
