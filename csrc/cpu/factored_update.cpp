// A weight and its optimizer state, moved by the factors of the gradient, which is not formed.
#include "factored_update.h"

namespace sslkern {
namespace {

template <class T>
using Move = double (*)(const Slots<T>& at, int64_t ld, const T* product, int64_t product_ld, int64_t rows, int64_t n,
                        const T* k);

template <class T>
class FactoredUpdate {
 public:
  FactoredUpdate(const Slots<T>& slots, const Tensor& w, const Tensor& dy, const Tensor& x, const T* k, Move<T> move)
      : slots_(slots),
        q_(w.size(0)),
        p_(w.size(1)),
        depth_(dy.size(0)),
        k_(k),
        move_(move),
        left_(slice(dy, 0), w),
        right_(slice(x, 0), w),
        height_(depth_ <= kDepth ? kTile : kDepth / 2),
        width_(std::min(round_up(p_, kTile),
                        std::min(kWidth, kFactorBlock / std::clamp<int64_t>(depth_, 1, kDepth) / kTile * kTile))) {}

  // The squared norm of the new W.
  double run() const {
    const int64_t panels = left_.count() + right_.count();
    in_parallel(panels, kTile * depth_, [&](int64_t first, int64_t last) {
      left_.write(std::min(first, left_.count()), std::min(last, left_.count()));
      right_.write(std::max(first - left_.count(), int64_t{0}), std::max(last - left_.count(), int64_t{0}));
    });
    const int64_t down = ceil_div(q_, height_), beside = ceil_div(p_, width_);
    std::vector<double> squares(down * beside);
    in_parallel(down * beside, height_ * width_ * (depth_ + 8), [&](int64_t first, int64_t last) {
      const auto strip = room_for<T>(height_ * width_);
      for (int64_t b = first; b < last; ++b) squares[b] = block(b % down * height_, b / down * width_, strip.get());
    });
    return sum_of(squares);
  }

 private:
  const Slots<T> slots_;
  const int64_t q_, p_, depth_;
  const T* const k_;
  const Move<T> move_;
  const Panels<T> left_, right_;
  const int64_t height_, width_;

  double block(int64_t i0, int64_t j0, T* sums) const {
    const int64_t rows = std::min(height_, q_ - i0), cols = std::min(width_, p_ - j0);
    int64_t k0 = 0;
    for (; k0 + kDepth < depth_; k0 += kDepth)
      for (int64_t i = 0; i < rows; i += kTile)
        for (int64_t j = 0; j < cols; j += kTile) add(i0 + i, j0 + j, k0, kDepth, sums + i * width_ + j);
    double square = 0;
    for (int64_t i = 0; i < rows; i += kTile) {
      for (int64_t j = 0; j < cols; j += kTile)
        add(i0 + i, j0 + j, k0, depth_ - k0, sums + i * width_ + j, moved_soon(i0 + i, j0 + j));
      square +=
          move_(slots_.moved((i0 + i) * p_ + j0), p_, sums + i * width_, width_, std::min(kTile, rows - i), cols, k_);
    }
    return square;
  }

  // A tile of W and its state.
  Lines<T> moved_soon(int64_t i, int64_t j) const {
    Lines<T> lines;
    lines.ld = p_;
    lines.rows = std::min(kTile, q_ - i);
    for (T* from : slots_.at)
      if (from != nullptr) lines.at[lines.count++] = from + i * p_ + j;
    return lines;
  }

  // Writes or adds a tile of the product of rows k0 ... of the factors.
  void add(int64_t i, int64_t j, int64_t k0, int64_t depth, T* to, const Lines<T>& ahead = {}) const {
    product_(left_.at(i / kTile, k0), 1, kTile, right_.at(j / kTile, k0), depth, to, width_, k0 > 0, ahead);
  }

  const TileProduct<T> product_;
};

template <class T>
T* slot(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<T*>(const_cast<Tensor&>(*t).mutable_data_ptr()) : nullptr;
}

template <class T>
double move(const std::optional<Tensor> (&tensors)[kSlots], const Tensor& dy, const Tensor& x, const Tensor& k,
            Move<T> rule) {
  Slots<T> slots;
  for (int s = 0; s < kSlots; ++s) slots.at[s] = slot<T>(tensors[s]);
  std::vector<T> coefficients(k.numel());
  for (int64_t j = 0; j < k.numel(); ++j) coefficients[j] = data<T>(k)[j * k.stride(0)];
  return FactoredUpdate<T>(slots, *tensors[0], dy, x, coefficients.data(), rule).run();
}

Tensor number(const Tensor& like, double value) {
  Tensor out = fresh(like, {}, ScalarType::Double);
  *data<double>(out) = value;
  return out;
}

Tensor factored_momentum_(Tensor w, std::optional<Tensor> m, const Tensor dy, const Tensor x, const Tensor k) {
  const std::optional<Tensor> slots[kSlots] = {w, m};
  return number(
      w, is_double(w) ? move<double>(slots, dy, x, k, move_momentum) : move<float>(slots, dy, x, k, move_momentum));
}

Tensor factored_adam_(Tensor w, Tensor m, Tensor v, std::optional<Tensor> highest, const Tensor dy, const Tensor x,
                      const Tensor k) {
  const std::optional<Tensor> slots[kSlots] = {w, m, v, highest};
  return number(w, is_double(w) ? move<double>(slots, dy, x, k, move_adam) : move<float>(slots, dy, x, k, move_adam));
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("factored_momentum_", TORCH_BOX(&sslkern::factored_momentum_));
  m.impl("factored_adam_", TORCH_BOX(&sslkern::factored_adam_));
}
