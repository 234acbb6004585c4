// The small matrices of a rank-k update: C and D from K and A, in fp64. A complex matrix is a real one of twice the
// side, [[Re, Im], [-Im, Re]]; sums, products and inverses keep this form.
#pragma once

#include <cstring>

#include "../common.h"
#include "tiles.h"

namespace sslkern {

enum Retraction : int64_t { kTangent, kDirect, kCayley };

// Gauss-Jordan inverse of (n, n), in place, with partial pivoting. Returns log |det|. A singular matrix gives
// infinities.
SSLKERN_CLONES static double invert(double* a, int64_t n, int64_t* order) {
  double log_det = 0;
  for (int64_t k = 0; k < n; ++k) {
    int64_t best = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::abs(a[i * n + k]) > std::abs(a[best * n + k])) best = i;
    order[k] = best;
    double* pivot = a + k * n;
    for (int64_t j = 0; j < n && best != k; ++j) std::swap(pivot[j], a[best * n + j]);
    log_det += std::log(std::abs(pivot[k]));
    const double each = 1 / pivot[k];
    pivot[k] = 1;
    for (int64_t j = 0; j < n; ++j) pivot[j] *= each;
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      double* row = a + i * n;
      const double share = row[k];
      row[k] = 0;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) row[j] -= share * pivot[j];
    }
  }
  for (int64_t k = n - 1; k >= 0; --k)
    for (int64_t i = 0; i < n && order[k] != k; ++i) std::swap(a[i * n + k], a[i * n + order[k]]);
  return log_det;
}

// sum (k, k) += a'a
template <class T>
SSLKERN_INLINE void add_gram_body(const T* a, int64_t rows, int64_t k, double* sum) {
  for (int64_t i = 0; i < rows; ++i, a += k)
    for (int64_t r = 0; r < k; ++r) {
      const double x = a[r];
#pragma omp simd
      for (int64_t s = 0; s < k; ++s) sum[r * k + s] += x * a[s];
    }
}

SSLKERN_CLONES static void add_gram(const float* a, int64_t rows, int64_t k, double* sum) {
  add_gram_body(a, rows, k, sum);
}
SSLKERN_CLONES static void add_gram(const double* a, int64_t rows, int64_t k, double* sum) {
  add_gram_body(a, rows, k, sum);
}

// A small row-major matrix.
struct Small {
  int64_t rows, cols;
  std::vector<double> values;

  Small(int64_t rows, int64_t cols, double diagonal = 0) : rows(rows), cols(cols), values(rows * cols) {
    for (int64_t i = 0; diagonal != 0 && i < rows; ++i) at(i, i) = diagonal;
  }
  double& at(int64_t i, int64_t j) {
    return values[i * cols + j];
  }
  double at(int64_t i, int64_t j) const {
    return values[i * cols + j];
  }
  // this += share * x, with x placed at (row, col).
  Small& add(double share, const Small& x, int64_t row = 0, int64_t col = 0) {
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t j = 0; j < x.cols; ++j) at(row + i, col + j) += share * x.at(i, j);
    return *this;
  }
  Small block(int64_t row, int64_t col, int64_t height, int64_t width) const {
    Small out(height, width);
    for (int64_t i = 0; i < height; ++i) std::copy_n(&values[(row + i) * cols + col], width, &out.values[i * width]);
    return out;
  }
  Small transposed() const {
    Small out(cols, rows);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) out.at(j, i) = at(i, j);
    return out;
  }
  Small inverse(double* log_det = nullptr) const {
    Small out = *this;
    std::vector<int64_t> order(rows);
    const double found = invert(out.values.data(), rows, order.data());
    if (log_det != nullptr) *log_det = found;
    return out;
  }
  double norm() const {
    double total = 0;
    for (double x : values) total += x * x;
    return std::sqrt(total);
  }
};

inline Small operator*(const Small& a, const Small& b) {
  Small out(a.rows, b.cols);
  std::vector<double> room(packed_size(b.cols, b.rows));
  multiply<double>({a.values.data(), a.cols, 1}, {b.values.data(), b.cols, 1}, a.rows, b.cols, a.cols,
                   out.values.data(), b.cols, false, false, room.data());
  return out;
}

// S with exp(W J W') = I + W S W'. S starts as phi_1(J K) J for 1 / 2^s of the step, followed by s doublings S <- 2 S +
// S K S.
inline Small exponential(Small j, const Small& gram) {
  Small z = j * gram;
  const double norm = z.norm();
  int64_t halvings = 0;
  for (double left = norm; left > .5 && halvings < 40 && std::isfinite(norm); left /= 2) ++halvings;
  const double share = std::ldexp(1., -static_cast<int>(halvings));
  for (Small* each : {&j, &z})
    for (double& x : each->values) x *= share;
  Small s = j, term = j;
  for (int64_t n = 2; n < 16; ++n) {
    term = z * term;
    for (double& x : term.values) x /= n;
    s.add(1, term);
    if (!(term.norm() > 1e-17 * j.norm())) break;
  }
  for (; halvings > 0; --halvings) {
    const Small more = s * gram * s;
    for (double& x : s.values) x *= 2;
    s.add(1, more);
  }
  return s;
}

// Square root of a matrix with positive eigenvalues: the product form of the Denman-Beavers iteration, scaled by the
// determinant while the matrix is far from one.
inline Small square_root(const Small& x) {
  const int64_t n = x.rows;
  Small y = x, m = x;
  for (int64_t step = 0; step < 30; ++step) {
    double log_det;
    Small inverse = m.inverse(&log_det);
    const double scale = std::exp(-log_det / n);  // of m
    Small far = m;
    far.add(-1, Small(n, n, 1));
    const double distance = far.norm(), mu = distance > .1 && std::isfinite(scale) ? scale : 1;
    if (!(distance > 1e-15 * n)) break;
    Small half = inverse;  // (I + (mu m)^-1) / 2
    for (double& v : half.values) v /= 2 * mu;
    half.add(.5, Small(n, n, 1));
    y = y * half;
    for (double& v : y.values) v *= std::sqrt(mu);
    for (int64_t i = 0; i < n * n; ++i) m.values[i] = (mu * m.values[i] + inverse.values[i] / mu) / 4;
    m.add(.5, Small(n, n, 1));
    if (distance < 1e-8) break;  // convergence is quadratic, so this step was the last
  }
  return y;
}

// [C; D], ((2k + k), 2k), or C alone where D is zero, with U' = U + (U W C + a D) W'.
inline Small coefficients(const Small& gram, const Small& outer, int64_t retraction) {
  const int64_t k = outer.rows;
  const Small one(k, k, 1), two(2 * k, 2 * k, 1);
  Small skew(2 * k, 2 * k);
  skew.add(1, one, 0, k).add(-1, one, k, 0);
  if (retraction == kTangent) {
    for (double& x : skew.values) x /= 2;
    return exponential(skew, gram);
  }
  Small out(3 * k, 2 * k);
  if (retraction == kDirect) {  // Y (Y'Y)^(-1/2), Y = U + a b' and Y'Y = I + W theta W'
    Small theta(2 * k, 2 * k);
    theta.add(1, one, 0, k).add(1, one, k, 0).add(1, outer, k, k);
    Small square = theta * gram;
    square.add(1, two);
    Small sum = square_root(square);
    const Small s = sum.add(1, square).inverse() * theta;  // minus S
    Small d = gram.block(k, 0, k, 2 * k) * s;
    return out.add(-1, s).add(1, one, 2 * k, k).add(-1, d, 2 * k, 0);
  }
  // I + V S V' with V = [(I - U U' / 2) a, U b], and V'U = [M / 2, b]'
  const Small mb = gram.block(0, k, k, k);
  Small left(2 * k, 2 * k);
  left.add(1, outer).add(-.75, gram.block(0, 0, k, k)).add(.5, mb, 0, k).add(.5, mb.transposed(), k, 0);
  left.add(1, gram.block(k, k, k, k), k, k);
  Small system = two;
  system.add(-.5, skew * left);
  Small s = system.inverse() * skew;
  for (int64_t i = 0; i < 2 * k; ++i)
    for (int64_t j = 0; j < k; ++j) s.at(i, j) /= 2;
  const Small of_a = s.block(0, 0, k, 2 * k);
  return out.add(-.5, of_a).add(1, s.block(k, 0, k, 2 * k), k, 0).add(1, of_a, 2 * k, 0);
}

}  // namespace sslkern
