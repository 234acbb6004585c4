// Backward of batch norm: channel sums of the gradient, then the gradient of x.
#pragma once

#include "batch_norm_forward.h"

namespace sslkern::batch_norm {

// Adds, for every sum of a range, dy behind the relu to `sum` and dy (x - mean) to `dot`.
template <class S, class T = Wide<S>>
void range_sums(const Layout& v, const Tensor& dy, const Tensor& x, const Range& r, const Coefficients<T>& c,
                double* sum, double* dot) {
  const S *from = data<S>(x), *g = data<S>(dy);
  if (v.planes)
    return for_pieces(v, r, [&](const Piece& p, int64_t channel) {
      const int64_t k = channel - r.begin;
      plane_gradients(g + p.offset, from + p.offset, p.cols, c.mean[channel], c.scale[channel], c.bias[channel], c.relu,
                      sum[k], dot[k]);
    });
  const PerColumn<T> mean(v, c.mean.data(), r), scale(v, c.scale.data(), r), bias(v, c.bias.data(), r);
  const Affine<T> f{mean.values, scale.values, bias.values, c.relu};
  for_pieces(v, r, [&](const Piece& p, int64_t) {
    T part_sum[kBlockCols], part_dot[kBlockCols];
    std::fill_n(part_sum, p.cols, T(0));
    std::fill_n(part_dot, p.cols, T(0));
    add_gradients(g + p.offset, from + p.offset, p.ld, p.rows, p.cols, f, part_sum, part_dot);
    for (int64_t j = 0; j < p.cols; ++j) sum[j] += part_sum[j];
    for (int64_t j = 0; j < p.cols; ++j) dot[j] += part_dot[j];
  });
}

// Writes sums (2, C) for channels [begin, end).
template <class T>
void finish(const Layout& v, int64_t begin, int64_t end, const double* sum, const double* dot, const Coefficients<T>& c,
            const Tensor& sums) {
  T* out = data<T>(sums) + begin;
  finish_sums(end - begin, sum + begin, dot + begin, c.low + begin, c.inverse_std.data() + begin, out,
              out + v.channels);
}

// sums (2, C): per channel, the sum of dy behind the relu, and of dy (x - mean) / sqrt(var + eps).
template <class S, class T = Wide<S>>
void gradient_sums(const Layout& v, const Tensor& dy, const Tensor& x, const Coefficients<T>& c, const Tensor& sums) {
  const int64_t parts = v.parts(), columns = v.columns_per_channel();
  std::vector<double> sum(parts * v.sums()), dot(parts * v.sums());
  for_ranges(v, [&](const Range& r) {
    const int64_t at = r.part * v.sums() + r.begin;
    range_sums<S>(v, dy, x, r, c, sum.data() + at, dot.data() + at);
  });
  for (std::vector<double>* each : {&sum, &dot}) {
    double* total = each->data();
    for (int64_t k = v.sums(); k < parts * v.sums(); ++k) total[k % v.sums()] += total[k];
    for (int64_t channel = 0; channel < v.channels && columns > 1; ++channel)
      total[channel] = std::accumulate(total + channel * columns, total + (channel + 1) * columns, 0.);
  }
  finish(v, 0, v.channels, sum.data(), dot.data(), c, sums);
}

// Per channel, the slope and offset that the gradient through the statistics subtracts. Valid after `set`. The means
// are `sums` times `each`.
template <class T>
struct Slopes {
  std::vector<T> slope, offset;

  explicit Slopes(const Coefficients<T>& c) : slope(c.scale.size()), offset(c.scale.size()) {}

  void set(int64_t begin, int64_t end, const Tensor& sums, double each, const Coefficients<T>& c) {
    const T* sum = data<T>(sums) + begin;
    slopes(end - begin, sum, sum + c.channels, each, c.low + begin, c.inverse_std.data() + begin,
           c.scale.data() + begin, slope.data() + begin, offset.data() + begin);
  }
};

template <class S, class T = Wide<S>>
void input_gradient_piece(const Layout& v, const Tensor& dy, const Tensor& x, const Coefficients<T>& c,
                          const Slopes<T>& s, const Tensor& dx, const Piece& p, int64_t channel) {
  write_input_gradient(data<S>(dy) + p.offset, data<S>(x) + p.offset, p.ld, p.rows, p.cols, v.length > 1,
                       c.from(channel), s.slope.data() + channel, s.offset.data() + channel, data<S>(dx) + p.offset);
}

template <class S, class T = Wide<S>>
void input_gradient(const Layout& v, const Tensor& dy, const Tensor& x, const Coefficients<T>& c, const Tensor& sums,
                    double each, const Tensor& dx) {
  Slopes<T> s(c);
  s.set(0, v.channels, sums, each, c);
  for (std::vector<T>* values : {&s.slope, &s.offset}) c.repeat(*values, v.channels);
  for_pieces_in_order(v, 2 * x.element_size(), [&](const Piece& p, int64_t channel) {
    input_gradient_piece<S>(v, dy, x, c, s, dx, p, channel);
  });
}

// Channel sums and the gradient of x, in the same two ways as `train`.
template <class S, class T = Wide<S>>
void train_backward(const Tensor& dy, const Tensor& x, Coefficients<T> c, const Tensor& sums, const Tensor& dx) {
  const Layout v(x);
  const double each = 1. / v.count();
  std::vector<double> sum(v.channels), dot(v.channels);
  Slopes<T> s(c);
  const bool done = for_whole_channels(v, 2 * x.element_size(), [&](const Range& r) {
    c.set(r.begin, r.end);
    range_sums<S>(v, dy, x, r, c, sum.data() + r.begin, dot.data() + r.begin);
    finish(v, r.begin, r.end, sum.data(), dot.data(), c, sums);
    s.set(r.begin, r.end, sums, each, c);
    for_pieces(v, r, [&](const Piece& p, int64_t channel) { input_gradient_piece<S>(v, dy, x, c, s, dx, p, channel); });
  });
  if (done) return;
  c.set_all();
  gradient_sums<S>(v, dy, x, c, sums);
  input_gradient<S>(v, dy, x, c, sums, each, dx);
}

}  // namespace sslkern::batch_norm
