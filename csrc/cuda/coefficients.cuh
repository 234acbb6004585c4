// The coefficients C and D of a rank-k update, from K and A, in fp64 by one block. All threads of the block call every
// function; its results are visible to all of them when it returns. A complex matrix is a real one of twice the side,
// with blocks [[Re, Im], [-Im, Re]].
#pragma once

#include "small_matrices.cuh"

namespace sslkern::cuda {

enum Retraction : int { kTangent, kDirect, kCayley };

constexpr int kTerms = 24;  // terms of a power series; a larger step takes a closed form

// Power series of the retractions for small Z: phi_1(z); -1 / (s (1 + s)) with s = sqrt(1 + z), which equals (s - 1) /
// z - 1 / s, a difference of binomial series; and 1 / (1 - z).
struct Series {
  double at[3][kTerms] = {};

  constexpr Series() {
    double factorial = 1, root = .5, inverse_root = 1;
    for (int n = 0; n < kTerms; ++n) {
      factorial /= n + 1;
      at[kTangent][n] = factorial;
      at[kDirect][n] = root - inverse_root;
      at[kCayley][n] = 1;
      root *= (-.5 - n) / (n + 2);
      inverse_root *= (-.5 - n) / (n + 1);
    }
  }
};

__constant__ constexpr Series kSeries;

class Solver {
 public:
  // `tolerance` bounds the neglected terms, relative to the largest coefficient.
  __device__ Solver(const SmallMatrices& memory, int k, double tolerance)
      : a_(memory), k_(k), n_(2 * k), tolerance_(tolerance) {}

  // Calls put(i, j, value) for the 2k rows of C, and for the k rows of D below if the retraction has a D.
  template <class Put>
  __device__ void solve(int retraction, const Put& put) {
    const int k = k_, n = n_;
    const double *gram = a_.gram, *outer = a_.outer;
    double* z = a_.free[0];
    if (retraction == kTangent) {
      each(n * n, [&](int at) { z[at] = at < k * n ? .5 * gram[at + k * n] : -.5 * gram[at - k * n]; });
      const double* s = exponential(z);
      each(n * n, [&](int at) { put(at / n, at % n, s[at]); });
    } else if (retraction == kDirect) {  // Y (Y'Y)^(-1/2), Y = U + a b' and Y'Y = I + W theta W'
      each(n * n, [&](int at) {
        const int i = at / n, j = at % n;
        double sum = i < k ? gram[at + k * n] : gram[at - k * n];
        for (int q = 0; i >= k && q < k; ++q) sum += outer[(i - k) * k + q] * gram[(k + q) * n + j];
        z[at] = sum;
      });
      const auto theta = [=](int i, int j) {
        return i >= k && j >= k ? outer[(i - k) * k + j - k] : static_cast<double>(i == j + k || j == i + k);
      };
      const double* s = series(kDirect, z, theta);
      if (s == nullptr) s = inverse_root(z, theta);
      products<1>(
          k, n, n, [=](int i, int q) { return gram[(k + i) * n + q]; }, [=](int q, int j) { return s[q * n + j]; },
          [&](int i, int j, double sum) { put(n + i, j, sum + (j == k + i)); });
      each(n * n, [&](int at) { put(at / n, at % n, s[at]); });
    } else {  // I + V S V' with V = [(I - U U' / 2) a, U b], and V'U = [M / 2, b]'
      const auto left = [=](int i, int j) {
        if (i >= k || j >= k) return (i >= k && j >= k ? 1 : .5) * gram[i * n + j];
        return outer[i * k + j] - .75 * gram[i * n + j];
      };
      const auto skew = [=](int i, int j) { return static_cast<double>((j == i + k) - (i == j + k)); };
      each(n * n, [&](int at) {
        const int i = at / n, j = at % n;
        z[at] = i < k ? left(i + k, j) / 2 : -left(i - k, j) / 2;
      });
      double* s = series(kCayley, z, skew);
      if (s == nullptr) {
        s = a_.free[1];
        each(n * n, [&](int at) { z[at] = (at / n == at % n) - z[at]; });
        invert(z);
        each(n * n, [&](int at) { s[at] = at % n < k ? -z[at + k] : z[at - k]; });
      }
      each(n * n, [&](int at) {
        const int i = at / n, j = at % n;
        const double number = j < k ? s[at] / 2 : s[at];
        put(i, j, i < k ? -number / 2 : number);
        if (i < k) put(n + i, j, number);
      });
    }
  }

 private:
  const SmallMatrices& a_;
  const int k_, n_;
  const double tolerance_;

  // Calls put(i, j, value) for every element of x y.
  template <class Put>
  __device__ void multiply(const double* x, const double* y, const Put& put) {
    const int n = n_;
    const auto left = [=](int i, int q) { return x[i * n + q]; };
    const auto right = [=](int q, int j) { return y[q * n + j]; };
    square_products(n, n, left, right, put);
  }

  // Threads may still read the scratch when others return. A barrier must come before it is written again.
  template <class F>
  __device__ double norm(const F& f) {
    double sum = 0, *sums = a_.scratch + 2 * n_;
    for (int at = threadIdx.x; at < n_ * n_; at += blockDim.x) sum += f(at) * f(at);
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += sums[warp];
    return sqrt(sum);
  }

  // Number of terms to sum for a Z of this norm; kTerms + 1 if the norm is too large for the series.
  __device__ int terms(int retraction, double norm) const {
    double power = 1;
    for (int n = 1; n < kTerms; ++n)
      if (fabs(kSeries.at[retraction][n]) * (power *= norm) < tolerance_) return n;
    return kTerms + 1;
  }

  // The sum of c_i Z^i J, or nullptr if the series is too long.
  template <class J>
  __device__ double* series(int retraction, const double* z, const J& j) {
    const int n = n_;
    const double* c = kSeries.at[retraction];
    int left = terms(retraction, norm([=](int at) { return z[at]; }));
    if (left > kTerms && retraction != kTangent) return nullptr;
    left = min(left, kTerms) - 1;
    double *s = a_.free[1], *next = a_.free[2];
    each(n * n, [&](int at) { s[at] = c[left] * j(at / n, at % n); });
    while (--left >= 0) {
      multiply(z, s, [&](int row, int column, double sum) { next[row * n + column] = sum + c[left] * j(row, column); });
      double* const made = next;
      next = s;
      s = made;
    }
    return s;
  }

  // S with exp(W J W') = I + W S W', for J = [[0, I], [-I, 0]] / 2 and Z = J K. S starts as phi_1(Z) J for 1 / 2^s of
  // the step, followed by s doublings S <- 2 S + S K S.
  __device__ double* exponential(double* z) {
    const int n = n_, k = k_;
    const double* gram = a_.gram;
    const double size = norm([=](int at) { return z[at]; });
    double share = 1;
    int halvings = 0;
    for (; size * share > .5 && halvings < 40 && isfinite(size); ++halvings) share /= 2;
    each(n * n, [&](int at) { z[at] *= share; });
    double* s = series(kTangent, z, [=](int i, int j) { return share / 2 * ((j == i + k) - (i == j + k)); });
    double* next = s == a_.free[1] ? a_.free[2] : a_.free[1];
    for (; halvings > 0; --halvings) {
      multiply(s, gram, [=](int i, int j, double sum) { z[i * n + j] = sum; });
      multiply(z, s, [=](int i, int j, double sum) { next[i * n + j] = 2 * s[i * n + j] + sum; });
      double* const made = next;
      next = s;
      s = made;
    }
    return s;
  }

  // -(Y + X)^-1 theta, where X = I + Z and Y is its square root: the product form of the Denman-Beavers iteration,
  // scaled by the determinant while the matrix is far from one.
  template <class Theta>
  __device__ double* inverse_root(double* x, const Theta& theta) {
    const int n = n_, k = k_;
    double *y = a_.free[1], *m = a_.free[2], *inverse = a_.free[3], *next = a_.free[4];
    each(n * n, [&](int at) { y[at] = m[at] = x[at] += at / n == at % n; });
    for (int step = 0; step < 30; ++step) {
      each(n * n, [&](int at) { inverse[at] = m[at]; });
      const double scale = exp(-invert(inverse) / n);  // of m
      const double distance = norm([=](int at) { return m[at] - (at / n == at % n); });
      if (!(distance > 1e-15 * n)) break;
      const double mu = distance > .1 && isfinite(scale) ? scale : 1, root = sqrt(mu);
      each(n * n, [&](int at) {
        const double one = at / n == at % n, inverted = inverse[at] / mu;
        m[at] = (mu * m[at] + inverted) / 4 + one / 2;
        inverse[at] = root * (inverted + one) / 2;
      });
      multiply(y, inverse, [=](int i, int j, double sum) { next[i * n + j] = sum; });
      double* const made = next;
      next = y;
      y = made;
      if (distance < 1e-8) break;  // convergence is quadratic, so this step was the last
    }
    each(n * n, [&](int at) { x[at] += y[at]; });
    invert(x);
    each(n * n, [&](int at) {
      const int i = at / n, j = at % n;
      double sum = x[j < k ? at + k : at - k];
      for (int q = 0; j >= k && q < k; ++q) sum += x[i * n + k + q] * theta(k + q, j);
      m[at] = -sum;
    });
    return m;
  }

  // Gauss-Jordan inverse, in place, with partial pivoting. Returns log |det|. A singular matrix gives infinities.
  __device__ double invert(double* a) {
    const int n = n_, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double *shares = a_.scratch, *found = a_.scratch + 2 * n;
    int* order = reinterpret_cast<int*>(a_.scratch + n);
    double log_det = 0;
    for (int k = 0; k < n; ++k) {
      double* pivot = a + k * n;
      if (warp == 0) {
        int best = k;
        double most = -1;
        for (int i = k + lane; i < n; i += 32)
          if (fabs(a[i * n + k]) > most) most = fabs(a[i * n + k]), best = i;
        for (int lanes = 16; lanes > 0; lanes /= 2) {
          const double others = __shfl_xor_sync(~0u, most, lanes);
          const int other = __shfl_xor_sync(~0u, best, lanes);
          if (others > most || (others == most && other < best)) most = others, best = other;
        }
        if (lane == 0) {
          order[k] = best;
          found[0] = a[best * n + k];
          found[1] = log_det += log(fabs(found[0]));
        }
      }
      __syncthreads();
      const int best = order[k];
      const double reciprocal = 1 / found[0];
      for (int j = threadIdx.x; j < n; j += blockDim.x) {
        const double old = pivot[j], chosen = a[best * n + j];
        if (best != k) a[best * n + j] = old;
        if (j == k) shares[best] = old;
        if (j != k && j != best) shares[j] = a[j * n + k];
        pivot[j] = (j == k ? 1 : chosen) * reciprocal;
      }
      __syncthreads();
      for (int i = warp; i < n; i += blockDim.x / 32)
        for (int j = lane; i != k && j < n; j += 32) a[i * n + j] = (j == k ? 0 : a[i * n + j]) - shares[i] * pivot[j];
      __syncthreads();
    }
    log_det = found[1];
    each(n, [&](int i) {
      for (int k = n - 1; k >= 0; --k) {
        double &one = a[i * n + k], &other = a[i * n + order[k]];
        const double kept = one;
        one = other;
        other = kept;
      }
    });
    return log_det;
  }
};

}  // namespace sslkern::cuda
