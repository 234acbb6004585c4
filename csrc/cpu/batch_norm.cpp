// Batch moments and batch norm on the CPU: sums in T over a piece and in fp64 across pieces, in a fixed order; maps in
// the order of memory.
#include "batch_norm_halves.h"

#include <numeric>

namespace sslkern {
namespace {

// Means, and sums of squares about them, of a range of columns. One pass over each piece, about the mean of those
// before it, and a second one where that is no good pivot; a merge in fp64 between them.
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
    if (!centre_squares(p.rows, sums, sum, square) || count == 0) {  // the first number is no mean
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
    if (!(static_cast<double>(sum) * sum <= .5 * p.cols * square)) {  // as in `centre_squares`
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

// What the columns of every channel found, all of them over the same number of rows, into the first C numbers.
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

// Centre (2, C) and variance of channels [begin, end).
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

// `Affine` of every channel, once `set`; repeated for rows that are folded.
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

// Statistics and output: channel by channel where x is small, one pass over all of it after the other where it is not.
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

// Per sum of a range, on top of what is there: of dy behind the relu, and of dy (x - mean).
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

// Sums (2, C) of channels [begin, end).
template <class T>
void finish(const Layout& v, int64_t begin, int64_t end, const double* sum, const double* dot, const Coefficients<T>& c,
            const Tensor& sums) {
  T* out = data<T>(sums) + begin;
  finish_sums(end - begin, sum + begin, dot + begin, c.low + begin, c.inverse_std.data() + begin, out,
              out + v.channels);
}

// Per channel: the sum of dy behind the relu, and of dy (x - mean) / sqrt(var + eps). (2, C)
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

// What the statistics take from a gradient, per channel, once `set`; the means are sums times `each`.
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

// Sums and gradient of x, as `train` goes.
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

// f(S()) with the type that x is stored in.
template <class F>
void as_stored(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return f(BFloatBits());
    case ScalarType::Half: return f(HalfBits());
    case ScalarType::Double: return f(double());
    default: return f(float());
  }
}

Tensor per_channel(const Tensor& x) {
  return fresh(x, {x.size(1)}, accumulation_dtype(x));
}

Tensor two_per_channel(const Tensor& x) {
  return fresh(x, {2, x.size(1)}, accumulation_dtype(x));
}

std::tuple<Tensor, Tensor> batch_moments_fwd(const Tensor x) {
  Tensor centre = two_per_channel(x), variance = per_channel(x);
  as_stored(x, [&](auto zero) { moments<decltype(zero)>(Layout(x), x, centre, variance); });
  return {centre, variance};
}

// running += momentum (batch times factor - running)
template <class T>
void track(const std::optional<Tensor>& running, const Tensor& batch, double momentum, double factor) {
  if (!running) return;
  T* to = data<T>(*running);
  const T *from = data<T>(batch), share = static_cast<T>(momentum), scale = static_cast<T>(factor);
  for (int64_t c = 0; c < running->numel(); ++c) to[c] += share * (from[c] * scale - to[c]);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor x, const Tensor weight, const Tensor bias,
                                                  std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                                  double momentum, double eps, bool relu) {
  Tensor centre = two_per_channel(x), variance = per_channel(x), y = fresh_like(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Layout v(x);
    train<S>(x, Coefficients<Wide<S>>(v, centre, variance, weight, bias, eps, relu), centre, variance, y);
    track<Wide<S>>(running_mean, centre, momentum, 1);
    track<Wide<S>>(running_var, variance, momentum, v.count() / (v.count() - 1.));
  });
  return {y, centre, variance};
}

std::tuple<Tensor, Tensor> batch_norm_bwd(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias,
                                          const Tensor centre, const Tensor variance, double eps, bool relu) {
  Tensor sums = two_per_channel(x), dx = fresh_like(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Coefficients<Wide<S>> c(Layout(x), centre, variance, weight, bias, eps, relu);
    train_backward<S>(dy, x, c, sums, dx);
  });
  return {dx, sums};
}

Tensor batch_norm_apply(const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                        const Tensor variance, double eps, bool relu) {
  Tensor y = fresh_like(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Layout v(x);
    apply<S>(v, x, Coefficients<Wide<S>>(v, centre, variance, weight, bias, eps, relu).set_all(), y);
  });
  return y;
}

Tensor batch_norm_sums(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                       const Tensor variance, double eps, bool relu) {
  Tensor sums = two_per_channel(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Layout v(x);
    gradient_sums<S>(v, dy, x, Coefficients<Wide<S>>(v, centre, variance, weight, bias, eps, relu).set_all(), sums);
  });
  return sums;
}

Tensor batch_norm_input_grad(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias,
                             const Tensor centre, const Tensor variance, const Tensor means, double eps, bool relu) {
  Tensor dx = fresh_like(x);
  as_stored(x, [&](auto zero) {
    using S = decltype(zero);
    const Layout v(x);
    Coefficients<Wide<S>> c(v, centre, variance, weight, bias, eps, relu);
    input_gradient<S>(v, dy, x, c.set_all(), means, 1., dx);
  });
  return dx;
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("batch_moments_fwd", TORCH_BOX(&sslkern::batch_moments_fwd));
  m.impl("batch_norm_fwd", TORCH_BOX(&sslkern::batch_norm_fwd));
  m.impl("batch_norm_bwd", TORCH_BOX(&sslkern::batch_norm_bwd));
  m.impl("batch_norm_apply", TORCH_BOX(&sslkern::batch_norm_apply));
  m.impl("batch_norm_sums", TORCH_BOX(&sslkern::batch_norm_sums));
  m.impl("batch_norm_input_grad", TORCH_BOX(&sslkern::batch_norm_input_grad));
}
