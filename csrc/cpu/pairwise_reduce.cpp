// Reductions over pairs of rows on the CPU: logarithms of sums of exponentials, largest similarities, products with a
// kernel's matrix, Gram matrices of several kernels.
#include "pairwise.h"

namespace sslkern {
namespace {

using Labels = std::optional<Tensor>;

// What a call of any of the kernels is about; a slice of a stack at a time.
struct Call {
  const Tensor x, y, scale;
  const bool own, squared;
  const std::string kernel;
  const Labels x_labels, y_labels;
  const int64_t mask;

  Call(const Tensor& x, const std::optional<Tensor>& y, const Tensor& scale, const Labels& x_labels,
       const Labels& y_labels, int64_t mask, const std::string& kernel)
      : x(x),
        y(y.has_value() ? *y : x),
        scale(scale),
        own(!y.has_value()),
        squared(kernel == "sqeuclidean" || kernel == "rbf"),
        kernel(kernel),
        x_labels(x_labels),
        y_labels(own ? x_labels : y_labels),
        mask(mask) {}

  int64_t n() const {
    return x.size(-2);
  }
  int64_t m() const {
    return y.size(-2);
  }
  int64_t d() const {
    return x.size(-1);
  }

  template <class F>
  void for_each_slice(const F& f) const {
    for_slices(stack_size(x), n() * m(), f);
  }
};

// One slice of a call.
template <class T>
struct Slice {
  const Rows<T> x;
  const std::optional<Rows<T>> other;
  const Rows<T>& y;
  const Pairs<T> pairs;
  const Similarity<T> similarity;
  const Mask mask;
  const bool own;

  Slice(const Call& c, int64_t s, bool for_sums)
      : x(c.x, data<T>(c.x) + s * c.n() * c.d(), c.n(), c.d(), true, for_sums, c.squared),
        other(c.own ? std::nullopt
                    : std::make_optional<Rows<T>>(c.y, data<T>(c.y) + s * c.m() * c.d(), c.m(), c.d(), true, for_sums,
                                                  c.squared)),
        y(c.own ? x : *other),
        pairs(x, y, c.own),
        similarity{data<T>(c.scale)[s], c.squared, c.own, x.squares.data(), y.squares.data()},
        mask(c.mask, labels(c.x_labels, s, c.n()), labels(c.y_labels, s, c.m()), c.m(), pairs.size()),
        own(c.own) {}

  // Numbers between which all exponents lie.
  std::pair<T, T> bounds() const {
    const T a = x.largest_norm(), b = own ? a : y.largest_norm();
    const T most = std::abs(similarity.scale) * (similarity.squared ? (a + b) * (a + b) : a * b);
    if (!similarity.squared) return {-most, most};
    return similarity.scale < 0 ? std::pair<T, T>(-most, 0) : std::pair<T, T>(0, most);
  }

 private:
  static const int64_t* labels(const Labels& given, int64_t s, int64_t n) {
    return given.has_value() ? data<int64_t>(*given) + s * n : nullptr;
  }
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Of no pairs at all the sum is 0, and any base will do.
template <class T>
T base_of(T x) {
  return x == -std::numeric_limits<T>::infinity() ? T(0) : x;
}

// May all exponentials be taken relative to the largest there can be? They would have to stay normal numbers.
template <class T>
bool in_range(const std::pair<T, T>& bounds) {
  return bounds.second - bounds.first <= (sizeof(T) == 4 ? T(80) : T(690));
}

// Sums of exponentials, relative to a number per row.
template <class T>
struct Sums {
  std::vector<double> sum;
  std::vector<T> most;

  explicit Sums(int64_t n) : sum(n), most(n, -std::numeric_limits<T>::infinity()) {}

  // The row's base becomes at least `at`; returns it.
  T raise(int64_t i, T at) {
    if (at > most[i]) {
      if (most[i] != -std::numeric_limits<T>::infinity())
        sum[i] *= std::exp(static_cast<double>(most[i]) - static_cast<double>(at));
      most[i] = at;
    }
    return base_of(most[i]);
  }

  void write(T* to, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(base_of(most[i]) + std::log(sum[i]));
  }
};

template <class T>
void logsumexp(const Call& c, int64_t s, bool columns, T* over_rows, T* over_columns) {
  const Slice<T> slice(c, s, false);
  const auto bounds = slice.bounds();
  const bool fixed = in_range(bounds), both = c.own || columns;
  const T shift = bounds.second;
  Sums<T> of_rows(c.n()), of_columns(columns ? c.m() : 0);
  Sums<T>& below = c.own ? of_rows : of_columns;
  slice.pairs.run([&](const Block& b, T* tile, T* spare) {
    const bool down = both && !b.diagonal;
    T *sums = spare, *most = spare + b.cols;
    std::fill_n(sums, b.cols, T(0));
    for (int64_t j = 0; j < b.cols && down; ++j) most[j] = below.most[b.j0 + j];
    for (int64_t r = 0; r < b.rows; ++r) {
      T* t = tile + r * slice.pairs.ld();
      slice.similarity(t, b, r);
      slice.mask.drop(t, b, r, -std::numeric_limits<T>::infinity());
      const int64_t i = b.i0 + r;
      if (fixed) {
        of_rows.sum[i] += down ? exp_both(t, b.cols, shift, sums) : exp_row(t, b.cols, shift);
        continue;
      }
      const T base = of_rows.raise(i, largest(t, b.cols));
      of_rows.sum[i] += exp_row(t, b.cols, base);
      if (down) largest_columns(t, b.cols, most);
    }
    if (!down) return;
    for (int64_t j = 0; j < b.cols && !fixed; ++j) most[j] = below.raise(b.j0 + j, most[j]);
    for (int64_t r = 0; r < b.rows && !fixed; ++r) exp_columns(tile + r * slice.pairs.ld(), b.cols, most, sums);
    for (int64_t j = 0; j < b.cols; ++j) below.sum[b.j0 + j] += sums[j];
  });
  if (fixed) std::fill(of_rows.most.begin(), of_rows.most.end(), shift);
  if (fixed) std::fill(of_columns.most.begin(), of_columns.most.end(), shift);
  of_rows.write(over_rows, c.n());
  if (columns) of_columns.write(over_columns, c.m());
}

std::tuple<Tensor, Tensor> pairwise_logsumexp_fwd(const Tensor x, const std::optional<Tensor> y, const Tensor scale,
                                                  const Labels x_labels, const Labels y_labels, int64_t mask,
                                                  const std::string kernel, bool columns) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  const int64_t n = c.n(), m = c.m();
  Tensor over_rows = fresh(x, stacked(x, {n}), x.scalar_type());
  Tensor over_columns = fresh(x, columns ? stacked(x, {m}) : Shape{0}, x.scalar_type());
  const auto run = [&]<class T>(T*, int64_t s) {
    logsumexp<T>(c, s, columns, data<T>(over_rows) + s * n, data<T>(over_columns) + (columns ? s * m : 0));
  };
  c.for_each_slice([&](int64_t s) { is_double(x) ? run((double*)nullptr, s) : run((float*)nullptr, s); });
  return {over_rows, over_columns};
}

// A vector of a slice, and what each of its numbers is as a share of a sum relative to `shift`.
template <class T>
struct Shares {
  const T *grad, *over;
  std::vector<T> base, share;

  Shares(const T* grad, const T* over, int64_t n, T shift, bool fixed)
      : grad(grad), over(over), base(n), share(fixed ? n : 0) {
    for (int64_t i = 0; i < n; ++i) {
      base[i] = base_of(over[i]);
      if (fixed) share[i] = base[i] == over[i] || std::isnan(over[i]) ? grad[i] * std::exp(shift - over[i]) : T(0);
    }
  }
};

template <class T>
void logsumexp_gradients(const Call& c, int64_t s, bool columns, const T* grad_rows, const T* grad_columns,
                         const T* over_rows, const T* over_columns, bool need_x, bool need_y, T* grad_x, T* grad_y) {
  const Slice<T> slice(c, s, true);
  const auto bounds = slice.bounds();
  const bool both = c.own || columns, fixed = both && in_range(bounds);
  const T shift = bounds.second;
  const Shares<T> of_rows(grad_rows, over_rows, c.n(), shift, fixed);
  const std::optional<Shares<T>> of_columns =
      columns && !c.own ? std::make_optional<Shares<T>>(grad_columns, over_columns, c.m(), shift, fixed) : std::nullopt;
  const Shares<T>& other = of_columns.has_value() ? *of_columns : of_rows;
  Gradients<T> gradients(c.x, slice.x, slice.y, c.own, c.squared, need_x, need_y);
  slice.pairs.run([&](const Block& b, T* tile, T*) {
    for (int64_t r = 0; r < b.rows; ++r) {
      T* t = tile + r * slice.pairs.ld();
      slice.similarity(t, b, r);
      slice.mask.drop(t, b, r, -std::numeric_limits<T>::infinity());
      const int64_t i = b.i0 + r, j = b.j0;
      if (fixed) {
        share_both(t, b.cols, shift, of_rows.share[i], other.share.data() + j);
      } else if (both) {
        share_each(t, b.cols, of_rows.base[i], of_rows.grad[i], other.base.data() + j, other.grad + j);
      } else {
        share_row(t, b.cols, of_rows.base[i], of_rows.grad[i]);
      }
    }
    gradients.add(slice.pairs, tile, b);
  });
  gradients.write(grad_x, grad_y);
}

// Where gradients of x and y go, empty ones where they are not needed.
std::pair<Tensor, Tensor> room_for_gradients(const Call& c, bool need_x, bool need_y) {
  const auto room = [](const Tensor& z, bool needed) {
    return needed ? fresh(z, stacked(z, {z.size(-2), z.size(-1)}), z.scalar_type()) : fresh(z, {0}, z.scalar_type());
  };
  return {room(c.x, need_x), room(c.y, need_y && !c.own)};
}

template <class T>
T* at(const Tensor& t, int64_t s, int64_t numbers) {
  return t.numel() == 0 ? nullptr : data<T>(t) + s * numbers;
}

std::tuple<Tensor, Tensor> pairwise_logsumexp_bwd(const Tensor grad_rows, const Tensor grad_columns, const Tensor x,
                                                  const std::optional<Tensor> y, const Tensor scale,
                                                  const Labels x_labels, const Labels y_labels, const Tensor over_rows,
                                                  const Tensor over_columns, int64_t mask, const std::string kernel,
                                                  bool columns, bool need_x, bool need_y) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  const int64_t n = c.n(), m = c.m();
  const auto [grad_x, grad_y] = room_for_gradients(c, need_x, need_y);
  const Tensor g = stable::contiguous(grad_rows), h = stable::contiguous(grad_columns);
  const auto run = [&]<class T>(T*, int64_t s) {
    logsumexp_gradients<T>(c, s, columns, at<T>(g, s, n), at<T>(h, s, m), at<T>(over_rows, s, n),
                           at<T>(over_columns, s, m), need_x, need_y, at<T>(grad_x, s, n * c.d()),
                           at<T>(grad_y, s, m * c.d()));
  };
  c.for_each_slice([&](int64_t s) { is_double(x) ? run((double*)nullptr, s) : run((float*)nullptr, s); });
  return {grad_x, grad_y};
}

// Each row's largest similarity, block after block from the left: the first of equal ones stays.
template <class T>
void argmax(const Call& c, int64_t s, int64_t* index) {
  const Slice<T> slice(c, s, false);
  const Pairs<T> pairs(slice.x, slice.y, false);
  const int64_t size = pairs.size(), n = c.n(), m = c.m();
  in_parallel(ceil_div(n, size), size * m * c.d(), [&](int64_t first, int64_t last) {
    const auto tile = room_for<T>(size * pairs.ld());
    for (int64_t k = first; k < last; ++k) {
      const int64_t i0 = k * size, rows = std::min(size, n - i0);
      std::vector<T> most(rows, -std::numeric_limits<T>::infinity());
      std::fill_n(index + i0, rows, int64_t(-1));
      for (int64_t j0 = 0; j0 < m; j0 += size) {
        const Block b{i0, rows, j0, std::min(size, m - j0), c.own && i0 == j0, k};
        pairs.products(slice.x, slice.y, b, tile.get());
        for (int64_t r = 0; r < rows; ++r) {
          T* t = tile.get() + r * pairs.ld();
          slice.similarity(t, b, r);
          slice.mask.drop(t, b, r, -std::numeric_limits<T>::infinity());
          for (int64_t j = 0; j < b.cols; ++j) {
            if (t[j] <= most[r] || std::isnan(most[r])) continue;
            most[r] = t[j];
            index[i0 + r] = j0 + j;
          }
        }
      }
    }
  });
}

Tensor pairwise_argmax(const Tensor x, const std::optional<Tensor> y, const Tensor scale, const Labels x_labels,
                       const Labels y_labels, int64_t mask, const std::string kernel) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  Tensor index = fresh(x, stacked(x, {c.n()}), ScalarType::Long);
  c.for_each_slice([&](int64_t s) {
    int64_t* to = data<int64_t>(index) + s * c.n();
    is_double(x) ? argmax<double>(c, s, to) : argmax<float>(c, s, to);
  });
  return index;
}

enum class Kernel { similarity, rbf, softplus };

Kernel kernel_of(const std::string& name) {
  return name == "rbf" ? Kernel::rbf : name == "softplus" ? Kernel::softplus : Kernel::similarity;
}

template <class T>
void apply(Kernel kernel, T* t, int64_t n) {
  if (kernel == Kernel::rbf) rbf(t, n);
  if (kernel == Kernel::softplus) softplus(t, n);
}

// t = v times the kernel's derivative at t.
template <class T>
void apply_slope(Kernel kernel, T* t, int64_t n, const T* v) {
  if (kernel == Kernel::rbf) return rbf_slope(t, n, v);
  if (kernel == Kernel::softplus) return softplus_slope(t, n, v);
  std::copy_n(v, n, t);
}

template <class T>
void matmul(const Call& c, int64_t s, const T* rhs, int64_t p, T* out) {
  const Slice<T> slice(c, s, false);
  const Kernel kernel = kernel_of(c.kernel);
  const bool ones = rhs == nullptr;
  const Rows<T> right(c.x, rhs, ones ? 0 : c.m(), p, false, !ones, false);
  RowSums<T> sums(c.x, slice.x.padded, ones ? 0 : p);
  slice.pairs.run([&](const Block& b, T* tile, T*) {
    for (int64_t r = 0; r < b.rows; ++r) {
      T* t = tile + r * slice.pairs.ld();
      slice.similarity(t, b, r);
      apply(kernel, t, b.cols);
      slice.mask.drop(t, b, r, T(0));
    }
    const bool down = c.own && !b.diagonal;
    if (ones) return slice.pairs.add_weights(tile, b, &sums.weights, down ? &sums.weights : nullptr);
    slice.pairs.add(tile, b, right, sums);
    if (down) slice.pairs.add_transposed(tile, b, right, sums);
  });
  for (int64_t i = 0; i < c.n(); ++i) {
    if (ones) {
      out[i] = static_cast<T>(sums.weights[i]);
    } else {
      std::copy_n(sums.sums + i * sums.ld, p, out + i * p);
    }
  }
}

Tensor pairwise_matmul_fwd(const Tensor x, const std::optional<Tensor> y, const Tensor scale,
                           const std::optional<Tensor> rhs, const Labels x_labels, const Labels y_labels, int64_t mask,
                           const std::string kernel) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  const int64_t p = rhs.has_value() ? rhs->size(-1) : 1;
  Tensor out = fresh(x, stacked(x, {c.n(), p}), x.scalar_type());
  const auto run = [&]<class T>(T*, int64_t s) {
    matmul<T>(c, s, rhs.has_value() ? data<T>(*rhs) + s * c.m() * p : nullptr, p, data<T>(out) + s * c.n() * p);
  };
  c.for_each_slice([&](int64_t s) { is_double(x) ? run((double*)nullptr, s) : run((float*)nullptr, s); });
  return out;
}

// Two matrices of p columns side by side, ones where there is none.
template <class T>
std::unique_ptr<T[]> beside(const T* a, const T* b, int64_t n, int64_t p) {
  auto out = room_for<T>(2 * n * p);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < p; ++k) {
      out[2 * i * p + k] = a == nullptr ? T(1) : a[i * p + k];
      out[2 * i * p + p + k] = b == nullptr ? T(1) : b[i * p + k];
    }
  return out;
}

// The weight of a pair is <grad_i, rhs_j>, and of a matrix with itself that of both orders.
template <class T>
void matmul_gradients(const Call& c, int64_t s, const T* grad, const T* rhs, int64_t p, bool need_x, bool need_y,
                      T* grad_x, T* grad_y, T* grad_rhs) {
  const bool weights = need_x || need_y, own = c.own;
  const Slice<T> slice(c, s, weights);
  const Kernel kernel = kernel_of(c.kernel);
  const int64_t n = c.n(), m = c.m(), width = own ? 2 * p : p;
  const std::vector<T> ones(rhs == nullptr && !own ? m : 0, T(1));
  const auto left_memory = own ? beside(grad, rhs, n, p) : nullptr,
             right_memory = own ? beside(rhs, grad, n, p) : nullptr;
  const Rows<T> left(c.x, own ? left_memory.get() : grad, n, width, weights, false, false);
  const Rows<T> right(c.x,
                      own              ? right_memory.get()
                      : rhs == nullptr ? ones.data()
                                       : rhs,
                      m, width, weights, false, false);
  const Rows<T> upstream(c.x, grad, n, p, false, grad_rhs != nullptr, false);
  Gradients<T> gradients(c.x, slice.x, slice.y, own, c.squared, need_x, need_y);
  RowSums<T> of_rhs(c.x, grad_rhs == nullptr ? 0 : slice.y.padded, p);
  slice.pairs.run([&](const Block& b, T* tile, T* spare) {
    const auto each_row = [&](const auto& f) {
      for (int64_t r = 0; r < b.rows; ++r) f(tile + r * slice.pairs.ld(), spare + r * slice.pairs.ld(), r);
    };
    each_row([&](T* t, T* k, int64_t r) {
      slice.similarity(t, b, r);
      if (grad_rhs == nullptr) return;
      std::copy_n(t, b.cols, k);
      apply(kernel, k, b.cols);
      slice.mask.drop(k, b, r, T(0));
    });
    if (grad_rhs != nullptr) {
      slice.pairs.add_transposed(spare, b, upstream, of_rhs);
      if (own && !b.diagonal) slice.pairs.add(spare, b, upstream, of_rhs);
    }
    if (!weights) return;
    slice.pairs.products(left, right, b, spare);
    each_row([&](T* t, T* v, int64_t r) {
      apply_slope(kernel, t, b.cols, v);
      slice.mask.drop(t, b, r, T(0));
    });
    gradients.add(slice.pairs, tile, b);
  });
  gradients.write(grad_x, grad_y);
  for (int64_t j = 0; j < m && grad_rhs != nullptr; ++j) std::copy_n(of_rhs.sums + j * of_rhs.ld, p, grad_rhs + j * p);
}

std::tuple<Tensor, Tensor, Tensor> pairwise_matmul_bwd(const Tensor grad, const Tensor x, const std::optional<Tensor> y,
                                                       const Tensor scale, const std::optional<Tensor> rhs,
                                                       const Labels x_labels, const Labels y_labels, int64_t mask,
                                                       const std::string kernel, bool need_x, bool need_y,
                                                       bool need_rhs) {
  const Call c(x, y, scale, x_labels, y_labels, mask, kernel);
  const auto [grad_x, grad_y] = room_for_gradients(c, need_x, need_y);
  const int64_t n = c.n(), m = c.m(), d = c.d(), p = grad.size(-1);
  const bool given = rhs.has_value();
  const Tensor grad_rhs = fresh(x, given && need_rhs ? stacked(x, {m, p}) : Shape{0}, x.scalar_type());
  const Tensor g = stable::contiguous(grad);
  const auto run = [&]<class T>(T*, int64_t s) {
    matmul_gradients<T>(c, s, at<T>(g, s, n * p), given ? at<T>(*rhs, s, m * p) : nullptr, p, need_x, need_y && !c.own,
                        at<T>(grad_x, s, n * d), at<T>(grad_y, s, m * d), at<T>(grad_rhs, s, m * p));
  };
  c.for_each_slice([&](int64_t s) { is_double(x) ? run((double*)nullptr, s) : run((float*)nullptr, s); });
  return {grad_x, grad_y, grad_rhs};
}

// G kernels of the same rows; of a block, their matrices one after the other, (G, size, size), zeros beyond its edges.
template <class T>
class Groups {
 public:
  Groups(const Tensor& x, const Tensor& scale, const std::string& kernel, int64_t s, bool for_sums)
      : count_(x.size(-3)), squared_(kernel == "sqeuclidean" || kernel == "rbf"), rbf_(kernel == "rbf") {
    const int64_t n = x.size(-2), d = x.size(-1);
    int64_t size = kPairRows;
    while (size > kTile && (size * size * count_ * static_cast<int64_t>(sizeof(T)) > (300 << 10) || 4 * size > n))
      size /= 2;
    sides_.reserve(count_);
    for (int64_t g = 0; g < count_; ++g) {
      const Rows<T>& side =
          sides_.emplace_back(x, data<T>(x) + (s * count_ + g) * n * d, n, d, true, for_sums, squared_);
      similarities_.push_back(
          {data<T>(scale)[s * count_ + g], squared_, true, side.squares.data(), side.squares.data()});
    }
    pairs_.emplace(sides_[0], sides_[0], true, size, 0);
  }

  const Pairs<T>& pairs() const {
    return *pairs_;
  }
  int64_t count() const {
    return count_;
  }
  int64_t numbers() const {
    return pairs_->size() * pairs_->size();
  }
  // From a group's to the next one's: 2^n numbers apart, all would meet in the same lines of L1.
  int64_t stride() const {
    return numbers() + kTile;
  }
  const Rows<T>& side(int64_t g) const {
    return sides_[g];
  }
  bool squared() const {
    return squared_;
  }
  bool is_rbf() const {
    return rbf_;
  }

  void kernels(const Block& b, T* k) const {
    const int64_t size = pairs_->size();
    for (int64_t g = 0; g < count_; ++g, k += stride()) {
      const Rows<T>& side = sides_[g];
      if (rbf_ && side.d == 1) {  // a product and a square of one number each would cost more than this
        rbf_block(side.x + b.i0, b.rows, side.x + b.j0, b.cols, similarities_[g].scale, k, size);
      } else {
        pairs_->products(side, side, b, k);
        for (int64_t r = 0; r < b.rows; ++r) {
          similarities_[g](k + r * size, b, r);
          if (rbf_) rbf(k + r * size, b.cols);
        }
      }
      clear_edges(b, k);
    }
  }

  void clear_edges(const Block& b, T* k) const {
    const int64_t size = pairs_->size();
    for (int64_t r = 0; r < b.rows && b.cols < size; ++r) std::fill(k + r * size + b.cols, k + (r + 1) * size, T(0));
    std::fill(k + b.rows * size, k + size * size, T(0));
  }

 private:
  const int64_t count_;
  const bool squared_, rbf_;
  std::vector<Rows<T>> sides_;
  std::vector<Similarity<T>> similarities_;
  std::optional<Pairs<T>> pairs_;
};

constexpr int64_t kFewGroups = 8;  // whose Gram matrix is not worth a tile
constexpr int64_t kGramDepth =
    64;  // numbers of a kernel that a product adds up in its precision; sums of these in fp64

template <class T>
void gram(const Tensor& x, const Tensor& scale, const std::string& kernel, int64_t s, double* gram, double* sums) {
  const Groups<T> groups(x, scale, kernel, s, false);
  const Pairs<T>& pairs = groups.pairs();
  const int64_t count = groups.count(), numbers = groups.numbers(), stride = groups.stride(), n = x.size(-2),
                square = count * count;
  std::vector<std::vector<double>> of_rows(count, std::vector<double>(n));
  std::vector<double> parts(pairs.slots() * square);
  pairs.each_block([&](const Block& b) {
    const bool few = count <= kFewGroups;
    const auto room = room_for<T>(count * stride + (few ? 0 : square + packed_size(count, kGramDepth)));
    T *k = room.get(), *product = k + count * stride, *packed = product + square;
    groups.kernels(b, k);
    for (int64_t g = 0; g < count; ++g)
      pairs.add_weights(k + g * stride, b, &of_rows[g], b.diagonal ? nullptr : &of_rows[g]);
    double* part = parts.data() + b.slot * square;
    const double times = b.diagonal ? 1 : 2;
    for (int64_t q = 0; few && q < numbers; q += pairs.size())
      for (int64_t g = 0; g < count; ++g)
        for (int64_t h = 0; h <= g; ++h)
          part[g * count + h] += times * dot_row(k + g * stride + q, k + h * stride + q, pairs.size());
    for (int64_t q = 0; !few && q < numbers; q += kGramDepth) {
      const int64_t depth = std::min(kGramDepth, numbers - q);
      multiply<T>({k + q, stride, 1}, {k + q, 1, stride}, count, count, depth, product, count, true, false, packed);
      for (int64_t g = 0; g < count; ++g)
        for (int64_t h = 0; h <= g; ++h) part[g * count + h] += times * product[g * count + h];
    }
  });
  for (int64_t g = 0; g < count; ++g) std::copy(of_rows[g].begin(), of_rows[g].end(), sums + g * n);
  for (int64_t g = 0; g < count; ++g)
    for (int64_t h = 0; h <= g; ++h) {
      double total = 0;
      for (int64_t slot = 0; slot < pairs.slots(); ++slot) total += parts[slot * square + g * count + h];
      gram[g * count + h] = gram[h * count + g] = total;
    }
}

// f(slice) for stacks (..., G, N, D).
template <class F>
void for_group_slices(const Tensor& x, const F& f) {
  const int64_t n = x.size(-2), count = stack_size(x) / std::max<int64_t>(1, x.size(-3));
  for_slices(count, n * n * x.size(-3), f);
}

std::tuple<Tensor, Tensor> pairwise_gram_fwd(const Tensor x, const Tensor scale, const std::string kernel) {
  const int64_t count = x.size(-3), n = x.size(-2);
  Shape lead = stacked(x, {});
  lead.push_back(count);
  Tensor of_pairs = fresh(x, lead, ScalarType::Double), sums = fresh(x, stacked(x, {n}), ScalarType::Double);
  for_group_slices(x, [&](int64_t s) {
    double *to = data<double>(of_pairs) + s * count * count, *rows = data<double>(sums) + s * count * n;
    is_double(x) ? gram<double>(x, scale, kernel, s, to, rows) : gram<float>(x, scale, kernel, s, to, rows);
  });
  return {of_pairs, sums};
}

// The weight of a pair (i, j) in group g, of both orders: 2 sum_h (G + G')_gh k^h_ij + r^g_i + r^g_j.
template <class T>
void gram_gradients(const Tensor& x, const Tensor& scale, const std::string& kernel, int64_t s, const double* of_gram,
                    const double* of_sums, T* grad) {
  const Groups<T> groups(x, scale, kernel, s, true);
  const Pairs<T>& pairs = groups.pairs();
  const int64_t count = groups.count(), numbers = groups.numbers(), stride = groups.stride(), n = x.size(-2),
                d = x.size(-1);
  std::vector<T> both(count * count), rows(of_sums, of_sums + count * n);
  for (int64_t g = 0; g < count; ++g)
    for (int64_t h = 0; h < count; ++h)
      both[g * count + h] = static_cast<T>(2 * (of_gram[g * count + h] + of_gram[h * count + g]));
  std::vector<Gradients<T>> gradients;
  gradients.reserve(count);
  for (int64_t g = 0; g < count; ++g)
    gradients.emplace_back(x, groups.side(g), groups.side(g), true, groups.squared(), true, false);
  pairs.each_block([&](const Block& b) {
    const auto room = room_for<T>(2 * count * stride + packed_size(kGramDepth, count));
    T *k = room.get(), *w = k + count * stride, *packed = w + count * stride;
    groups.kernels(b, k);
    for (int64_t q = 0; q < numbers; q += kGramDepth)
      multiply<T>({both.data(), count, 1}, {k + q, stride, 1}, count, std::min(kGramDepth, numbers - q), count, w + q,
                  stride, false, false, packed);
    for (int64_t g = 0; g < count; ++g) {
      const T* of_rows = rows.data() + g * n;
      weigh_block(w + g * stride, b.rows, b.cols, pairs.ld(), of_rows + b.i0, of_rows + b.j0,
                  groups.is_rbf() ? k + g * stride : nullptr);
      gradients[g].add(pairs, w + g * stride, b);
    }
  });
  for (int64_t g = 0; g < count; ++g) gradients[g].write(grad + g * n * d, nullptr);
}

Tensor pairwise_gram_bwd(const Tensor grad_gram, const Tensor grad_sums, const Tensor x, const Tensor scale,
                         const std::string kernel) {
  const int64_t count = x.size(-3), n = x.size(-2), d = x.size(-1);
  Tensor grad = fresh(x, stacked(x, {n, d}), x.scalar_type());
  const Tensor of_gram = stable::contiguous(grad_gram), of_sums = stable::contiguous(grad_sums);
  const auto run = [&]<class T>(T*, int64_t s) {
    gram_gradients<T>(x, scale, kernel, s, data<double>(of_gram) + s * count * count,
                      data<double>(of_sums) + s * count * n, data<T>(grad) + s * count * n * d);
  };
  for_group_slices(x, [&](int64_t s) { is_double(x) ? run((double*)nullptr, s) : run((float*)nullptr, s); });
  return grad;
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("pairwise_logsumexp_fwd", TORCH_BOX(&sslkern::pairwise_logsumexp_fwd));
  m.impl("pairwise_logsumexp_bwd", TORCH_BOX(&sslkern::pairwise_logsumexp_bwd));
  m.impl("pairwise_argmax", TORCH_BOX(&sslkern::pairwise_argmax));
  m.impl("pairwise_matmul_fwd", TORCH_BOX(&sslkern::pairwise_matmul_fwd));
  m.impl("pairwise_matmul_bwd", TORCH_BOX(&sslkern::pairwise_matmul_bwd));
  m.impl("pairwise_gram_fwd", TORCH_BOX(&sslkern::pairwise_gram_fwd));
  m.impl("pairwise_gram_bwd", TORCH_BOX(&sslkern::pairwise_gram_bwd));
}
