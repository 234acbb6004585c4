// Batch moments and batch norm on the CPU. x is (M, C), or (N, C, L), contiguous. Long runs of one channel are planes;
// everything else is columns: M rows, or N rows of C * L columns of which L make a channel.
#include <numeric>

#include "blocks.h"

namespace sslkern {
namespace {

constexpr int64_t kChunkRows = 128;       // rows whose mean is taken first and whose squares after, from cache
constexpr int64_t kShortPlane = 64;       // numbers; shorter runs are columns
constexpr int64_t kInCache = 768 << 10;   // bytes that one pass over a unit leaves in L2 for the next
constexpr int64_t kParts = 64;            // row parts at most, whose sums are merged in order
constexpr int64_t kFusedBytes = 1 << 20;  // of a unit that two passes read, where its columns can be chosen
constexpr int64_t kFusedUnits = 8;

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

// How x is walked. A unit is one channel of planes, or some columns of whole channels; a row is a sample.
struct Layout {
  int64_t rows, channels, length;  // `length` numbers of a channel in each row
  bool planes;
  int64_t columns;  // of a unit

  explicit Layout(const Tensor& x)
      : rows(x.size(0)),
        channels(x.size(1)),
        length(x.dim() == 3 ? x.size(2) : 1),
        planes(x.dim() == 3 && x.size(2) >= kShortPlane),
        columns(kBlockCols / length * length) {}

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
    return planes ? 1 : columns;
  }
  int64_t units() const {
    return ceil_div(sums(), unit());
  }
  int64_t unit_bytes(int64_t bytes) const {
    return rows * bytes * (planes ? length : std::min(columns, width()));
  }
  // Row parts, for passes one after the other, of `bytes` a number: one where the units alone keep every thread busy
  // with what its cache holds.
  int64_t parts(int64_t bytes) const {
    return std::clamp<int64_t>(ceil_div(unit_bytes(bytes), kInCache), 1,
                               std::min(kParts, ceil_div(rows, planes ? 1 : kChunkRows)));
  }
  // For two passes over a unit, the second from cache: narrow ones, or false where they are too few or too large.
  bool fuse(int64_t bytes) {
    if (!planes) {
      const int64_t wide = std::min(kFusedBytes / (rows * bytes), ceil_div(width(), kFusedUnits));
      columns = std::min(columns, round_up(std::max<int64_t>(wide, 64), std::lcm<int64_t>(16, length)));
    }
    const bool small = width() * rows * bytes <= kFusedBytes / 4;
    return small || (units() >= kFusedUnits && unit_bytes(bytes) <= 2 * kFusedBytes);
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

// Per channel: its mean, and what it is scaled and shifted by, once `set`.
template <class T>
struct Coefficients {
  const T *high, *low, *variance, *weight, *bias;
  double eps;
  bool relu;
  std::vector<T> scale;

  Coefficients(const Tensor& centre, const Tensor& variance, const Tensor& weight, const Tensor& bias, double eps,
               bool relu)
      : high(data<T>(centre)),
        low(high + centre.size(1)),
        variance(data<T>(variance)),
        weight(data<T>(weight)),
        bias(data<T>(bias)),
        eps(eps),
        relu(relu),
        scale(centre.size(1)) {}

  double inverse_std(int64_t channel) const {
    return 1 / std::sqrt(variance[channel] + eps);
  }
  Coefficients& set(int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) scale[c] = static_cast<T>(weight[c] * inverse_std(c));
    return *this;
  }
  Coefficients& set() {
    return set(0, scale.size());
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
void moments(const Layout& v, const Tensor& x, const Tensor& centre, const Tensor& variance) {
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
void apply(const Layout& v, const Tensor& x, const Coefficients<T>& c, const Tensor& y) {
  for_ranges(v, v.parts(x.element_size()), [&](const Range& r) { apply_range(v, x, r, c, y); });
}

// The channels of a range.
inline std::pair<int64_t, int64_t> channels_of(const Layout& v, const Range& r) {
  return v.planes ? std::pair{r.unit0, r.unit1} : std::pair{r.unit0 / v.length, r.unit1 / v.length};
}

// Statistics and output in one walk: what the first pass over a unit read, the second finds in cache.
template <class T>
void train(const Tensor& x, Coefficients<T> c, const Tensor& centre, const Tensor& variance, const Tensor& y) {
  Layout v(x);
  if (!v.fuse(x.element_size())) {
    moments<T>(Layout(x), x, centre, variance);
    return apply(Layout(x), x, c.set(), y);
  }
  const std::vector<T> pivots = first_numbers<T>(v, x);
  std::vector<double> mean(v.sums()), m2(v.sums());
  for_ranges(v, 1, [&](const Range& r) {
    range_moments(v, x, r, pivots.data(), mean.data() + r.unit0, m2.data() + r.unit0);
    const auto [begin, end] = channels_of(v, r);
    for (int64_t k = begin; k < end; ++k)
      finish_channel(v, k, mean.data(), m2.data(), data<T>(centre), data<T>(variance));
    c.set(begin, end);
    apply_range(v, x, r, c, y);
  });
}

// Per column, over a range: the sum of dy behind the relu, and of dy (x - mean).
template <class T>
void range_sums(const Layout& v, const Tensor& dy, const Tensor& x, const Range& r, const Affine<T>& f, double* sum,
                double* dot) {
  const int64_t units = r.unit1 - r.unit0;
  std::fill_n(sum, units, 0.);
  std::fill_n(dot, units, 0.);
  Reader<T> read_x{x, {}}, read_dy{dy, {}};
  for_pieces(v, r, [&](int64_t offset, int64_t rows, int64_t cols, int64_t ld) {
    int64_t x_ld, dy_ld;
    const T* from = read_x.at(offset, rows, cols, ld, x_ld);
    const T* g = read_dy.at(offset, rows, cols, ld, dy_ld);
    T part_sum[kBlockCols], part_dot[kBlockCols];
    std::fill_n(part_sum, cols, T(0));
    std::fill_n(part_dot, cols, T(0));
    add_gradients(g, dy_ld, from, x_ld, rows, cols, f, part_sum, part_dot);
    if (v.planes) {
      *sum += total_of(part_sum, cols);
      *dot += total_of(part_dot, cols);
    } else {
      for (int64_t j = 0; j < cols; ++j) sum[j] += part_sum[j];
      for (int64_t j = 0; j < cols; ++j) dot[j] += part_dot[j];
    }
  });
}

// The sums of a channel, from those of its columns in every part.
template <class T>
void finish_sums(const Layout& v, int64_t parts, int64_t channel, const double* sum, const double* dot,
                 const Coefficients<T>& c, T* sums) {
  const int64_t columns = v.planes ? 1 : v.length;
  double total = 0, along = 0;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t k = 0; k < columns; ++k) {
      total += sum[part * v.sums() + channel * columns + k];
      along += dot[part * v.sums() + channel * columns + k];
    }
  sums[channel] = static_cast<T>(total);
  sums[v.channels + channel] = static_cast<T>(along * c.inverse_std(channel));
}

template <class T>
void gradient_sums(const Layout& v, const Tensor& dy, const Tensor& x, const Coefficients<T>& c, const Tensor& sums) {
  const int64_t parts = v.parts(2 * x.element_size());
  std::vector<double> sum(parts * v.sums()), dot(parts * v.sums());
  for_ranges(v, parts, [&](const Range& r) {
    const int64_t at = r.part * v.sums() + r.unit0;
    range_sums(v, dy, x, r, RangeAffine<T>(v, c, r).f, sum.data() + at, dot.data() + at);
  });
  for_channels(v, [&](int64_t k) { finish_sums(v, parts, k, sum.data(), dot.data(), c, data<T>(sums)); });
}

// What the statistics take away from the gradient: mean and along (x - mean of x), per channel.
template <class T>
struct Means {
  std::vector<T> mean, along;

  explicit Means(const Layout& v) : mean(v.channels), along(v.channels) {}

  void set(int64_t channel, double mean_of_dy, double mean_of_dot, const Coefficients<T>& c) {
    mean[channel] = static_cast<T>(mean_of_dy);
    along[channel] = static_cast<T>(mean_of_dot * c.inverse_std(channel));
  }
};

template <class T>
void input_gradient_range(const Layout& v, const Tensor& dy, const Tensor& x, const Range& r, const Coefficients<T>& c,
                          const Means<T>& means, const Tensor& dx) {
  const RangeAffine<T> a(v, c, r);
  const Spread<T> mean(v, means.mean.data(), r), along(v, means.along.data(), r);
  Reader<T> read_x{x, {}}, read_dy{dy, {}};
  for_pieces(v, r, [&](int64_t offset, int64_t rows, int64_t cols, int64_t ld) {
    int64_t x_ld, dy_ld, out_ld;
    const T* from = read_x.at(offset, rows, cols, ld, x_ld);
    const T* g = read_dy.at(offset, rows, cols, ld, dy_ld);
    TileWriter<T> writer(piece_of(dx, offset, rows, cols, ld));
    T* out = writer.at(0, 0, rows, cols, out_ld);
    write_input_gradient(g, dy_ld, from, x_ld, rows, cols, a.f, mean.from, along.from, out, out_ld);
    writer.flush(0, 0, rows, cols);
  });
}

template <class T>
void input_gradient(const Layout& v, const Tensor& dy, const Tensor& x, const Coefficients<T>& c, const Means<T>& means,
                    const Tensor& dx) {
  for_ranges(v, v.parts(2 * x.element_size()),
             [&](const Range& r) { input_gradient_range(v, dy, x, r, c, means, dx); });
}

// Sums and gradient in one walk, as `train` does.
template <class T>
void train_backward(const Tensor& dy, const Tensor& x, Coefficients<T> c, const Tensor& dx, const Tensor& sums) {
  Layout v(x);
  const bool fused = v.fuse(2 * x.element_size());
  if (!fused) v = Layout(x);
  T* total = data<T>(sums);
  Means<T> means(v);
  const auto set_means = [&](int64_t begin, int64_t end) {
    const double each = 1. / v.count();
    for (int64_t k = begin; k < end; ++k) means.set(k, total[k] * each, total[v.channels + k] * each, c);
  };
  c.set();
  if (!fused) {
    gradient_sums(v, dy, x, c, sums);
    set_means(0, v.channels);
    return input_gradient(v, dy, x, c, means, dx);
  }
  std::vector<double> sum(v.sums()), dot(v.sums());
  for_ranges(v, 1, [&](const Range& r) {
    range_sums(v, dy, x, r, RangeAffine<T>(v, c, r).f, sum.data() + r.unit0, dot.data() + r.unit0);
    const auto [begin, end] = channels_of(v, r);
    for (int64_t k = begin; k < end; ++k) finish_sums(v, 1, k, sum.data(), dot.data(), c, total);
    set_means(begin, end);
    input_gradient_range(v, dy, x, r, c, means, dx);
  });
}

ScalarType accumulation(const Tensor& x) {
  return is_double(x) ? ScalarType::Double : ScalarType::Float;
}

// f(T()) with the type that x is accumulated in.
template <class F>
void as_accumulated(const Tensor& x, const F& f) {
  is_double(x) ? f(double()) : f(float());
}

Tensor like(const Tensor& x) {
  Shape shape;
  for (int64_t k = 0; k < x.dim(); ++k) shape.push_back(x.size(k));
  return fresh(x, shape, x.scalar_type());
}

Tensor per_channel(const Tensor& x) {
  return fresh(x, {x.size(1)}, accumulation(x));
}

Tensor two_per_channel(const Tensor& x) {
  return fresh(x, {2, x.size(1)}, accumulation(x));
}

std::tuple<Tensor, Tensor> batch_moments_fwd(const Tensor x) {
  Tensor centre = two_per_channel(x), variance = per_channel(x);
  as_accumulated(x, [&](auto zero) { moments<decltype(zero)>(Layout(x), x, centre, variance); });
  return {centre, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor x, const Tensor weight, const Tensor bias, double eps,
                                                  bool relu) {
  Tensor y = like(x), centre = two_per_channel(x), variance = per_channel(x);
  as_accumulated(x, [&](auto zero) {
    train(x, Coefficients<decltype(zero)>(centre, variance, weight, bias, eps, relu), centre, variance, y);
  });
  return {y, centre, variance};
}

std::tuple<Tensor, Tensor> batch_norm_bwd(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias,
                                          const Tensor centre, const Tensor variance, double eps, bool relu) {
  Tensor dx = like(x), sums = two_per_channel(x);
  as_accumulated(x, [&](auto zero) {
    train_backward(dy, x, Coefficients<decltype(zero)>(centre, variance, weight, bias, eps, relu), dx, sums);
  });
  return {dx, sums};
}

Tensor batch_norm_apply(const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                        const Tensor variance, double eps, bool relu) {
  Tensor y = like(x);
  as_accumulated(x, [&](auto zero) {
    apply(Layout(x), x, Coefficients<decltype(zero)>(centre, variance, weight, bias, eps, relu).set(), y);
  });
  return y;
}

Tensor batch_norm_sums(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                       const Tensor variance, double eps, bool relu) {
  Tensor sums = two_per_channel(x);
  as_accumulated(x, [&](auto zero) {
    gradient_sums(Layout(x), dy, x, Coefficients<decltype(zero)>(centre, variance, weight, bias, eps, relu).set(),
                  sums);
  });
  return sums;
}

Tensor batch_norm_input_grad(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias,
                             const Tensor centre, const Tensor variance, const Tensor means, double eps, bool relu) {
  Tensor dx = like(x);
  as_accumulated(x, [&](auto zero) {
    using T = decltype(zero);
    const Layout v(x);
    Coefficients<T> c(centre, variance, weight, bias, eps, relu);
    Means<T> per_channel(v);
    for (int64_t k = 0; k < v.channels; ++k) per_channel.set(k, data<T>(means)[k], data<T>(means)[v.channels + k], c);
    input_gradient(v, dy, x, c.set(), per_channel, dx);
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
