// Batch moments, and the forward of batch norm. Sums run in T within a piece and in fp64 across pieces, in a fixed
// order. Maps run in memory order.
#pragma once

#include <numeric>

#include "batch_norm_halves.h"

namespace sslkern::batch_norm {

// Means and sums of squares about them, for a range of columns. Each piece takes one pass about the mean of the pieces
// before it. If that mean is a poor pivot, a second pass follows. Pieces are merged in fp64.
template <class S, class T = Wide<S>>
void column_moments(const Layout& v, const Tensor& x, const Range& r, double* mean, double* m2) {
  const int64_t sums = r.end - r.begin;
  T pivot[kBlockCols], sum[kBlockCols], shift[kBlockCols], square[kBlockCols];
  const S* first = data<S>(x) + r.row0 * v.width() + r.begin;
  for (int64_t j = 0; j < sums; ++j) pivot[j] = wide(first[j]);
  int64_t count = 0;
  for_pieces(v, r, [&](const Piece& p, int64_t) {
    const S* from = data<S>(x) + p.offset;
    std::fill_n(sum, sums, T(0));
    std::fill_n(square, sums, T(0));
    add_powers(from, p.ld, p.rows, p.cols, pivot, sum, square);
    if (!centre_squares(p.rows, sums, sum, square) || count == 0) {  // the first pivot is a single element, not a mean
      for (int64_t j = 0; j < sums; ++j) shift[j] = sum[j] / p.rows;
      std::fill_n(square, sums, T(0));
      add_squares(from, p.ld, p.rows, p.cols, pivot, shift, square);
    }
    merge_columns(count, p.rows, sums, sum, square, pivot, mean, m2);
    count += p.rows;
  });
}

// The same for planes.
template <class S, class T = Wide<S>>
void plane_moments(const Layout& v, const Tensor& x, const Range& r, double* mean, double* m2) {
  for_pieces(v, r, [&](const Piece& p, int64_t channel) {
    const S* from = data<S>(x) + p.offset;
    const int64_t k = channel - r.begin, row = p.offset / v.width();
    const int64_t count = (row - r.row0) * v.length + p.offset % v.length;
    T pivot = count > 0 ? static_cast<T>(mean[k]) : T(wide(from[0])), sum, square;
    plane_powers(from, p.cols, pivot, sum, square);
    if (!(static_cast<double>(sum) * sum <= .5 * p.cols * square)) {  // the test of `centre_squares`
      pivot = static_cast<T>(pivot + static_cast<double>(sum) / p.cols);
      plane_powers(from, p.cols, pivot, sum, square);
    }
    const double shift = static_cast<double>(sum) / p.cols;
    merge(count, p.cols, pivot + shift, square - shift * sum, mean[k], m2[k]);
  });
}

template <class S, class T = Wide<S>>
void range_moments(const Layout& v, const Tensor& x, const Range& r, double* mean, double* m2) {
  std::fill_n(mean, r.end - r.begin, 0.);
  std::fill_n(m2, r.end - r.begin, 0.);
  v.planes ? plane_moments<S>(v, x, r, mean, m2) : column_moments<S>(v, x, r, mean, m2);
}

// Merges the columns of each channel into the first C entries. All columns have the same number of rows.
inline void join_columns(const Layout& v, double* mean, double* m2) {
  const int64_t columns = v.columns_per_channel();
  for (int64_t c = 0; c < v.channels && columns > 1; ++c) {
    const double *means = mean + c * columns, *m2s = m2 + c * columns;
    const double joint = std::accumulate(means, means + columns, 0.) / columns;
    double square = 0;
    for (int64_t k = 0; k < columns; ++k) square += m2s[k] + v.rows * (means[k] - joint) * (means[k] - joint);
    mean[c] = joint;
    m2[c] = square;
  }
}

// Writes centre (2, C) and variance for channels [begin, end).
template <class T>
void finish(const Layout& v, int64_t begin, int64_t end, const double* mean, const double* m2, const Tensor& centre,
            const Tensor& variance) {
  T* high = data<T>(centre) + begin;
  finish_moments(end - begin, v.count(), mean + begin, m2 + begin, high, high + v.channels, data<T>(variance) + begin);
}

template <class S, class T = Wide<S>>
void moments(const Layout& v, const Tensor& x, const Tensor& centre, const Tensor& variance) {
  const int64_t parts = v.parts(), sums = v.sums();
  std::vector<double> mean(parts * sums), m2(parts * sums);
  for_ranges(v, [&](const Range& r) {
    const int64_t at = r.part * sums + r.begin;
    range_moments<S>(v, x, r, mean.data() + at, m2.data() + at);
  });
  const int64_t each = v.planes ? v.length : 1, step = v.part_rows();
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t count = part * step * each, more = std::min(step, v.rows - part * step) * each;
    for (int64_t k = 0; k < sums; ++k) merge(count, more, mean[part * sums + k], m2[part * sums + k], mean[k], m2[k]);
  }
  join_columns(v, mean.data(), m2.data());
  finish<T>(v, 0, v.channels, mean.data(), m2.data(), centre, variance);
}

// The coefficients of `Affine` for every channel. Valid after `set`. They are repeated where a map folds several rows
// into one.
template <class T>
struct Coefficients {
  const int64_t channels;
  const T *high, *low, *variance, *weight, *beta;
  const T eps;
  const bool relu;
  std::vector<T> mean, scale, bias, inverse_std;

  Coefficients(const Layout& v, const Tensor& centre, const Tensor& variance, const Tensor& weight, const Tensor& beta,
               double eps, bool relu)
      : channels(v.channels),
        high(data<T>(centre)),
        low(high + channels),
        variance(data<T>(variance)),
        weight(data<T>(weight)),
        beta(data<T>(beta)),
        eps(static_cast<T>(eps)),
        relu(relu),
        mean(v.fold() * channels),
        scale(v.fold() * channels),
        bias(v.fold() * channels),
        inverse_std(channels) {}

  void set(int64_t begin, int64_t end) {
    std::copy(high + begin, high + end, mean.begin() + begin);
    affine_of(end - begin, low + begin, variance + begin, weight + begin, beta + begin, eps, inverse_std.data() + begin,
              scale.data() + begin, bias.data() + begin);
  }
  Coefficients& set_all() {
    set(0, channels);
    for (std::vector<T>* each : {&mean, &scale, &bias}) repeat(*each, channels);
    return *this;
  }
  static void repeat(std::vector<T>& values, int64_t channels) {
    for (size_t k = channels; k < values.size(); ++k) values[k] = values[k - channels];
  }
  Affine<T> from(int64_t channel) const {
    return {mean.data() + channel, scale.data() + channel, bias.data() + channel, relu};
  }
};

template <class S, class T = Wide<S>>
void apply_piece(const Layout& v, const Tensor& x, const Coefficients<T>& c, const Tensor& y, const Piece& p,
                 int64_t channel) {
  affine(data<S>(x) + p.offset, p.ld, p.rows, p.cols, v.length > 1, c.from(channel), data<S>(y) + p.offset);
}

template <class S, class T = Wide<S>>
void apply(const Layout& v, const Tensor& x, const Coefficients<T>& c, const Tensor& y) {
  for_pieces_in_order(v, x.element_size(),
                      [&](const Piece& p, int64_t channel) { apply_piece<S>(v, x, c, y, p, channel); });
}

// Statistics and output of training. A small x is processed channel by channel; a large one takes one pass over all of
// x after the other.
template <class S, class T = Wide<S>>
void train(const Tensor& x, Coefficients<T> c, const Tensor& centre, const Tensor& variance, const Tensor& y) {
  const Layout v(x);
  std::vector<double> mean(v.channels), m2(v.channels);
  const bool done = for_whole_channels(v, x.element_size(), [&](const Range& r) {
    range_moments<S>(v, x, r, mean.data() + r.begin, m2.data() + r.begin);
    finish<T>(v, r.begin, r.end, mean.data(), m2.data(), centre, variance);
    c.set(r.begin, r.end);
    for_pieces(v, r, [&](const Piece& p, int64_t channel) { apply_piece<S>(v, x, c, y, p, channel); });
  });
  if (done) return;
  moments<S>(v, x, centre, variance);
  apply<S>(v, x, c.set_all(), y);
}

}  // namespace sslkern::batch_norm
