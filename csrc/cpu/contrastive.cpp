// Cross-entropies of finding positives among negatives, with their gradients, in one call.
#include "bank_sums.h"
#include "pairwise_sums.h"

namespace sslkern {
namespace {

// The rows of one argument or of two views, contiguous, and divided by their length unless eps is 0.
template <class T>
class UnitRows {
 public:
  UnitRows(int64_t n, int64_t d) : n(n), d(d), memory_(room_for<T>(n * d)), lengths_(n), eps_(n) {}

  void read(const Matrix& from, int64_t begin, T eps) {
    in_parallel(from.rows, 4 * d, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* x = reinterpret_cast<const T*>(from.at(i, 0));
        T* to = row(begin + i);
        if (from.col_stride == 1) {
          std::copy_n(x, d, to);
        } else {
          for (int64_t k = 0; k < d; ++k) to[k] = x[k * from.col_stride];
        }
        eps_[begin + i] = eps;
        if (eps == 0) continue;
        const T length = lengths_[begin + i] = std::max(eps, std::sqrt(dot_row(to, to, d)));
        for (int64_t k = 0; k < d; ++k) to[k] /= length;
      }
    });
  }

  T* row(int64_t i) const {
    return memory_.get() + i * d;
  }

  // Turns the gradient of unit row i into that of the row as given.
  void pull_back(int64_t i, T* grad) const {
    if (eps_[i] == 0) return;
    if (lengths_[i] > eps_[i]) add_row(grad, row(i), -dot_row(row(i), grad, d), d);
    scale_row(grad, d, 1 / lengths_[i]);
  }

  const int64_t n, d;

 private:
  const std::unique_ptr<T[]> memory_;
  std::vector<T> lengths_, eps_;
};

// The terms of the loss of one side, f(n_i - p_i), and their derivatives: f(x) = log(1 + exp(x)), or x if decoupled.
template <class T>
struct Terms {
  std::vector<T> over, slope;  // over: the log-sum-exp of the negatives
  double total = 0;

  explicit Terms(int64_t n) : over(n), slope(n) {}

  void add(const std::vector<T>& positive, bool decoupled, double weight) {
    for (size_t i = 0; i < over.size(); ++i) {
      const double x = static_cast<double>(over[i]) - static_cast<double>(positive[i]), e = std::exp(-std::abs(x));
      total += weight * (decoupled ? x : std::max(x, 0.) + std::log1p(e));
      slope[i] = static_cast<T>(decoupled ? weight : weight * (x < 0 ? e : 1.) / (1 + e));
    }
  }
};

struct Settings {
  const bool views, both_sides, decoupled;
  const double eps_x, eps_y, eps_bank;
  const bool need_x, need_y, need_scale;

  bool for_x() const {
    return need_x || need_scale;
  }
  bool for_any() const {
    return for_x() || need_y;
  }
};

// Where the results of a slice go. The gradients are null where they are not needed.
template <class T>
struct Results {
  T *total, *grad_x, *grad_y, *grad_scale;
};

// The gradient of a similarity with the positive: grad -= slope partner.
template <class T>
void pull(T* grad, const T* partner, T slope, int64_t d) {
  add_row(grad, partner, -slope, d);
}

// From the gradients of unit rows, divided by the scale: the gradient of the scale, and those of the rows as given.
template <class T>
void finish(const UnitRows<T>& rows, int64_t begin, int64_t n, const T* grad, T scale, T* out, double* along) {
  in_parallel(n, 4 * rows.d, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* g = grad + i * rows.d;
      if (along != nullptr) along[i] = dot_row(rows.row(begin + i), g, rows.d);
      if (out == nullptr) continue;
      T* to = out + i * rows.d;
      for (int64_t k = 0; k < rows.d; ++k) to[k] = scale * g[k];
      rows.pull_back(begin + i, to);
    }
  });
}

template <class T>
std::vector<T> positives(const UnitRows<T>& x, int64_t at, const UnitRows<T>& y, int64_t to, int64_t n, T scale) {
  std::vector<T> out(n);
  in_parallel(n, x.d, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) out[i] = scale * dot_row(x.row(at + i), y.row(to + i), x.d);
  });
  return out;
}

// Two views x and y: each row against all rows but itself and its positive, which is the same row of the other view.
template <class T>
void of_views(const Tensor& like, const Matrix& x, const Matrix& y, T scale, const Settings& set,
              const Results<T>& to) {
  const int64_t n = x.rows, d = x.cols;
  UnitRows<T> z(2 * n, d);
  z.read(x, 0, static_cast<T>(set.eps_x));
  z.read(y, n, static_cast<T>(set.eps_y));
  const PairSlice<T> slice(like, z.row(0), 2 * n, nullptr, 2 * n, d, scale, kOffdiag, n, set.for_any());
  LogSumExp<T> sums(slice, false, set.for_any());
  Terms<T> terms(2 * n);
  sums.sums(terms.over.data(), nullptr);
  std::vector<T> positive = positives(z, 0, z, n, n, scale);
  positive.insert(positive.end(), positive.begin(), positive.begin() + n);
  terms.add(positive, set.decoupled, 1);
  *to.total = static_cast<T>(terms.total);
  if (!set.for_any()) return;
  const auto grad = room_for<T>(2 * n * d);
  const T *slope = terms.slope.data(), *over = terms.over.data();
  sums.gradients({slope, slope, over, over}, true, false, grad.get(), nullptr);
  in_parallel(2 * n, d, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t partner = (i + n) % (2 * n);
      pull(grad.get() + i * d, z.row(partner), slope[i] + slope[partner], d);
    }
  });
  std::vector<double> along(2 * n);
  finish(z, 0, n, grad.get(), scale, to.grad_x, along.data());
  finish(z, n, n, grad.get() + n * d, scale, to.grad_y, along.data() + n);
  if (to.grad_scale != nullptr) *to.grad_scale = static_cast<T>(sum_of(along) / 2);  // a product of two rows of z
}

// Queries x against keys y. The positive of row i is key i. With `both_sides`, the mean of this loss and of that of the
// keys against the queries.
template <class T>
void of_keys(const Tensor& like, const Matrix& x, const Matrix& y, T scale, const Settings& set, const Results<T>& to) {
  const int64_t n = x.rows, m = y.rows, d = x.cols;
  UnitRows<T> q(n, d), k(m, d);
  q.read(x, 0, static_cast<T>(set.eps_x));
  k.read(y, 0, static_cast<T>(set.eps_y));
  const PairSlice<T> slice(like, q.row(0), n, k.row(0), m, d, scale, kOffdiag, 0, set.for_any());
  LogSumExp<T> sums(slice, set.both_sides, set.for_any());
  const double weight = set.both_sides ? 0.5 : 1;
  Terms<T> rows(n), columns(set.both_sides ? m : 0);
  sums.sums(rows.over.data(), columns.over.data());
  const std::vector<T> positive = positives(q, 0, k, 0, n, scale);
  rows.add(positive, set.decoupled, weight);
  columns.add(positive, set.decoupled, weight);
  *to.total = static_cast<T>(rows.total + columns.total);
  if (!set.for_any()) return;
  const auto grad_q = room_for<T>(set.for_x() ? n * d : 0), grad_k = room_for<T>(set.need_y ? m * d : 0);
  sums.gradients({rows.slope.data(), columns.slope.data(), rows.over.data(), columns.over.data()}, set.for_x(),
                 set.need_y, grad_q.get(), grad_k.get());
  for (int64_t i = 0; i < n; ++i) {
    const T slope = rows.slope[i] + (set.both_sides ? columns.slope[i] : T(0));
    if (set.for_x()) pull(grad_q.get() + i * d, k.row(i), slope, d);
    if (set.need_y) pull(grad_k.get() + i * d, q.row(i), slope, d);
  }
  std::vector<double> along(n);
  if (set.for_x()) finish(q, 0, n, grad_q.get(), scale, to.grad_x, along.data());
  if (set.need_y) finish<T>(k, 0, m, grad_k.get(), scale, to.grad_y, nullptr);
  if (to.grad_scale != nullptr) *to.grad_scale = static_cast<T>(sum_of(along));
}

// Rows x against a bank. The positive of row i is row i of y.
template <class T>
void of_bank(const Tensor& like, const Matrix& x, const Matrix& y, const Matrix& bank, T scale, const Settings& set,
             const Results<T>& to) {
  const int64_t n = x.rows, d = x.cols;
  UnitRows<T> q(n, d), k(n, d);
  q.read(x, 0, static_cast<T>(set.eps_x));
  k.read(y, 0, static_cast<T>(set.eps_y));
  const auto grad = room_for<T>(set.for_any() ? n * d : 0);
  Terms<T> terms(n);
  BankSums<T>(like, q.row(0), n, bank, scale, static_cast<T>(set.eps_bank), set.for_x())
      .write(terms.over.data(), set.for_x() ? grad.get() : nullptr);
  terms.add(positives(q, 0, k, 0, n, scale), set.decoupled, 1);
  *to.total = static_cast<T>(terms.total);
  std::vector<double> along(n);
  if (set.for_x()) {
    for (int64_t i = 0; i < n; ++i) {
      T* g = grad.get() + i * d;
      pull(g, k.row(i), T(1), d);
      scale_row(g, d, terms.slope[i]);
    }
    finish(q, 0, n, grad.get(), scale, to.grad_x, along.data());
  }
  if (to.grad_scale != nullptr) *to.grad_scale = static_cast<T>(sum_of(along));
  if (!set.need_y) return;
  std::fill_n(grad.get(), n * d, T(0));
  for (int64_t i = 0; i < n; ++i) pull(grad.get() + i * d, q.row(i), terms.slope[i], d);
  finish<T>(k, 0, n, grad.get(), scale, to.grad_y, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_fwd(const Tensor x, const Tensor y,
                                                           const std::optional<Tensor> bank, const Tensor scale_any,
                                                           bool views, bool both_sides, bool decoupled, double eps_x,
                                                           double eps_y, double eps_bank, bool need_x, bool need_y,
                                                           bool need_scale) {
  const Settings set{views, both_sides, decoupled, eps_x, eps_y, eps_bank, need_x, need_y, need_scale};
  const Tensor scale = dense(scale_any);
  const int64_t n = x.size(-2), m = y.size(-2), d = x.size(-1);
  const auto room = [&](bool needed, const Shape& tail) {
    return fresh(x, needed ? stacked(x, tail) : Shape{0}, x.scalar_type());
  };
  const Tensor total = room(true, {}), grad_x = room(need_x, {n, d}), grad_y = room(need_y, {m, d}),
               grad_scale = room(need_scale, {});
  const auto run = [&]<class T>(int64_t s) {
    const Results<T> to{data<T>(total) + s, at<T>(grad_x, s, n * d), at<T>(grad_y, s, m * d), at<T>(grad_scale, s, 1)};
    const Matrix of_x = slice(x, s), of_y = slice(y, s);
    const T c = data<T>(scale)[s];
    if (bank.has_value()) return of_bank<T>(x, of_x, of_y, slice(*bank, s), c, set, to);
    views ? of_views<T>(x, of_x, of_y, c, set, to) : of_keys<T>(x, of_x, of_y, c, set, to);
  };
  for_pair_slices(stack_size(x), n * (bank.has_value() ? bank->size(-2) : m), [&](int64_t s) {
    is_double(x) ? run.template operator()<double>(s) : run.template operator()<float>(s);
  });
  return {total, grad_x, grad_y, grad_scale};
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("contrastive_fwd", TORCH_BOX(&sslkern::contrastive_fwd));
}
