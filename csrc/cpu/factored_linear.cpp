// The product of a batch of few rows with the transpose of a weight. A vendor library packs the weight for it, which
// can take as long as the product. Here W is read once, from where it is.
#include "panels.h"

namespace sslkern {
namespace {

constexpr int64_t kDepth = 256;  // columns of W per product
constexpr int64_t kHeight = 64;  // rows of W that use the same part of x, at most

template <class T>
class FactoredLinear {
 public:
  FactoredLinear(const Tensor& x, const Tensor& w, T* y)
      : n_(x.size(0)),
        q_(w.size(0)),
        p_(w.size(1)),
        height_(std::clamp(q_ / 64 / kTile * kTile, kTile, kHeight)),
        w_(data<T>(w)),
        y_(y),
        x_(transposed(x), x) {}

  void run() const {
    in_parallel(x_.count(), kTile * p_, [&](int64_t first, int64_t last) { x_.write(first, last); });
    in_parallel(ceil_div(q_, height_), height_ * p_ * x_.padded(), [&](int64_t first, int64_t last) {
      const auto sums = room_for<T>(height_ * x_.padded()), edge = room_for<T>(kTile * kDepth);
      for (int64_t b = first; b < last; ++b)
        columns(b * height_, std::min(q_, (b + 1) * height_), sums.get(), edge.get());
    });
  }

 private:
  const int64_t n_, q_, p_, height_;
  const T* const w_;
  T* const y_;
  const Panels<T> x_;
  const TileProduct<T> product_;

  static Matrix transposed(const Tensor& x) {
    Matrix m = slice(x, 0);
    std::swap(m.rows, m.cols);
    std::swap(m.row_stride, m.col_stride);
    return m;
  }

  // Columns [i0, i1) of y. Rows of W times panels of x are tiles of y'.
  void columns(int64_t i0, int64_t i1, T* sums, T* edge) const {
    const int64_t ld = x_.padded();
    for (int64_t k0 = 0; k0 < p_; k0 += kDepth)
      for (int64_t i = i0; i < i1; i += kTile) rows(i, std::min(kTile, i1 - i), k0, sums + (i - i0) * ld, edge);
    for (int64_t r = 0; r < n_; ++r)
      for (int64_t i = i0; i < i1; ++i) y_[r * q_ + i] = sums[(i - i0) * ld + r];
  }

  // Writes or adds the products of at most 16 rows of W from column k0 on.
  void rows(int64_t i, int64_t count, int64_t k0, T* to, T* edge) const {
    const int64_t depth = std::min(kDepth, p_ - k0);
    const T* const from = w_ + i * p_ + k0;
    const bool whole = count == kTile;
    if (!whole) pack(from, p_, 1, count, depth, edge);
    for (int64_t t = 0; t < x_.count(); ++t)
      product_(whole ? from : edge, whole ? p_ : 1, whole ? 1 : kTile, x_.at(t, k0), depth, to + t * kTile, x_.padded(),
               k0 > 0, next(from, count, p_ - k0, t));
  }

  // What product t asks for, of the columns of W that come next. All products together ask for all columns.
  Lines<T> next(const T* from, int64_t count, int64_t left, int64_t t) const {
    Lines<T> lines;
    lines.ld = p_;
    lines.rows = count;
    const int64_t each = std::min(kLines, ceil_div(kDepth / kTile, x_.count())), end = std::min(left, 2 * kDepth);
    for (int64_t k = kDepth + t * each * kTile; k < end && lines.count < each; k += kTile)
      lines.at[lines.count++] = from + k;
    return lines;
  }
};

Tensor factored_linear(const Tensor x, const Tensor w) {
  Tensor y = fresh(x, {x.size(0), w.size(0)}, x.scalar_type());
  if (is_double(x)) {
    FactoredLinear<double>(x, w, data<double>(y)).run();
  } else {
    FactoredLinear<float>(x, w, data<float>(y)).run();
  }
  return y;
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("factored_linear", TORCH_BOX(&sslkern::factored_linear));
}
