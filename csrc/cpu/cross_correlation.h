// The two views of a cross-correlation, and the products of their gradients.
#pragma once

#include "bfloat_covariance.h"

namespace sslkern {

// Inputs, and the tensors that the forward saves for the backward.
struct Views {
  Tensor input[2];
  Tensor centre, inv_std, diagonal, gram;
  int64_t n, d, stack;
  bool dual;
};

// One slice of both views. gram[1] is null in the primal.
template <class T>
struct Pair {
  Matrix z[2];
  T *high[2], *low[2], *inv_std[2], *gram[2], *diagonal;
  int64_t n, d;

  Pair(const Views& v, int64_t s) : diagonal(data<T>(v.diagonal) + s * v.d), n(v.n), d(v.d) {
    const int64_t m = v.dual ? v.n : v.d;
    for (int64_t k = 0; k < 2; ++k) {
      const int64_t index = k * v.stack + s;
      z[k] = slice(v.input[k], s);
      high[k] = data<T>(v.centre) + index * 2 * d;
      low[k] = high[k] + d;
      inv_std[k] = data<T>(v.inv_std) + index * d;
      gram[k] = k == 0 || v.dual ? data<T>(v.gram) + index * m * m : nullptr;
    }
  }
};

// Whether both views take the products of bf16.
template <class T>
bool by_pairs(const Pair<T>& p, int64_t m) {
  if constexpr (std::is_same_v<T, float>) {
    bool take = true;
    for (int k = 0; k < 2; ++k)
      take = take && takes_pairs(p.z[k], m) && nearly_standard(p.high[k], p.inv_std[k], p.d, p.n);
    return take;
  }
  return false;
}

// The products of the gradients with the Gram matrices, or with the correlation. `gram` is a stack of these.
template <class T>
class CorrelationProducts {
 public:
  CorrelationProducts(const Views& v, int64_t s, const Pair<T>& p, const bool* needed)
      : p_(p), dual_(v.dual), pairs_(by_pairs(p, v.dual ? p.n : p.d)) {
    const int64_t m = dual_ ? p.n : p.d;
    gemm_ = pairs_ ? Gemm::tiles : gemm_for<T>(m, dual_ ? p.d : p.n);
    gram_[0] = square_of<T>(v.gram, s, m, gemm_);
    gram_[1] = dual_ ? square_of<T>(v.gram, v.stack + s, m, gemm_) : gram_[0]->t();
    if constexpr (std::is_same_v<T, float>) {
      const std::vector<float> ones(m, 1.f);
      for (int k = 0; k < 2; ++k) {
        if (!pairs_ || !needed[k]) continue;
        const T *scale = dual_ ? nullptr : p.inv_std[1 - k], *weights = dual_ ? ones.data() : p.high[1 - k];
        const auto from = (dual_ ? *gram_[1 - k] : *gram_[k]).strided();
        rounded_[k].emplace(v.gram, from.data, from.row, from.col, m, scale, weights);
      }
    }
  }

  Gemm gemm() const {
    return gemm_;
  }

  Cut cut() const {
    if (dual_) return pairs_ ? columns_for_pairs(p_.d) : cut_columns(p_.n, p_.d, gemm_);
    return pairs_ ? rows_for_pairs(p_.n, p_.d) : cut_rows(p_.n, p_.d, gemm_);
  }

  // The product for view k, from blocks of both standardised views.
  const T* operator()(int k, const Span& span, const std::vector<Operand<T>>& block, Products<T>& products) const {
    if constexpr (std::is_same_v<T, float>) {
      if (pairs_) {
        float* out = products.result(block[k].rows * block[k].cols);
        dual_ ? rounded_[k]->times_columns(p_.z[k], span.begin, span.end, p_.high[k], p_.inv_std[k], block[k].data, out)
              : rounded_[k]->times_rows(p_.z[1 - k], span.begin, span.end, out);
        return out;
      }
    }
    return dual_ ? products.nt(*gram_[1 - k], block[k].t()) : products.nt(block[1 - k], *gram_[k]);
  }

 private:
  const Pair<T>& p_;
  const bool dual_, pairs_;
  Gemm gemm_;
  std::optional<Operand<T>> gram_[2];
  std::optional<RoundedGram> rounded_[2];
};

}  // namespace sslkern
