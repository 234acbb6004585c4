// The loss of a low-rank model of a matrix and its gradients with respect to both factors, in one sweep over the
// matrix. A block of the model, of the residual and of the gradient exists only in cache.
#include "low_rank_residual.h"

#include "columns.h"
#include "pairwise.h"

namespace sslkern {
namespace {

Residual residual_of(const std::string& name) {
  return name == "l1"        ? Residual::l1
         : name == "huber"   ? Residual::huber
         : name == "poisson" ? Residual::poisson
                             : Residual::l2;
}

// A gradient (n, r), which whole tiles are added to: in place, or where there are rests, through padded sums.
template <class T>
class Added {
 public:
  Added(const Tensor& like, T* out, int64_t n, int64_t r)
      : out_(out), n_(n), r_(r), in_place_(n % kTile == 0 && r % kTile == 0) {
    if (out != nullptr && in_place_) std::fill_n(out, n * r, T(0));
    if (out != nullptr && !in_place_) padded_.emplace(like, round_up(n, kTile), r);
  }

  bool wanted() const {
    return out_ != nullptr;
  }

  // Adds a' b for a tile (depth, rows) read with these strides and b (depth, r), packed by columns.
  void add(const T* tile, int64_t across, int64_t along, int64_t at, int64_t rows, const T* packed, int64_t depth) {
    const TileProduct<T> product;
    T* const sums = in_place_ ? out_ : padded_->sums;
    const int64_t panels = ceil_div(r_, kTile), ld = panels * kTile;
    for (int64_t t = 0; t < panels; t += 2)
      for (int64_t i = 0; i < rows; i += kTile)
        product(tile + i * across, across, along, packed + t * depth * kTile, depth * kTile,
                std::min<int64_t>(2, panels - t), depth, sums + (at + i) * ld + t * kTile, ld, true);
  }

  void write() const {
    if (out_ == nullptr || in_place_) return;
    for (int64_t i = 0; i < n_; ++i) std::copy_n(padded_->sums + i * padded_->ld, r_, out_ + i * r_);
  }

 private:
  T* const out_;
  const int64_t n_, r_;
  const bool in_place_;
  std::optional<RowSums<T>> padded_;
};

// Rows [begin, begin + count) of a factor (n, r), packed for a product over r (`across`) and for one over the rows.
template <class T>
struct Packed {
  std::unique_ptr<T[]> across, along;

  Packed(const T* factor, int64_t r, int64_t begin, int64_t count, bool for_sums)
      : across(room_for<T>(round_up(count, kTile) * r)), along(room_for<T>(for_sums ? round_up(r, kTile) * count : 0)) {
    const T* from = factor + begin * r;
    for (int64_t i = 0; i < count; i += kTile)
      pack(from + i * r, r, 1, std::min(kTile, count - i), r, across.get() + i * r);
    for (int64_t t = 0; t < r && for_sums; t += kTile)
      pack(from + t, 1, r, std::min(kTile, r - t), count, along.get() + t * count);
  }
};

Matrix transposed(const Matrix& m) {
  return {m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype, m.element_size};
}

// One slice: a matrix, its mask if there is one, and its factors.
template <class T>
class Slice {
 public:
  Slice(const Matrix& m, const std::optional<Matrix>& mask, const T* u, const T* v, int64_t r)
      : m_(m), mask_(mask), u_(u), v_(v), r_(r), height_(block_rows(m.rows)), width_(block_rows(m.cols)) {}

  // The same for the transposed matrix.
  Slice mirrored() const {
    return {transposed(m_), mask_.has_value() ? std::make_optional(transposed(*mask_)) : std::nullopt, v_, u_, r_};
  }

  // Whether the matrix is best read along its columns.
  bool by_columns() const {
    return m_.row_stride == 1 && m_.col_stride != 1;
  }

  // The loss. The gradients are added to `of_u` and `of_v`.
  double run(Residual kind, T setting, Added<T>& of_u, Added<T>& of_v) const {
    const int64_t down = ceil_div(m_.rows, height_), beside = ceil_div(m_.cols, width_);
    std::vector<double> sums(down * beside);
    for_pairs(down, beside, false, height_ * width_ * r_, [&](int64_t i, int64_t j) {
      sums[i * beside + j] = block(kind, setting, i * height_, j * width_, of_u, of_v);
    });
    of_u.write();
    of_v.write();
    return sum_of(sums);
  }

 private:
  double block(Residual kind, T setting, int64_t i0, int64_t j0, Added<T>& of_u, Added<T>& of_v) const {
    const int64_t rows = std::min(height_, m_.rows - i0), cols = std::min(width_, m_.cols - j0), ld = width_ + kTile;
    const Packed<T> left(u_, r_, i0, rows, of_v.wanted()), right(v_, r_, j0, cols, of_u.wanted());
    const auto model = room_for<T>(height_ * ld);
    const TileProduct<T> product;
    for (int64_t j = 0; j < cols; j += 2 * kTile)
      for (int64_t i = 0; i < rows; i += kTile)
        product(left.across.get() + i * r_, 1, kTile, right.across.get() + j * r_, kTile * r_, cols - j > kTile ? 2 : 1,
                r_, model.get() + i * ld + j, ld, false);
    double sum = 0;
    std::vector<T> scratch;
    uint8_t kept[kPairRows];
    int64_t row = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* mask = mask_.has_value() ? kept : nullptr;
      for (int64_t j = 0; j < cols && mask != nullptr; ++j) kept[j] = *mask_->at(i0 + i, j0 + j) != 0;
      sum += residual_row(kind, sslkern::tile(m_, i0 + i, i0 + i + 1, j0, j0 + cols, scratch, row), mask,
                          model.get() + i * ld, cols, setting);
    }
    if (of_u.wanted()) of_u.add(model.get(), ld, 1, i0, rows, right.along.get(), cols);
    if (of_v.wanted()) of_v.add(model.get(), 1, ld, j0, cols, left.along.get(), rows);
    return sum;
  }

  const Matrix m_;
  const std::optional<Matrix> mask_;
  const T *const u_, *const v_;
  const int64_t r_, height_, width_;
};

template <class T>
T* of_slice(const Tensor& t, int64_t s, int64_t numbers) {
  return t.numel() == 0 ? nullptr : data<T>(t) + s * numbers;
}

std::tuple<Tensor, Tensor, Tensor> low_rank_residual(const Tensor u, const Tensor v, const Tensor m,
                                                     const std::optional<Tensor> mask, const std::string loss,
                                                     double setting, bool need_u, bool need_v) {
  const int64_t n = u.size(-2), p = v.size(-2), r = u.size(-1);
  Tensor sums = fresh(u, stacked(u, {}), u.scalar_type());
  const Tensor grad_u = fresh(u, need_u ? stacked(u, {n, r}) : Shape{0}, u.scalar_type()),
               grad_v = fresh(v, need_v ? stacked(v, {p, r}) : Shape{0}, v.scalar_type());
  const Tensor left = dense(u), right = dense(v);
  const Residual kind = residual_of(loss);
  const auto run = [&]<class T>(int64_t s) {
    const auto kept = mask.has_value() ? std::make_optional(slice(*mask, s)) : std::nullopt;
    Added<T> of_u(u, of_slice<T>(grad_u, s, n * r), n, r), of_v(v, of_slice<T>(grad_v, s, p * r), p, r);
    const Slice<T> one(slice(m, s), kept, data<T>(left) + s * n * r, data<T>(right) + s * p * r, r);
    const T number = static_cast<T>(setting);
    data<T>(sums)[s] = static_cast<T>(one.by_columns() ? one.mirrored().run(kind, number, of_v, of_u)
                                                       : one.run(kind, number, of_u, of_v));
  };
  for_slices(stack_size(u), n * p,
             [&](int64_t s) { is_double(u) ? run.template operator()<double>(s) : run.template operator()<float>(s); });
  return {sums, grad_u, grad_v};
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("low_rank_residual", TORCH_BOX(&sslkern::low_rank_residual));
}
