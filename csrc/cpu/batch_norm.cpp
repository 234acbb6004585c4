// Batch moments and batch norm on the CPU. x is (M, C), or (N, C, L), contiguous. Long runs of one channel are planes;
// everything else is columns: M rows, or N rows of C * L columns of which L make a channel.
#include "blocks.h"

namespace sslkern {
namespace {

constexpr int64_t kChunkRows = 128;      // rows whose mean is taken first and whose squares after, from cache
constexpr int64_t kShortPlane = 64;      // numbers; shorter runs are columns
constexpr int64_t kInCache = 768 << 10;  // bytes that one pass over a unit leaves in L2 for the next
constexpr int64_t kParts = 64;           // row parts at most, whose sums are merged in order

// square += ((x - pivot) - shift)^2, column by column
template <class T>
SSLKERN_INLINE void add_squares_body(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot, const T* shift,
                                     T* square) {
  for (int64_t i = 0; i < rows; ++i, x += ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T d = (x[j] - pivot[j]) - shift[j];
      square[j] += d * d;
    }
  }
}

// Chan's merge of `more` numbers, of this mean and sum of squares about it, into (count, mean, m2).
SSLKERN_INLINE void merge(int64_t count, int64_t more, double more_mean, double more_m2, double& mean, double& m2) {
  const double delta = more_mean - mean, share = static_cast<double>(more) / (count + more);
  mean += delta * share;
  m2 += more_m2 + delta * delta * count * share;
}

// The same for columns of sums about a pivot, and of squares about their means.
template <class T>
SSLKERN_INLINE void merge_columns_body(int64_t count, int64_t more, int64_t cols, const T* pivot, const T* sum,
                                       const T* square, double* mean, double* m2) {
  const double each = 1. / more;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) merge(count, more, pivot[j] + sum[j] * each, square[j], mean[j], m2[j]);
}

// What each column does to its numbers: y = ((x - high) - low) * scale + bias, below zero cut off where relu.
template <class T>
struct Affine {
  const T *high, *low, *scale, *bias;
  bool relu;
};

template <class T>
SSLKERN_INLINE void affine_body(const T* x, int64_t ld, int64_t rows, int64_t cols, const Affine<T>& f, T* out,
                                int64_t out_ld) {
  const T *high = f.high, *low = f.low, *scale = f.scale, *bias = f.bias;
  for (int64_t i = 0; i < rows; ++i, x += ld, out += out_ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T y = ((x[j] - high[j]) - low[j]) * scale[j] + bias[j];
      out[j] = f.relu && y < 0 ? T(0) : y;
    }
  }
}

// sum += dy, dot += dy (x - mean), with dy zero where the relu was; NaN passes, as in torch
template <class T>
SSLKERN_INLINE void add_gradients_body(const T* dy, int64_t dy_ld, const T* x, int64_t ld, int64_t rows, int64_t cols,
                                       const Affine<T>& f, T* sum, T* dot) {
  const T *high = f.high, *low = f.low, *scale = f.scale, *bias = f.bias;
  for (int64_t i = 0; i < rows; ++i, x += ld, dy += dy_ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T c = (x[j] - high[j]) - low[j];
      const T g = f.relu && c * scale[j] + bias[j] <= 0 ? T(0) : dy[j];
      sum[j] += g;
      dot[j] += g * c;
    }
  }
}

// dx = scale (dy - mean - along (x - mean of x))
template <class T>
SSLKERN_INLINE void input_gradient_body(const T* dy, int64_t dy_ld, const T* x, int64_t ld, int64_t rows, int64_t cols,
                                        const Affine<T>& f, const T* mean, const T* along, T* out, int64_t out_ld) {
  const T *high = f.high, *low = f.low, *scale = f.scale, *bias = f.bias;
  for (int64_t i = 0; i < rows; ++i, x += ld, dy += dy_ld, out += out_ld) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const T c = (x[j] - high[j]) - low[j];
      const T g = f.relu && c * scale[j] + bias[j] <= 0 ? T(0) : dy[j];
      out[j] = scale[j] * ((g - mean[j]) - along[j] * c);
    }
  }
}

#define SSLKERN_KERNELS(T)                                                                                          \
  SSLKERN_CLONES static void add_squares(const T* x, int64_t ld, int64_t rows, int64_t cols, const T* pivot,        \
                                         const T* shift, T* square) {                                               \
    add_squares_body(x, ld, rows, cols, pivot, shift, square);                                                      \
  }                                                                                                                 \
  SSLKERN_CLONES static void merge_columns(int64_t count, int64_t more, int64_t cols, const T* pivot, const T* sum, \
                                           const T* square, double* mean, double* m2) {                             \
    merge_columns_body(count, more, cols, pivot, sum, square, mean, m2);                                            \
  }                                                                                                                 \
  SSLKERN_CLONES static void affine(const T* x, int64_t ld, int64_t rows, int64_t cols, const Affine<T>& f, T* out, \
                                    int64_t out_ld) {                                                               \
    affine_body(x, ld, rows, cols, f, out, out_ld);                                                                 \
  }                                                                                                                 \
  SSLKERN_CLONES static void add_gradients(const T* dy, int64_t dy_ld, const T* x, int64_t ld, int64_t rows,        \
                                           int64_t cols, const Affine<T>& f, T* sum, T* dot) {                      \
    add_gradients_body(dy, dy_ld, x, ld, rows, cols, f, sum, dot);                                                  \
  }                                                                                                                 \
  SSLKERN_CLONES static void write_input_gradient(const T* dy, int64_t dy_ld, const T* x, int64_t ld, int64_t rows, \
                                                  int64_t cols, const Affine<T>& f, const T* mean, const T* along,  \
                                                  T* out, int64_t out_ld) {                                         \
    input_gradient_body(dy, dy_ld, x, ld, rows, cols, f, mean, along, out, out_ld);                                 \
  }
SSLKERN_KERNELS(float)
SSLKERN_KERNELS(double)
#undef SSLKERN_KERNELS

// How x is walked. A unit is one channel of planes, or up to kBlockCols columns; a row is a sample.
struct Layout {
  int64_t rows, channels, length;  // `length` numbers of a channel in each row
  bool planes;

  explicit Layout(const Tensor& x)
      : rows(x.size(0)),
        channels(x.size(1)),
        length(x.dim() == 3 ? x.size(2) : 1),
        planes(x.dim() == 3 && x.size(2) >= kShortPlane) {}

  int64_t width() const {
    return channels * length;
  }
  int64_t count() const {
    return rows * length;
  }
  // What has a mean of its own while sums are taken, and how many of them make a channel.
  int64_t sums() const {
    return planes ? channels : width();
  }
  int64_t unit() const {
    return planes ? 1 : kBlockCols;
  }
  int64_t units() const {
    return ceil_div(sums(), unit());
  }
  // Row parts: one where the units alone keep every thread busy with what its cache holds.
  int64_t parts(int64_t element_size) const {
    const int64_t bytes = rows * element_size * (planes ? length : std::min(kBlockCols, width()));
    return std::clamp<int64_t>(ceil_div(bytes, kInCache), 1, std::min(kParts, ceil_div(rows, planes ? 1 : kChunkRows)));
  }
};

// f(channel) in parallel.
template <class F>
void for_channels(const Layout& v, const F& f) {
  stable::parallel_for(0, v.channels, ceil_div(8192, v.length), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c);
  });
}

struct Range {
  int64_t part, row0, row1, unit0, unit1;
};

inline int64_t rows_per_part(const Layout& v, int64_t parts) {
  return round_up(ceil_div(v.rows, parts), v.planes ? 1 : kChunkRows);
}

// f(range) in parallel over row parts and units.
template <class F>
void for_ranges(const Layout& v, int64_t parts, const F& f) {
  const int64_t units = v.units(), part_rows = rows_per_part(v, parts);
  stable::parallel_for(0, parts * units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / units, unit = task % units;
      f(Range{part, std::min(v.rows, part * part_rows), std::min(v.rows, (part + 1) * part_rows), unit * v.unit(),
              std::min(v.sums(), (unit + 1) * v.unit())});
    }
  });
}

// f(offset, rows, cols, ld) over pieces of a range that fit in L1 or L2: rows of a plane are kFold numbers.
template <class F>
void for_pieces(const Layout& v, const Range& r, const F& f) {
  if (!v.planes) {
    for (int64_t i = r.row0; i < r.row1; i += kChunkRows)
      f(i * v.width() + r.unit0, std::min(kChunkRows, r.row1 - i), r.unit1 - r.unit0, v.width());
    return;
  }
  for (int64_t i = r.row0; i < r.row1; ++i) {
    const int64_t base = (i * v.channels + r.unit0) * v.length, whole = v.length / kFold;
    for (int64_t k = 0; k < whole; k += kTileRows) f(base + k * kFold, std::min(kTileRows, whole - k), kFold, kFold);
    if (whole * kFold < v.length) f(base + whole * kFold, 1, v.length - whole * kFold, v.length - whole * kFold);
  }
}

// The piece of a contiguous tensor, as a matrix.
inline Matrix piece_of(const Tensor& x, int64_t offset, int64_t rows, int64_t cols, int64_t ld) {
  const int64_t element = x.element_size();
  return {static_cast<char*>(x.mutable_data_ptr()) + offset * element, rows, cols, ld, 1, x.scalar_type(), element};
}

// Reads pieces as T.
template <class T>
struct Reader {
  const Tensor& x;
  std::vector<T> scratch;

  const T* at(int64_t offset, int64_t rows, int64_t cols, int64_t ld, int64_t& found) {
    return tile(piece_of(x, offset, rows, cols, ld), 0, rows, 0, cols, scratch, found);
  }
};

// One number per column of a range's pieces, from one number per channel.
template <class T>
struct Spread {
  T values[kBlockCols];
  const T* from;

  Spread(const Layout& v, const T* channel, const Range& r) : from(channel + r.unit0) {
    if (!v.planes && v.length == 1) return;
    from = values;
    if (v.planes) {
      std::fill_n(values, kFold, channel[r.unit0]);
      return;
    }
    for (int64_t k = r.unit0; k < r.unit1;) {
      const int64_t c = k / v.length, end = std::min(r.unit1, (c + 1) * v.length);
      std::fill(values + (k - r.unit0), values + (end - r.unit0), channel[c]);
      k = end;
    }
  }
};

template <class T>
T total_of(const T* lanes, int64_t count) {
  T total = 0;
  for (int64_t j = 0; j < count; ++j) total += lanes[j];
  return total;
}

// Means, and sums of squares about them, of a range: two passes over each piece, a merge in fp64 between them.
template <class T>
void range_moments(const Layout& v, const Tensor& x, const Range& r, const T* pivots, double* mean, double* m2) {
  const int64_t units = r.unit1 - r.unit0;
  std::fill_n(mean, units, 0.);
  std::fill_n(m2, units, 0.);
  const Spread<T> pivot(v, pivots, r);
  Reader<T> reader{x, {}};
  int64_t count = 0;
  for_pieces(v, r, [&](int64_t offset, int64_t rows, int64_t cols, int64_t ld) {
    const T* from = reader.at(offset, rows, cols, ld, ld);
    T sum[kBlockCols], shift[kBlockCols], square[kBlockCols];
    std::fill_n(sum, cols, T(0));
    std::fill_n(square, cols, T(0));
    add_sums(from, ld, rows, cols, pivot.from, sum);
    const int64_t more = v.planes ? rows * cols : rows;
    if (v.planes) std::fill_n(sum, cols, total_of(sum, cols));
    for (int64_t j = 0; j < cols; ++j) shift[j] = sum[j] / more;
    add_squares(from, ld, rows, cols, pivot.from, shift, square);
    if (v.planes) square[0] = total_of(square, cols);
    merge_columns(count, more, units, pivot.from, sum, square, mean, m2);
    count += more;
  });
}

// The first number of every channel: its pivot.
template <class T>
std::vector<T> first_numbers(const Layout& v, const Tensor& x) {
  Matrix first = piece_of(x, 0, 1, v.channels, v.width());
  first.col_stride = v.length;
  std::vector<T> pivots(v.channels), scratch;
  int64_t unused;
  std::copy_n(tile(first, 0, 1, 0, v.channels, scratch, unused), v.channels, pivots.begin());
  return pivots;
}

// A channel's mean, as high + low, and biased variance from the moments of its `length` columns (or its plane).
template <class T>
void finish_channel(const Layout& v, int64_t channel, const double* mean, const double* m2, T* centre, T* variance) {
  const int64_t columns = v.planes ? 1 : v.length;
  double total_mean = 0, total_m2 = 0;
  for (int64_t k = 0; k < columns; ++k)
    merge(k * v.rows, v.rows, mean[channel * columns + k], m2[channel * columns + k], total_mean, total_m2);
  centre[channel] = static_cast<T>(total_mean);
  centre[v.channels + channel] = static_cast<T>(total_mean - centre[channel]);
  variance[channel] = static_cast<T>(total_m2 / v.count());
}

// Per channel: its mean, and what it is scaled and shifted by.
template <class T>
struct Coefficients {
  const T *high, *low, *bias;
  std::vector<T> scale;
  bool relu;

  Coefficients(const Layout& v, const T* centre, const T* variance, const T* weight, const T* beta, double eps,
               bool relu)
      : high(centre), low(centre + v.channels), bias(beta), scale(v.channels), relu(relu) {
    for (int64_t c = 0; c < v.channels; ++c) scale[c] = static_cast<T>(weight[c] / std::sqrt(variance[c] + eps));
  }
};

template <class T>
struct RangeAffine {
  const Spread<T> high, low, scale, bias;
  const Affine<T> f;

  RangeAffine(const Layout& v, const Coefficients<T>& c, const Range& r)
      : high(v, c.high, r),
        low(v, c.low, r),
        scale(v, c.scale.data(), r),
        bias(v, c.bias, r),
        f{high.from, low.from, scale.from, bias.from, c.relu} {}
};

template <class T>
void apply_range(const Layout& v, const Tensor& x, const Range& r, const Coefficients<T>& c, const Tensor& y) {
  const RangeAffine<T> a(v, c, r);
  Reader<T> reader{x, {}};
  for_pieces(v, r, [&](int64_t offset, int64_t rows, int64_t cols, int64_t ld) {
    int64_t x_ld, out_ld;
    const T* from = reader.at(offset, rows, cols, ld, x_ld);
    TileWriter<T> writer(piece_of(y, offset, rows, cols, ld));
    T* out = writer.at(0, 0, rows, cols, out_ld);
    affine(from, x_ld, rows, cols, a.f, out, out_ld);
    writer.flush(0, 0, rows, cols);
  });
}

template <class T>
void moments(const Tensor& x, const Tensor& centre, const Tensor& variance) {
  const Layout v(x);
  const int64_t parts = v.parts(x.element_size());
  const std::vector<T> pivots = first_numbers<T>(v, x);
  std::vector<double> mean(parts * v.sums()), m2(parts * v.sums());
  for_ranges(v, parts, [&](const Range& r) {
    range_moments(v, x, r, pivots.data(), mean.data() + r.part * v.sums() + r.unit0,
                  m2.data() + r.part * v.sums() + r.unit0);
  });
  const int64_t each = v.planes ? v.length : 1, step = rows_per_part(v, parts);
  for (int64_t part = 1; part * step < v.rows; ++part) {
    const int64_t count = part * step * each, more = std::min(step, v.rows - part * step) * each;
    for (int64_t k = 0; k < v.sums(); ++k)
      merge(count, more, mean[part * v.sums() + k], m2[part * v.sums() + k], mean[k], m2[k]);
  }
  for_channels(v, [&](int64_t c) { finish_channel(v, c, mean.data(), m2.data(), data<T>(centre), data<T>(variance)); });
}

template <class T>
void apply(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& centre, const Tensor& variance,
           double eps, bool relu, const Tensor& y) {
  const Layout v(x);
  const Coefficients<T> c(v, data<T>(centre), data<T>(variance), data<T>(weight), data<T>(bias), eps, relu);
  for_ranges(v, v.parts(x.element_size()), [&](const Range& r) { apply_range(v, x, r, c, y); });
}

// Per channel: the sum of dy behind the relu, and of dy (x - mean) / sqrt(var + eps). (2, C)
template <class T>
void gradient_sums(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& centre,
                   const Tensor& variance, double eps, bool relu, const Tensor& sums) {
  const Layout v(x);
  const Coefficients<T> c(v, data<T>(centre), data<T>(variance), data<T>(weight), data<T>(bias), eps, relu);
  const int64_t parts = v.parts(2 * x.element_size()), columns = v.planes ? 1 : v.length;
  std::vector<double> sum(parts * v.sums()), dot(parts * v.sums());
  for_ranges(v, parts, [&](const Range& r) {
    const RangeAffine<T> a(v, c, r);
    Reader<T> read_x{x, {}}, read_dy{dy, {}};
    double *to_sum = sum.data() + r.part * v.sums() + r.unit0, *to_dot = dot.data() + r.part * v.sums() + r.unit0;
    for_pieces(v, r, [&](int64_t offset, int64_t rows, int64_t cols, int64_t ld) {
      int64_t x_ld, dy_ld;
      const T* from = read_x.at(offset, rows, cols, ld, x_ld);
      const T* g = read_dy.at(offset, rows, cols, ld, dy_ld);
      T part_sum[kBlockCols], part_dot[kBlockCols];
      std::fill_n(part_sum, cols, T(0));
      std::fill_n(part_dot, cols, T(0));
      add_gradients(g, dy_ld, from, x_ld, rows, cols, a.f, part_sum, part_dot);
      if (v.planes) {
        *to_sum += total_of(part_sum, cols);
        *to_dot += total_of(part_dot, cols);
      } else {
        for (int64_t j = 0; j < cols; ++j) to_sum[j] += part_sum[j];
        for (int64_t j = 0; j < cols; ++j) to_dot[j] += part_dot[j];
      }
    });
  });
  for_channels(v, [&](int64_t channel) {
    double total = 0, along = 0;
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t k = 0; k < columns; ++k) {
        total += sum[part * v.sums() + channel * columns + k];
        along += dot[part * v.sums() + channel * columns + k];
      }
    data<T>(sums)[channel] = static_cast<T>(total);
    data<T>(sums)[v.channels + channel] = static_cast<T>(along / std::sqrt(data<T>(variance)[channel] + eps));
  });
}

// dx = w / sqrt(var + eps) (dy - sums_0 / count - x_hat sums_1 / count); a count of 0 leaves the statistics out
template <class T>
void input_gradients(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& centre,
                     const Tensor& variance, const Tensor& sums, double count, double eps, bool relu,
                     const Tensor& dx) {
  const Layout v(x);
  const Coefficients<T> c(v, data<T>(centre), data<T>(variance), data<T>(weight), data<T>(bias), eps, relu);
  std::vector<T> mean(v.channels), along(v.channels);
  for (int64_t k = 0; k < v.channels && count > 0; ++k) {
    mean[k] = static_cast<T>(data<T>(sums)[k] / count);
    along[k] = static_cast<T>(data<T>(sums)[v.channels + k] / count / std::sqrt(data<T>(variance)[k] + eps));
  }
  for_ranges(v, v.parts(2 * x.element_size()), [&](const Range& r) {
    const RangeAffine<T> a(v, c, r);
    const Spread<T> m(v, mean.data(), r), l(v, along.data(), r);
    Reader<T> read_x{x, {}}, read_dy{dy, {}};
    for_pieces(v, r, [&](int64_t offset, int64_t rows, int64_t cols, int64_t ld) {
      int64_t x_ld, dy_ld, out_ld;
      const T* from = read_x.at(offset, rows, cols, ld, x_ld);
      const T* g = read_dy.at(offset, rows, cols, ld, dy_ld);
      TileWriter<T> writer(piece_of(dx, offset, rows, cols, ld));
      T* out = writer.at(0, 0, rows, cols, out_ld);
      write_input_gradient(g, dy_ld, from, x_ld, rows, cols, a.f, m.from, l.from, out, out_ld);
      writer.flush(0, 0, rows, cols);
    });
  });
}

ScalarType accumulation(const Tensor& x) {
  return is_double(x) ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> batch_moments_fwd(const Tensor x) {
  Tensor centre = fresh(x, {2, x.size(1)}, accumulation(x)), variance = fresh(x, {x.size(1)}, accumulation(x));
  is_double(x) ? moments<double>(x, centre, variance) : moments<float>(x, centre, variance);
  return {centre, variance};
}

Tensor like(const Tensor& x) {
  Shape shape;
  for (int64_t k = 0; k < x.dim(); ++k) shape.push_back(x.size(k));
  return fresh(x, shape, x.scalar_type());
}

Tensor batch_norm_fwd(const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                      const Tensor variance, double eps, bool relu) {
  Tensor y = like(x);
  is_double(x) ? apply<double>(x, weight, bias, centre, variance, eps, relu, y)
               : apply<float>(x, weight, bias, centre, variance, eps, relu, y);
  return y;
}

Tensor batch_norm_sums(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                       const Tensor variance, double eps, bool relu) {
  Tensor sums = fresh(x, {2, x.size(1)}, accumulation(x));
  is_double(x) ? gradient_sums<double>(dy, x, weight, bias, centre, variance, eps, relu, sums)
               : gradient_sums<float>(dy, x, weight, bias, centre, variance, eps, relu, sums);
  return sums;
}

Tensor batch_norm_bwd(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                      const Tensor variance, const Tensor sums, double count, double eps, bool relu) {
  Tensor dx = like(x);
  is_double(x) ? input_gradients<double>(dy, x, weight, bias, centre, variance, sums, count, eps, relu, dx)
               : input_gradients<float>(dy, x, weight, bias, centre, variance, sums, count, eps, relu, dx);
  return dx;
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("batch_moments_fwd", TORCH_BOX(&sslkern::batch_moments_fwd));
  m.impl("batch_norm_fwd", TORCH_BOX(&sslkern::batch_norm_fwd));
  m.impl("batch_norm_sums", TORCH_BOX(&sslkern::batch_norm_sums));
  m.impl("batch_norm_bwd", TORCH_BOX(&sslkern::batch_norm_bwd));
}
