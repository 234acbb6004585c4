// The square matrix by which a gradient multiplies centred values: as it is, by tiles or a vendor library, or rounded
// to bf16.
#pragma once

#include "bfloat_covariance.h"

namespace sslkern {

// The centred values of a view: (z - mean) scale, by columns; a null scale is 1.
template <class T>
struct Centred {
  Matrix z;
  const T *mean, *scale;
};

// Multiplies (N, N) by columns of (N, D) values in the dual, else rows of them by the transpose of (D, D). With
// `pairs`, the products are of bf16.
template <class T>
class GramFactor {
 public:
  GramFactor(const Tensor& grams, int64_t index, bool transposed, const Centred<T>& values, bool dual, bool pairs)
      : values_(values), dual_(dual) {
    const int64_t m = dual ? values.z.rows : values.z.cols, other = dual ? values.z.cols : values.z.rows;
    gemm_ = pairs ? Gemm::tiles : gemm_for<T>(m, other);
    gram_ = square_of<T>(grams, index, m, gemm_);
    if (transposed) gram_ = gram_->t();
    if constexpr (std::is_same_v<T, float>) {
      if (!pairs) return;
      const std::vector<float> ones(dual ? m : 0, 1.f);
      rounded_.emplace(grams, gram_->strided(), m, dual ? nullptr : values.scale, dual ? ones.data() : values.mean);
    }
  }

  Gemm gemm() const {
    return gemm_;
  }

  Cut cut() const {
    const int64_t n = values_.z.rows, d = values_.z.cols;
    if (dual_) return rounded_ ? columns_for_pairs(d) : cut_columns(n, d, gemm_);
    return rounded_ ? rows_for_pairs(n, d) : cut_rows(n, d, gemm_);
  }

  // The product with a block of the values.
  const T* operator()(const Span& span, const Operand<T>& block, Products<T>& products) const {
    if constexpr (std::is_same_v<T, float>) {
      if (rounded_) {
        float* out = products.result(block.rows * block.cols);
        dual_ ? rounded_->times_columns(values_.z, span.begin, span.end, values_.mean, values_.scale, block.data, out)
              : rounded_->times_rows(values_.z, span.begin, span.end, out);
        return out;
      }
    }
    return dual_ ? products.nt(*gram_, block.t()) : products.nt(block, *gram_);
  }

 private:
  const Centred<T> values_;
  const bool dual_;
  Gemm gemm_;
  std::optional<Operand<T>> gram_;
  std::optional<RoundedGram> rounded_;
};

}  // namespace sslkern
