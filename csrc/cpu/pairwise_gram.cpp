// Gram matrix of several kernel matrices, and its gradient.
#include <string>

#include "pairwise.h"

namespace sslkern {
namespace {

// Kernel matrices of G groups of the same rows. For a block, the G matrices lie in sequence, (G, size, size), with
// zeros beyond its edges.
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
  // Distance between two groups. At a distance of 2^n elements, all groups would map to the same lines of L1.
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
      if (rbf_ && side.d == 1) {  // products and squared norms would cost more
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

constexpr int64_t kFewGroups = 8;   // groups; up to this many, dot products are faster than tiles
constexpr int64_t kGramDepth = 64;  // terms per product in T; partial sums are added in fp64

template <class T>
void gram(const Tensor& x, const Tensor& scale, const std::string& kernel, int64_t s, double* gram, double* sums) {
  const Groups<T> groups(x, scale, kernel, s, false);
  const Pairs<T>& pairs = groups.pairs();
  const int64_t count = groups.count(), numbers = groups.numbers(), stride = groups.stride(), n = x.size(-2),
                square = count * count;
  std::vector<std::vector<double>> of_rows(count, std::vector<double>(n));
  std::vector<double> parts(pairs.row_blocks() * square);
  pairs.each_block([&](const Block& b) {
    const bool few = count <= kFewGroups;
    const auto room = room_for<T>(count * stride + (few ? 0 : square + packed_size(count, kGramDepth)));
    T *k = room.get(), *product = k + count * stride, *packed = product + square;
    groups.kernels(b, k);
    for (int64_t g = 0; g < count; ++g)
      pairs.add_weights(k + g * stride, b, &of_rows[g], b.diagonal ? nullptr : &of_rows[g]);
    double* part = parts.data() + b.i0 / pairs.size() * square;
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
      for (int64_t i = 0; i < pairs.row_blocks(); ++i) total += parts[i * square + g * count + h];
      gram[g * count + h] = gram[h * count + g] = total;
    }
}

// Calls f<T>(slice) for every slice of a stack (..., G, N, D).
template <class F>
void for_group_slices(const Tensor& x, const F& f) {
  const int64_t n = x.size(-2), count = stack_size(x) / std::max<int64_t>(1, x.size(-3));
  for_slices(count, n * n * x.size(-3),
             [&](int64_t s) { is_double(x) ? f.template operator()<double>(s) : f.template operator()<float>(s); });
}

std::tuple<Tensor, Tensor> pairwise_gram_fwd(const Tensor x_any, const Tensor scale_any, const std::string kernel) {
  const Tensor x = dense(x_any), scale = dense(scale_any);
  const int64_t count = x.size(-3), n = x.size(-2);
  Shape lead = stacked(x, {});
  lead.push_back(count);
  Tensor of_pairs = fresh(x, lead, ScalarType::Double), sums = fresh(x, stacked(x, {n}), ScalarType::Double);
  for_group_slices(x, [&]<class T>(int64_t s) {
    gram<T>(x, scale, kernel, s, data<double>(of_pairs) + s * count * count, data<double>(sums) + s * count * n);
  });
  return {of_pairs, sums};
}

// The weight of a pair (i, j) in group g, for both orders: 2 sum_h (G + G')_gh k^h_ij + r^g_i + r^g_j.
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

Tensor pairwise_gram_bwd(const Tensor grad_gram, const Tensor grad_sums, const Tensor x_any, const Tensor scale_any,
                         const std::string kernel) {
  const Tensor x = dense(x_any), scale = dense(scale_any);
  const int64_t count = x.size(-3), n = x.size(-2), d = x.size(-1);
  Tensor grad = fresh(x, stacked(x, {n, d}), x.scalar_type());
  const Tensor of_gram = dense(grad_gram), of_sums = dense(grad_sums);
  for_group_slices(x, [&]<class T>(int64_t s) {
    gram_gradients<T>(x, scale, kernel, s, data<double>(of_gram) + s * count * count,
                      data<double>(of_sums) + s * count * n, data<T>(grad) + s * count * n * d);
  });
  return grad;
}

}  // namespace
}  // namespace sslkern

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CPU, m) {
  m.impl("pairwise_gram_fwd", TORCH_BOX(&sslkern::pairwise_gram_fwd));
  m.impl("pairwise_gram_bwd", TORCH_BOX(&sslkern::pairwise_gram_bwd));
}
