// The products of a batch of few rows with a weight: y = x W', and dx = dy W. A vendor library packs the weight for
// them, which can take as long as the product. Here W is read once, from where it is, and lines of it arrive while
// others are multiplied.
#include "panels.h"

namespace sslkern {
namespace {

constexpr int64_t kDepth = 256;     // columns of W per product of the forward
constexpr int64_t kHeight = 64;     // rows of W that use the same part of x, at most
constexpr int64_t kRows = 128;      // rows of W per product of the backward
constexpr int64_t kColumns = 64;    // and columns that are packed at a time
constexpr int64_t kSums = 1 << 15;  // numbers of dx whose sums stay in L2, at most

Matrix transposed(const Tensor& x) {
  Matrix m = slice(x, 0);
  std::swap(m.rows, m.cols);
  std::swap(m.row_stride, m.col_stride);
  return m;
}

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

template <class T>
class InputGradient {
 public:
  InputGradient(const Tensor& dy, const Tensor& w, T* dx)
      : n_(dy.size(0)),
        q_(w.size(0)),
        p_(w.size(1)),
        w_(data<T>(w)),
        dx_(dx),
        dy_(transposed(dy), dy),
        width_(std::clamp(std::min(p_ / (4 * stable::get_num_threads()), kSums / dy_.padded()) / kColumns * kColumns,
                          kColumns, kMost)) {}

  void run() const {
    in_parallel(dy_.count(), kTile * q_, [&](int64_t first, int64_t last) { dy_.write(first, last); });
    in_parallel(ceil_div(p_, width_), width_ * q_ * dy_.padded(), [&](int64_t first, int64_t last) {
      const auto sums = room_for<T>(width_ * dy_.padded()), packed = room_for<T>(2 * kRows * kColumns);
      for (int64_t b = first; b < last; ++b)
        columns(b * width_, std::min(p_, (b + 1) * width_), sums.get(), packed.get());
    });
  }

 private:
  static constexpr int64_t kMost = 512;                      // columns of a block, at most
  static constexpr int64_t kLine = 64 / (int64_t)sizeof(T);  // numbers of a cache line

  // Rows [i, i + rows) of columns [j, j + cols) of W.
  struct Piece {
    int64_t i, rows, j, cols;

    int64_t panels() const {
      return ceil_div(cols, kTile);
    }
  };

  const int64_t n_, q_, p_;
  const T* const w_;
  T* const dx_;
  const Panels<T> dy_;
  const int64_t width_;
  const TileProduct<T> product_;

  // Columns [j0, j1) of dx, a piece of W at a time. While a piece is multiplied, the next one is packed.
  void columns(int64_t j0, int64_t j1, T* sums, T* packed) const {
    const int64_t beside = ceil_div(j1 - j0, kColumns), count = beside * ceil_div(q_, kRows);
    const auto piece = [&](int64_t b) {
      const int64_t i = b / beside * kRows, j = j0 + b % beside * kColumns;
      return b < count ? Piece{i, std::min(kRows, q_ - i), j, std::min(kColumns, j1 - j)} : Piece{};
    };
    write(piece(0), 0, piece(0).rows, packed);
    for (int64_t b = 0; b < count; ++b) {
      T *const now = packed + b % 2 * kRows * kColumns, *const later = packed + (b + 1) % 2 * kRows * kColumns;
      multiply(piece(b), now, sums + piece(b).j - j0, piece(b + 1), later);
    }
    for (int64_t r = 0; r < n_; ++r) std::copy_n(sums + r * width_, j1 - j0, dx_ + r * p_ + j0);
  }

  // Writes or adds the products of dy with a packed piece. Between them, it packs the next one: each product asks for a
  // part of its lines, and the part is packed one product later.
  void multiply(const Piece& piece, const T* packed, T* to, const Piece& next, T* later) const {
    const int64_t steps = dy_.count() * piece.panels();
    const auto row = [&](int64_t step) { return next.rows * step / steps; };
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t t = step / piece.panels(), panel = step % piece.panels();
      product_(dy_.at(t, piece.i), 1, kTile, packed + panel * kRows * kTile, piece.rows,
               to + t * kTile * width_ + panel * kTile, width_, piece.i > 0, soon(next, row(step), row(step + 1)));
      if (step > 0) write(next, row(step - 1), row(step), later);
    }
    write(next, row(steps - 1), next.rows, later);
  }

  // Lines of some rows of a piece, as many as a tile asks for.
  Lines<T> soon(const Piece& piece, int64_t first, int64_t last) const {
    Lines<T> lines;
    lines.ld = p_;
    lines.rows = std::min(kTile, last - first);
    for (; first < last && lines.count + ceil_div(piece.cols, kLine) <= kLines; first += kTile)
      for (int64_t c = 0; c < piece.cols; c += kLine)
        lines.at[lines.count++] = w_ + (piece.i + first) * p_ + piece.j + c;
    return lines;
  }

  // Packs some rows of a piece in panels of 16 columns that are padded with zeros.
  void write(const Piece& piece, int64_t first, int64_t last, T* to) const {
    for (int64_t c = 0; c < piece.cols; c += kTile)
      pack(w_ + (piece.i + first) * p_ + piece.j + c, 1, p_, std::min(kTile, piece.cols - c), last - first,
           to + c * kRows + first * kTile);
  }
};

template <template <class> class Product>
Tensor multiplied(const Tensor& x, const Tensor& w, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(0) > 0 && w.numel() > 0, "a batch and a weight with numbers");
  STD_TORCH_CHECK(x.size(1) == w.numel() / columns, "the sides that are summed over must be the same");
  Tensor y = fresh(x, {x.size(0), columns}, x.scalar_type());
  if (is_double(x)) {
    Product<double>(x, w, data<double>(y)).run();
  } else {
    Product<float>(x, w, data<float>(y)).run();
  }
  return y;
}

Tensor factored_linear_fwd(const Tensor x, const Tensor w) {
  return multiplied<FactoredLinear>(x, w, w.size(0));
}

Tensor factored_linear_bwd(const Tensor dy, const Tensor w) {
  return multiplied<InputGradient>(dy, w, w.size(1));
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("factored_linear_fwd", TORCH_BOX(&sslkern::factored_linear_fwd));
  m.impl("factored_linear_bwd", TORCH_BOX(&sslkern::factored_linear_bwd));
}
