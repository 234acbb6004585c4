// Sums of cos(t_k <z_i, a_j>) and sin(t_k <z_i, a_j>) over the rows z_i, and their gradient. Of the projections
// <z_i, a_j>, a block at a time is in cache; of the cosines and sines, one knot of a few rows in registers.
#include "characteristic_sums.h"

#include "columns.h"
#include "pair_rows.h"

namespace sslkern {
namespace {

constexpr int64_t kTurnBlock = 64;  // rows of a block of projections, whose sums run in T
constexpr int64_t kTurnPart = 512;  // rows of a task of the forward

// Directions (D, K), packed for products over D (`across`) and for products over K (`along`).
template <class T>
class Directions {
 public:
  Directions(const Tensor& like, const T* a, int64_t d, int64_t k, bool for_projections, bool for_gradients)
      : d_(d),
        k_(k),
        across_(fresh(like, {for_projections ? round_up(k, kTile) * d : 0}, dtype_of<T>())),
        along_(fresh(like, {for_gradients ? round_up(d, kTile) * k : 0}, dtype_of<T>())) {
    for_panels(for_projections ? k : 0, d,
               [&](int64_t j, int64_t count) { pack(a + j, 1, k, count, d, data<T>(across_) + j * d); });
    for_panels(for_gradients ? d : 0, k,
               [&](int64_t j, int64_t count) { pack(a + j * k, k, 1, count, k, data<T>(along_) + j * k); });
  }

  // out (rows, kTurnCols) = z times the directions from j0 on, for whole tiles; z has unit column stride.
  void project(const T* z, int64_t ld, int64_t rows, int64_t j0, int64_t cols, T* edge, T* out) const {
    const TileProduct<T> product;
    const T* const packed = data<T>(across_) + j0 * d_;
    const int64_t full = rows / kTile * kTile;
    if (full < rows) {
      std::fill_n(edge, kTile * d_, T(0));
      for (int64_t i = full; i < rows; ++i) std::copy_n(z + i * ld, d_, edge + (i - full) * d_);
    }
    for (int64_t j = 0; j < cols; j += 2 * kTile)
      for (int64_t i = 0; i < rows; i += kTile)
        product(i < full ? z + i * ld : edge, i < full ? ld : d_, 1, packed + j * d_, kTile * d_,
                cols - j > kTile ? 2 : 1, d_, out + i * kTurnCols + j, kTurnCols, false);
  }

  // out (rows, ld) = or += x (rows, kTurnCols) times the transposed directions from j0 on, for whole tiles.
  void spread(const T* x, int64_t rows, int64_t j0, int64_t cols, T* out, int64_t ld, bool add) const {
    const TileProduct<T> product;
    const T* const packed = data<T>(along_) + j0 * kTile;
    for (int64_t p = 0; p < d_; p += 2 * kTile)
      for (int64_t i = 0; i < rows; i += kTile)
        product(x + i * kTurnCols, kTurnCols, 1, packed + p * k_, kTile * k_, d_ - p > kTile ? 2 : 1, cols,
                out + i * ld + p, ld, add);
  }

 private:
  template <class F>
  static void for_panels(int64_t across, int64_t depth, const F& f) {
    in_parallel(ceil_div(across, kTile), kTile * depth, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) f(t * kTile, std::min(kTile, across - t * kTile));
    });
  }

  const int64_t d_, k_;
  const Tensor across_, along_;
};

// Calls f(first, last, a) for ranges of slices with the same directions a: all slices at once, or one after the other.
template <class T, class F>
void for_directions(const Tensor& z, const Tensor& directions, const F& f) {
  const int64_t slices = stack_size(z);
  bool shared = true;
  for (int64_t k = 0; k + 2 < directions.dim(); ++k)
    shared = shared && (directions.stride(k) == 0 || directions.size(k) == 1);
  const int64_t dims = directions.dim();
  Tensor one = directions;
  for (int64_t k = 0; shared && k + 2 < dims; ++k) one = stable::select(one, 0, 0);
  const Tensor a = dense(one);
  const int64_t numbers = a.size(a.dim() - 2) * a.size(a.dim() - 1);
  if (shared && slices > 0) return f(0, slices, data<T>(a));
  for (int64_t s = 0; s < slices; ++s) f(s, s + 1, data<T>(a) + s * numbers);
}

// One part of the rows of a slice, for the directions [j0, j0 + cols).
template <class T>
void sum_part(const Matrix& z, int64_t begin, int64_t end, const Directions<T>& directions, int64_t j0, int64_t cols,
              const Knots<T>& knots, T* kept, int64_t k, double* total) {
  const Rotation<T> rotate = rotation<T>();
  const int64_t d = z.cols, whole = round_up(cols, kTile), numbers = 2 * knots.count * kTurnCols;
  const auto sums = room_for<T>(numbers), x = room_for<T>(kTurnBlock * kTurnCols), edge = room_for<T>(kTile * d);
  std::fill_n(x.get(), kTurnBlock * kTurnCols, T(0));
  std::fill_n(total, numbers, 0.);
  std::vector<T> scratch;
  Turning<T> state;
  for (int64_t i0 = begin; i0 < end; i0 += kTurnBlock) {
    const int64_t rows = std::min(kTurnBlock, end - i0);
    int64_t ld;
    const T* const from = tile(z, i0, i0 + rows, 0, d, scratch, ld);
    directions.project(from, ld, rows, j0, whole, edge.get(), x.get());
    for (int64_t i = 0; i < rows && kept != nullptr; ++i)
      std::copy_n(x.get() + i * kTurnCols, cols, kept + (i0 + i) * k + j0);
    std::fill_n(sums.get(), numbers, T(0));
    for (int64_t i = 0; i < rows; i += kTurnRows) {
      const T* const some = x.get() + i * kTurnCols;
      const int64_t count = std::min(kTurnRows, rows - i);
      if (largest_size(some, kTurnNumbers) > knots.limit()) {
        add_large_turns(some, count, whole, knots, sums.get());
        continue;
      }
      begin_turns(some, kTurnNumbers, knots, state);
      std::fill_n(state.c + count * kTurnCols, (kTurnRows - count) * kTurnCols, T(0));
      std::fill_n(state.s + count * kTurnCols, (kTurnRows - count) * kTurnCols, T(0));
      rotate.add(state, whole, knots.count, sums.get());
    }
    for (int64_t q = 0; q < numbers; ++q) total[q] += sums[q];
  }
}

template <class T>
void sum_slices(const Tensor& z, const Tensor& directions, const Knots<T>& knots, T* out, T* kept) {
  const int64_t n = z.size(-2), d = z.size(-1), k = directions.size(-1), tall = 2 * knots.count,
                parts = std::max<int64_t>(1, ceil_div(n, kTurnPart)), strips = ceil_div(k, kTurnCols),
                numbers = tall * kTurnCols;
  for_directions<T>(z, directions, [&](int64_t first, int64_t last, const T* a) {
    const Directions<T> packed(z, a, d, k, true, false);
    const int64_t slices = last - first;
    const auto totals = room_for<double>(parts > 1 ? slices * strips * parts * numbers : 0);
    const auto write = [&](int64_t at, const double* total, int64_t count) {  // the sums of a strip, over its parts
      const int64_t j0 = at % strips * kTurnCols, cols = std::min(kTurnCols, k - j0);
      T* const to = out + (first + at / strips) * tall * k + j0;
      for (int64_t q = 0; q < tall; ++q)
        for (int64_t j = 0; j < cols; ++j) {
          double sum = 0;
          for (int64_t p = 0; p < count; ++p) sum += total[p * numbers + q * kTurnCols + j];
          to[q * k + j] = static_cast<T>(sum);
        }
    };
    in_parallel(slices * strips * parts, std::min(n, kTurnPart) * kTurnCols * (d + 4 * tall),
                [&](int64_t begin, int64_t end) {
                  const auto own = room_for<double>(parts > 1 ? 0 : numbers);
                  for (int64_t task = begin; task < end; ++task) {
                    const int64_t at = task / parts, part = task % parts, s = first + at / strips;
                    const int64_t j0 = at % strips * kTurnCols, i0 = part * kTurnPart;
                    double* const total = parts > 1 ? totals.get() + task * numbers : own.get();
                    sum_part(slice(z, s), i0, std::min(n, i0 + kTurnPart), packed, j0, std::min(kTurnCols, k - j0),
                             knots, kept == nullptr ? nullptr : kept + s * n * k, k, total);
                    if (parts == 1) write(at, total, 1);
                  }
                });
    if (parts == 1) return;
    in_parallel(slices * strips, parts * numbers, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) write(at, totals.get() + at * parts * numbers, parts);
    });
  });
}

std::tuple<Tensor, Tensor> characteristic_sums_fwd(const Tensor z, const Tensor directions, double first, double step,
                                                   int64_t count, bool keep) {
  const int64_t n = z.size(-2), k = directions.size(-1);
  const ScalarType dtype = accumulation_dtype(z);
  Tensor out = fresh(z, stacked(z, {2, count, k}), dtype);
  Tensor projections = fresh(z, keep ? stacked(z, {n, k}) : Shape{0}, dtype);
  const auto run = [&]<class T>() {
    sum_slices<T>(z, directions, Knots<T>(first, step, count), data<T>(out), keep ? data<T>(projections) : nullptr);
  };
  is_double(z) ? run.template operator()<double>() : run.template operator()<float>();
  return {out, projections};
}

// The gradients of the sums, times the derivatives of the angles by the projections: -t_k for a cosine, t_k for a sine.
template <class T>
void weigh_gradients(const T* grad, const Knots<T>& knots, int64_t k, T* weights, int64_t ld) {
  for (int64_t q = 0; q < 2 * knots.count; ++q) {
    const T t = static_cast<T>(q < knots.count ? -knots.at(q) : knots.at(q - knots.count));
    for (int64_t j = 0; j < k; ++j) weights[q * ld + j] = t * grad[q * k + j];
    std::fill_n(weights + q * ld + k, ld - k, T(0));
  }
}

// The gradient by the rows [i0, i0 + rows) of a slice, in T: out (kTurnBlock, ld).
template <class T>
void gradient_of_rows(const Matrix& z, int64_t i0, int64_t rows, const Directions<T>& directions, const T* kept,
                      int64_t k, const Knots<T>& knots, const T* weights, int64_t weights_ld, T* out, int64_t ld) {
  const Rotation<T> rotate = rotation<T>();
  const int64_t d = z.cols;
  const auto x = room_for<T>(kTurnBlock * kTurnCols), edge = room_for<T>(kept == nullptr ? kTile * d : 0);
  std::fill_n(x.get(), kTurnBlock * kTurnCols, T(0));
  std::vector<T> scratch;
  Turning<T> state;
  int64_t from_ld = 0;
  const T* const from = kept == nullptr ? tile(z, i0, i0 + rows, 0, d, scratch, from_ld) : nullptr;
  for (int64_t j0 = 0; j0 < k; j0 += kTurnCols) {
    const int64_t cols = std::min(kTurnCols, k - j0), whole = round_up(cols, kTile);
    if (cols < kTurnCols) std::fill_n(x.get(), kTurnBlock * kTurnCols, T(0));
    if (kept == nullptr) {
      directions.project(from, from_ld, rows, j0, whole, edge.get(), x.get());
    } else {
      for (int64_t i = 0; i < rows; ++i) std::copy_n(kept + (i0 + i) * k + j0, cols, x.get() + i * kTurnCols);
    }
    for (int64_t i = 0; i < rows; i += kTurnRows) {
      T* const some = x.get() + i * kTurnCols;
      if (largest_size(some, kTurnNumbers) > knots.limit()) {
        weigh_large_turns(some, std::min(kTurnRows, rows - i), cols, knots, weights + j0, weights_ld);
        continue;
      }
      begin_turns(some, kTurnNumbers, knots, state);
      rotate.weigh(state, whole, knots.count, weights + j0, weights_ld, some);
    }
    directions.spread(x.get(), rows, j0, cols, out, ld, j0 > 0);
  }
}

template <class T>
void write_rows(const T* from, int64_t ld, int64_t rows, const Tensor& grad, int64_t at) {
  const int64_t d = grad.size(-1);
  switch (grad.scalar_type()) {
    case ScalarType::BFloat16: return convert_rows(from, ld, rows, d, data<BFloatBits>(grad) + at * d, d);
    case ScalarType::Half: return convert_rows(from, ld, rows, d, data<HalfBits>(grad) + at * d, d);
    default: return convert_rows(from, ld, rows, d, data<T>(grad) + at * d, d);
  }
}

template <class T>
void gradients(const Tensor& grad, const Tensor& z, const Tensor& directions, const T* kept, const Knots<T>& knots,
               const Tensor& out) {
  const int64_t n = z.size(-2), d = z.size(-1), k = directions.size(-1), tall = 2 * knots.count,
                blocks = ceil_div(n, kTurnBlock), ld = round_up(d, kTile), weights_ld = round_up(k, kTile);
  for_directions<T>(z, directions, [&](int64_t first, int64_t last, const T* a) {
    const Directions<T> packed(z, a, d, k, kept == nullptr, true);
    const int64_t slices = last - first;
    const auto weights = room_for<T>(slices * tall * weights_ld);
    in_parallel(slices, tall * k, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        weigh_gradients(data<T>(grad) + (first + s) * tall * k, knots, k, weights.get() + s * tall * weights_ld,
                        weights_ld);
    });
    in_parallel(slices * blocks, std::min(n, kTurnBlock) * k * (d + 4 * tall), [&](int64_t begin, int64_t end) {
      const auto sums = room_for<T>(kTurnBlock * ld);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t s = first + task / blocks, i0 = task % blocks * kTurnBlock, rows = std::min(kTurnBlock, n - i0);
        gradient_of_rows(slice(z, s), i0, rows, packed, kept == nullptr ? nullptr : kept + s * n * k, k, knots,
                         weights.get() + (s - first) * tall * weights_ld, weights_ld, sums.get(), ld);
        write_rows(sums.get(), ld, rows, out, s * n + i0);
      }
    });
  });
}

Tensor characteristic_sums_bwd(const Tensor grad_any, const Tensor z, const Tensor directions,
                               const Tensor projections_any, double first, double step) {
  const Tensor grad = dense(grad_any), projections = dense(projections_any);
  Tensor out = fresh(z, stacked(z, {z.size(-2), z.size(-1)}), z.scalar_type());
  const auto run = [&]<class T>() {
    const Knots<T> knots(first, step, grad.size(-2));
    gradients<T>(grad, z, directions, projections.numel() == 0 ? nullptr : data<T>(projections), knots, out);
  };
  is_double(z) ? run.template operator()<double>() : run.template operator()<float>();
  return out;
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("characteristic_sums_fwd", TORCH_BOX(&sslkern::characteristic_sums_fwd));
  m.impl("characteristic_sums_bwd", TORCH_BOX(&sslkern::characteristic_sums_bwd));
}
