// The two views of a cross-correlation.
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

}  // namespace sslkern
