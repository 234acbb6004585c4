// Matrix products: small ones by our register tiles, the rest by the vendor library through torch's dispatcher.
#pragma once

#include <optional>
#include <string>

#include "../common.h"
#include "bfloat_products.h"
#include "tiles.h"

namespace sslkern {

inline Tensor onednn_linear(const Tensor& x, const Tensor& w) {
  using torch::stable::detail::from;
  StableIValue stack[6] = {from(x),
                           from(w),
                           from(std::optional<Tensor>()),
                           from(std::string("none")),
                           from(std::vector<double>{}),
                           from(std::optional<std::string>(std::string()))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Uses the `.out` overload, which autocast leaves alone; plain `mm` would be rewritten to bf16.
inline Tensor aten_mm(const Tensor& x, const Tensor& y) {
  using torch::stable::detail::from;
  Tensor out = fresh(x, {x.size(0), y.size(1)}, x.scalar_type());
  StableIValue stack[3] = {from(x), from(y), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// MKL, which is behind torch.mm, uses AVX-512 on Intel's processors only.
inline bool mkl_misses_avx512() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

// There, oneDNN runs fp32 at twice the rate of torch.mm (470 against 200 GFLOP/s on 2 cores). On an AMD processor
// without AVX-512 it is up to 1.3x slower. The choice is by processor, never by timing.
inline bool use_onednn() {
  static const bool chosen = [] {
    if (asked("mm") || (!mkl_misses_avx512() && !asked("onednn"))) return false;
    try {  // a private operator of torch; without it, mm is used
      const auto cpu = torch::stable::Device(torch::headeronly::DeviceType::CPU);
      Tensor one = stable::empty({1, 1}, ScalarType::Float, std::nullopt, cpu);
      *data<float>(one) = 1.f;
      return *data<float>(onednn_linear(one, one)) == 1.f;
    } catch (...) {
      return false;
    }
  }();
  return chosen;
}

enum class Gemm { tiles, onednn, mm };

// Largest side of a Gram matrix that stays in a core's L2 together with a block.
constexpr int64_t kTiled = 256;

// The implementation of products, for a Gram matrix (m, m) of a matrix whose other side is `other`. When the caller
// forces the form with the much larger Gram, each entry is a sum of many short products. torch.mm sums in blocks, and
// is 2 to 5 times more accurate there than oneDNN's single chain.
template <class T>
Gemm gemm_for(int64_t m, int64_t other) {
  if (m <= kTiled && tiles<T>().one != nullptr) return Gemm::tiles;
  return std::is_same_v<T, float> && use_onednn() && m <= 2 * other ? Gemm::onednn : Gemm::mm;
}

// Describes the choice in words.
template <class T>
std::string products_of() {
  const std::string library = gemm_for<T>(kTiled + 1, kTiled + 1) == Gemm::onednn ? "oneDNN" : "torch.mm";
  const std::string above = ", " + library + " above", pairs = bfloat_products();
  const std::string told = tiles<T>().one == nullptr
                               ? library
                               : tiles<T>().name + (" tiles up to a side of " + std::to_string(kTiled)) + above;
  return pairs.empty() ? told
                       : told + "; covariance of bf16 by " + pairs + " from a side of " + std::to_string(kPairSide);
}

// A (rows, cols) matrix that is contiguous in `memory`, or the transpose of a contiguous one.
template <class T>
struct Operand {
  Tensor memory;
  T* data;
  int64_t rows, cols;
  bool transposed = false;

  Operand t() const {
    return {memory, data, cols, rows, !transposed};
  }

  Strided<T> strided() const {
    return transposed ? Strided<T>{data, 1, rows} : Strided<T>{data, cols, 1};
  }

  Tensor tensor() const {
    const int64_t r = transposed ? cols : rows, c = transposed ? rows : cols;
    Tensor flat = memory;
    if (flat.numel() != r * c) flat = stable::narrow(flat, 0, 0, r * c);
    Tensor out = stable::view(flat, {r, c});
    return transposed ? stable::transpose(out, 0, 1) : out;
  }
};

// Matrix `index` of a stack (..., m, m) as an operand. A vendor library may choose its order of summation by the
// address. New tensors start at a multiple of 64 bytes, so a slice that does not is copied. Its bits are then those of
// the slice alone.
template <class T>
Operand<T> square_of(const Tensor& stack, int64_t index, int64_t m, Gemm gemm) {
  const Tensor square = stable::select(stable::view(const_cast<Tensor&>(stack), {-1, m * m}), 0, index);
  T* from = data<T>(square);
  if (gemm == Gemm::tiles || reinterpret_cast<uintptr_t>(from) % 64 == 0) return {square, from, m, m};
  const Tensor copy = fresh(square, {m * m}, dtype_of<T>());
  std::copy_n(from, m * m, data<T>(copy));
  return {copy, data<T>(copy), m, m};
}

inline Tensor row_range(const Tensor& t, int64_t begin, int64_t end) {
  if (begin == 0 && end == t.size(0)) return t;  // a call into the dispatcher costs 2 us
  return stable::narrow(const_cast<Tensor&>(t), 0, begin, end - begin);
}

// x w' in a new tensor. With oneDNN, both may be whole transposed views but not narrowed ones, which take it seconds.
inline Tensor matmul_nt(const Tensor& x, const Tensor& w, bool onednn) {
  return onednn ? onednn_linear(x, w) : aten_mm(x, stable::transpose(const_cast<Tensor&>(w), 0, 1));
}

// Rows per panel of a symmetric product: 4 panels are best at 256 rows, 8 from 512 on; below 192 rows, one product.
inline int64_t panel_rows(int64_t n) {
  const int64_t panels = n < 192 ? 1 : n < 512 ? 4 : 8;
  return ceil_div(ceil_div(n, panels), 8) * 8;
}

// gram (m, m) = or += x y', by row panels of the vendor library. With `symmetric`, only the lower triangle.
template <class T>
void add_panels(const Tensor& x, const Tensor& y, T* gram, bool symmetric, bool first, bool onednn) {
  const int64_t m = x.size(0), step = panel_rows(m);
  for (int64_t i0 = 0; i0 < m; i0 += step) {
    const int64_t i1 = std::min(m, i0 + step), cols = symmetric ? i1 : m;
    const Tensor panel = matmul_nt(row_range(x, i0, i1), row_range(y, 0, cols), onednn);
    const T* from = data<T>(panel);
    in_turns(i0, i1, ceil_div(16384, cols), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* p = from + (i - i0) * cols;
        T* g = gram + i * m;
        if (first) {
          std::copy_n(p, cols, g);
        } else {
          for (int64_t j = 0; j < cols; ++j) g[j] += p[j];
        }
      }
    });
  }
}

// Products and their memory, for one thread: packed operands and results of tiles, or the library's last result.
template <class T>
class Products {
 public:
  Products(const Tensor& like, Gemm gemm) : gemm_(gemm), packed_(like), result_(like) {}

  // x w'
  const T* nt(const Operand<T>& x, const Operand<T>& w) {
    if (gemm_ != Gemm::tiles) {
      result_ = x.memory;  // frees the last result first
      result_ = matmul_nt(x.tensor(), w.tensor(), gemm_ == Gemm::onednn);
      return data<T>(result_);
    }
    T* out = result(x.rows * w.rows);
    multiply(x.strided(), w.t().strided(), x.rows, w.rows, x.cols, out, w.rows, false, false, room(w));
    return out;
  }

  // gram (m, m) = or += x y'; for y = x, only the lower triangle. x and y (m, k) may be stored transposed, except for
  // oneDNN.
  void add(const Operand<T>& x, const Operand<T>& y, T* gram, bool first) {
    const bool symmetric = x.data == y.data;
    if (gemm_ != Gemm::tiles) return add_panels(x.tensor(), y.tensor(), gram, symmetric, first, gemm_ == Gemm::onednn);
    multiply(x.strided(), y.t().strided(), x.rows, x.rows, x.cols, gram, x.rows, symmetric, !first, room(y));
  }

  // Memory for a result, which is valid until the next product.
  T* result(int64_t numbers) {
    return grow(result_, result_size_, numbers);
  }

 private:
  T* room(const Operand<T>& w) {
    return grow(packed_, packed_size_, packed_size(w.rows, w.cols));
  }

  static T* grow(Tensor& memory, int64_t& size, int64_t numbers) {
    if (size < numbers) {
      memory = fresh(memory, {numbers}, dtype_of<T>());
      size = numbers;
    }
    return data<T>(memory);
  }

  const Gemm gemm_;
  Tensor packed_, result_;
  int64_t packed_size_ = 0, result_size_ = 0;
};

// Partial Grams, one per part of the matrix. The first is the Gram matrix itself.
template <class T>
class PartialGrams {
 public:
  PartialGrams(const Tensor& like, T* gram, int64_t m, int64_t parts) : gram_(gram), m_(m), parts_(parts), rest_(like) {
    if (parts > 1) rest_ = fresh(like, {parts - 1, m, m}, dtype_of<T>());
  }

  T* at(int64_t part) {
    return part == 0 ? gram_ : data<T>(rest_) + (part - 1) * m_ * m_;
  }

  void add_up(bool symmetric) {
    if (parts_ == 1) return;
    in_turns(0, m_, ceil_div(16384, m_ * parts_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t part = 1; part < parts_; ++part) {
          const T* row = at(part) + i * m_;
          for (int64_t j = 0; j < (symmetric ? i + 1 : m_); ++j) gram_[i * m_ + j] += row[j];
        }
    });
  }

 private:
  T* const gram_;
  const int64_t m_, parts_;
  Tensor rest_;
};

// Scales gram, mirrors its lower triangle, and zeroes the diagonal if asked. Returns <gram, other>, which is the sum of
// squares if `other` is gram.
template <class T>
double finish_gram(T* gram, const T* other, int64_t m, T scale, bool zero_diagonal) {
  constexpr int64_t strip = 32;
  const int64_t strips = ceil_div(m, strip);
  std::vector<double> partial(strips);
  auto finish_strip = [&](int64_t s) {
    double total = 0;
    const int64_t i0 = s * strip, i1 = std::min(m, i0 + strip);
    for (int64_t j0 = 0; j0 < i1; j0 += strip) {
      T square[strip * strip];  // written to the other triangle by its rows: down its columns, each line is a miss
      for (int64_t i = i0; i < i1; ++i) {
        T sum = 0;
        T *row = gram + i * m, *copy = square + (i - i0) * strip - j0;
        const T* with = other + i * m;
        const int64_t j1 = std::min(j0 + strip, i);
        for (int64_t j = j0; j < j1; ++j) copy[j] = row[j] *= scale;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = j0; j < j1; ++j) sum += row[j] * with[j];
        total += 2. * sum;
      }
      for (int64_t j = j0; j < std::min(j0 + strip, i1); ++j)
        for (int64_t i = std::max(i0, j + 1); i < i1; ++i) gram[j * m + i] = square[(i - i0) * strip + (j - j0)];
    }
    for (int64_t i = i0; i < i1; ++i) {
      T& diagonal = gram[i * m + i];
      diagonal = zero_diagonal ? diagonal * 0 : diagonal * scale;  // NaN stays NaN
      total += static_cast<double>(diagonal) * other[i * m + i];
    }
    partial[s] = total;
  };
  // each task takes a short strip and a long one, so tasks are equal
  const int64_t pairs = ceil_div(strips, 2);
  in_turns(0, pairs, ceil_div(16, pairs), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      finish_strip(p);
      if (strips - 1 - p != p) finish_strip(strips - 1 - p);
    }
  });
  return sum_of(partial);
}

}  // namespace sslkern
