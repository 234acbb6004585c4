// Blocks of a matrix in cache: how they are cut, centred, and written back as a gradient. The cut depends on the shape
// alone, so every slice of a stack takes the same steps and yields the same bits.
#pragma once

#include "columns.h"
#include "gemm.h"

namespace sslkern {

constexpr int64_t kColumnBlock = 1 << 19;  // numbers in a block of columns: 2 MB, beside its product in L2 and L3
constexpr int64_t kRowBlock = 3 << 18;     // numbers in a block of rows
constexpr int64_t kSmallBlock = 1 << 15;   // numbers in a block for tiles: 128 KB, beside its product and a Gram in L2
constexpr int64_t kTileRows = 64;          // 64 x 128 fp32 numbers are 32 KB: L1
constexpr int64_t kTileCols = 128;
constexpr int64_t kTileNumbers = kTileRows * kTileCols;

// Rows of a tile of so many columns.
inline int64_t tile_height(int64_t cols) {
  return std::clamp<int64_t>(kTileNumbers / cols, 16, kBlockRows);
}

// How the long side of a matrix is cut: into parts, each a thread's own, and these into blocks. For tiles the threads
// share the parts out, and the sums of all parts are no more than half of the matrix. A vendor library uses all threads
// in one part, whose blocks are about a third of the matrix: with their product, and what the library packs, less than
// the whole.
struct Cut {
  int64_t total, part, block;

  int64_t parts() const {
    return ceil_div(total, part);
  }
};

inline Cut cut_for_tiles(int64_t total, int64_t m, int64_t block, int64_t whole) {
  const int64_t parts = std::clamp<int64_t>(total / (2 * m), 1, 64);
  return {total, round_up(ceil_div(total, parts), whole), block};
}

// Columns, all rows of them. Fewer than 1024 at a time would spend a vendor library's time on adding products up.
inline Cut cut_columns(int64_t n, int64_t d, Gemm gemm) {
  if (gemm == Gemm::tiles) {
    const int64_t width = std::min(kBlockCols, kSmallBlock / n / kTile * kTile);
    return cut_for_tiles(d, n, width, width);
  }
  const int64_t wanted = std::max<int64_t>(kColumnBlock / n, 1024);
  return {d, d, round_up(std::min(wanted, ceil_div(d, 3)), kBlockCols)};
}

// Rows, all columns of them.
inline Cut cut_rows(int64_t n, int64_t d, Gemm gemm) {
  if (gemm == Gemm::tiles) {
    const int64_t height = std::min(kBlockRows, kSmallBlock / d / kTileRows * kTileRows);
    return cut_for_tiles(n, d, height, kBlockRows);
  }
  const int64_t wanted = std::max<int64_t>(kRowBlock / d, 2048);
  // A third, rounded down: a block, its product and the library's scratch, which may be half of one, fit into N x D
  const int64_t third = std::max<int64_t>(kTileRows, n / 3 / kTileRows * kTileRows);
  return {n, n, round_up(std::min(wanted, third), kTileRows)};
}

// A block of the cut: which part it belongs to, whether it is that part's first, and its range.
struct Span {
  int64_t part, begin, end;
  bool first;
};

// f(span, memory, products) for every block, with memory[k] for `count` blocks of `across` numbers per row or column.
template <class T, class F>
void for_blocks(const Tensor& like, const Cut& cut, int64_t across, int count, Gemm gemm, const F& f) {
  const int64_t parts = cut.parts(), numbers = across * std::min(cut.block, cut.total);
  auto run = [&](int64_t part) {
    Products<T> products(like, gemm);
    std::vector<Tensor> memory;
    for (int k = 0; k < count; ++k) memory.push_back(fresh(like, {numbers}, dtype_of<T>()));
    const int64_t first = part * cut.part, last = std::min(cut.total, first + cut.part);
    for (int64_t begin = first; begin < last; begin += cut.block)
      f(Span{part, begin, std::min(last, begin + cut.block), begin == first}, memory, products);
  };
  if (parts == 1) return run(0);  // not in parallel_for, where nothing else may be parallel
  stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) run(part);
  });
}

// f(span, block, products) over column blocks: block[k] is (N, columns), for `count` matrices at once.
template <class T, class F>
void for_column_blocks(const Tensor& like, int64_t n, const Cut& cut, int count, Gemm gemm, const F& f) {
  for_blocks<T>(like, cut, n, count, gemm,
                [&](const Span& span, const std::vector<Tensor>& memory, Products<T>& products) {
                  std::vector<Operand<T>> block;
                  for (const Tensor& flat : memory) block.push_back({flat, data<T>(flat), n, span.end - span.begin});
                  f(span, block, products);
                });
}

// f(span, block, products) over row blocks: block[k] is (rows, D), which lies transposed where `transposed`.
template <class T, class F>
void for_row_blocks(const Tensor& like, int64_t d, const Cut& cut, int count, Gemm gemm, bool transposed, const F& f) {
  for_blocks<T>(like, cut, d, count, gemm,
                [&](const Span& span, const std::vector<Tensor>& memory, Products<T>& products) {
                  std::vector<Operand<T>> block;
                  for (const Tensor& flat : memory)
                    block.push_back({flat, data<T>(flat), span.end - span.begin, d, transposed});
                  f(span, block, products);
                });
}

// f(part, j0, j1) in parallel over parts of at most kBlockCols columns of [begin, end).
template <class F>
void for_column_parts(int64_t begin, int64_t end, int64_t rows, const F& f) {
  const int64_t grain = ceil_div(16384, rows * kBlockCols);
  stable::parallel_for(0, ceil_div(end - begin, kBlockCols), grain, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t j0 = begin + part * kBlockCols;
      f(part, j0, std::min(end, j0 + kBlockCols));
    }
  });
}

// f(part, i0, i1) in parallel over the rows of [begin, end), cut at the multiples of kBlockRows.
template <class F>
void for_row_parts(int64_t begin, int64_t end, int64_t cols, const F& f) {
  const int64_t first_part = begin / kBlockRows, grain = ceil_div(16384, cols * kBlockRows);
  stable::parallel_for(first_part, ceil_div(end, kBlockRows), grain, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      f(part, std::max(begin, part * kBlockRows), std::min(end, (part + 1) * kBlockRows));
  });
}

// Sums over the rows of a matrix whose columns are walked in pieces, in any order, by any number of threads: a sum per
// row and piece, and these added up in the order of the columns. No thread's share and no library's order is in them.
template <class T>
class RowPowers {
 public:
  RowPowers(int64_t n, const Cut& cut)
      : n_(n),
        width_(std::min(cut.block, kBlockCols)),
        pieces_(ceil_div(cut.total, width_)),
        square_(room_for<T>(n * pieces_)),
        fourth_(pieces_) {}

  // Columns [j0, j0 + cols) of the centred matrix, one piece of the cut.
  void add(int64_t j0, const T* x, int64_t ld, int64_t cols) {
    const int64_t piece = j0 / width_;
    double fourth = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const Powers<T> sums = powers(x + i * ld, cols);
      square_[piece * n_ + i] = sums.second;
      fourth += sums.fourth;
    }
    fourth_[piece] = fourth;
  }

  void squares(T* row_sq) const {
    for (int64_t i = 0; i < n_; ++i) {
      double total = 0;
      for (int64_t piece = 0; piece < pieces_; ++piece) total += square_[piece * n_ + i];
      row_sq[i] = static_cast<T>(total);
    }
  }

  double fourth_powers() const {
    return sum_of(fourth_);
  }

 private:
  const int64_t n_, width_, pieces_;
  const std::unique_ptr<T[]> square_;
  std::vector<double> fourth_;
};

// Means and variances of columns [j0, j1), their centred values into `block` (N, j1 - j0), and the sums of its rows'
// powers where they are wanted.
template <class T>
void centre_block(const Matrix& z, int64_t j0, int64_t j1, T* high, T* low, T* variance, T* block,
                  RowPowers<T>* powers) {
  const int64_t ld = j1 - j0;
  for_column_parts(j0, j1, z.rows, [&](int64_t, int64_t k0, int64_t k1) {
    T* out = block + (k0 - j0);
    centre_columns(z, k0, k1, high + k0, low + k0, variance + k0, out, ld);
    if (powers != nullptr) powers->add(k0, out, ld, k1 - k0);
  });
}

// Columns [j0, j1), centred, and scaled where a scale is given, into `block`.
template <class T>
void recentre_block(const Matrix& z, int64_t j0, int64_t j1, const T* high, const T* low, const T* scale, T* block) {
  const int64_t ld = j1 - j0;
  for_column_parts(j0, j1, z.rows, [&](int64_t, int64_t k0, int64_t k1) {
    std::vector<T> scratch;
    T ignored[kBlockCols] = {};
    for (int64_t i0 = 0; i0 < z.rows; i0 += kBlockRows) {
      const int64_t i1 = std::min(z.rows, i0 + kBlockRows);
      int64_t x_ld;
      const T* x = tile(z, i0, i1, k0, k1, scratch, x_ld);
      T* out = block + i0 * ld + (k0 - j0);
      centre(x, x_ld, i1 - i0, k1 - k0, high + k0, low + k0, out, ld, ignored);
      if (scale != nullptr) scale_rows(out, ld, i1 - i0, k1 - k0, scale + k0);
    }
  });
}

// Column means of x o y, (rows, cols) each with row stride ld.
template <class T>
void column_means_of_product(const T* x, const T* y, int64_t ld, int64_t rows, int64_t cols, T* mean) {
  double total[kBlockCols] = {};
  for (int64_t i0 = 0; i0 < rows; i0 += kBlockRows) {
    T part[kBlockCols] = {};
    dot_rows(x + i0 * ld, y + i0 * ld, ld, std::min(kBlockRows, rows - i0), cols, part);
    for (int64_t j = 0; j < cols; ++j) total[j] += part[j];
  }
  for (int64_t j = 0; j < cols; ++j) mean[j] = static_cast<T>(total[j] / rows);
}

// mean_i (|z_i|^2 z_ij - z_ij^3) of a centred (N, cols) block.
template <class T>
void cubic_means(const T* block, int64_t n, int64_t cols, const T* row_sq, T* mean) {
  for_column_parts(0, cols, n, [&](int64_t, int64_t k0, int64_t k1) {
    double total[kBlockCols] = {};
    for (int64_t i0 = 0; i0 < n; i0 += kBlockRows) {
      T part[kBlockCols] = {};
      cubic_rows(block + i0 * cols + k0, cols, std::min(kBlockRows, n - i0), k1 - k0, row_sq + i0, part);
      for (int64_t j = 0; j < k1 - k0; ++j) total[j] += part[j];
    }
    for (int64_t j = k0; j < k1; ++j) mean[j] = static_cast<T>(total[j - k0] / n);
  });
}

// Column totals of per-part sums (parts, D), in the order of the parts.
template <class T>
void add_parts(const T* parts, int64_t count, int64_t d, std::vector<double>& total) {
  total.assign(d, 0.);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t j = 0; j < d; ++j) total[j] += parts[p * d + j];
}

// The passes over a tall matrix, in parallel over its rows; `sums` holds one row of partial sums per part.
template <class T>
class RowPass {
 public:
  RowPass(const Tensor& like, const Matrix& z, T* high, T* low)
      : z_(z), high_(high), low_(low), sums_(fresh(like, {parts(), z.cols}, dtype_of<T>())), fourth_(parts()) {}

  void means() {
    std::vector<T> scratch, pivot(z_.cols);
    int64_t ld;
    std::copy_n(tile(z_, 0, 1, 0, z_.cols, scratch, ld), z_.cols, pivot.begin());
    each_tile(0, z_.rows, [&](const T* x, int64_t ld, int64_t, int64_t rows, int64_t j0, int64_t cols, T* sum) {
      add_sums(x, ld, rows, cols, pivot.data() + j0, sum);
    });
    add_parts(data<T>(sums_), parts(), z_.cols, total_);
    split_mean(pivot.data(), total_.data(), z_.cols, z_.rows, high_, low_);
  }

  // Rows [i0, i1), centred, and scaled where a scale is given, into a block (i1 - i0, D). The squares of the
  // centred values are summed on the way, and where row_sq is given its rows and the fourth powers too.
  void centre(int64_t i0, int64_t i1, const T* scale, const Operand<T>& block, T* row_sq) {
    const int64_t d = z_.cols, height = i1 - i0;
    const bool transpose = block.transposed;
    each_tile(i0, i1, [&](const T* x, int64_t ld, int64_t i, int64_t rows, int64_t j0, int64_t cols, T* sum) {
      T small[kTileNumbers];
      T* out = transpose ? small : block.data + (i - i0) * d + j0;
      const int64_t out_ld = transpose ? cols : d;
      sslkern::centre(x, ld, rows, cols, high_ + j0, low_ + j0, out, out_ld, sum);
      for (int64_t r = 0; row_sq != nullptr && r < rows; ++r) {
        const Powers<T> sums = powers(out + r * out_ld, cols);
        row_sq[i + r] = (j0 == 0 ? T(0) : row_sq[i + r]) + sums.second;
        fourth_[i / kBlockRows] += sums.fourth;
      }
      if (scale != nullptr) scale_rows(out, out_ld, rows, cols, scale + j0);
      if (!transpose) return;
      for (int64_t j = 0; j < cols; ++j)
        for (int64_t r = 0; r < rows; ++r) block.data[(j0 + j) * height + (i - i0) + r] = small[r * cols + j];
    });
  }

  void cubic_means(const T* row_sq, T* mean) {
    each_tile(0, z_.rows, [&](const T* x, int64_t ld, int64_t i, int64_t rows, int64_t j0, int64_t cols, T* sum) {
      T small[kTileNumbers], ignored[kTileCols] = {};
      sslkern::centre(x, ld, rows, cols, high_ + j0, low_ + j0, small, cols, ignored);
      cubic_rows(small, cols, rows, cols, row_sq + i, sum);
    });
    add_parts(data<T>(sums_), parts(), z_.cols, total_);
    for (int64_t j = 0; j < z_.cols; ++j) mean[j] = static_cast<T>(total_[j] / z_.rows);
  }

  void variances(T* variance) {
    add_parts(data<T>(sums_), parts(), z_.cols, total_);
    for (int64_t j = 0; j < z_.cols; ++j) variance[j] = static_cast<T>(total_[j] / (z_.rows - 1));
  }

  double fourth_powers() const {
    return sum_of(fourth_);
  }

 private:
  int64_t parts() const {
    return ceil_div(z_.rows, kBlockRows);
  }

  // f(x, ld, i, rows, j0, cols, sum) over tiles; `sum` is zeroed at the head of a part and belongs to it.
  template <class F>
  void each_tile(int64_t begin, int64_t end, const F& f) {
    for_row_parts(begin, end, z_.cols, [&](int64_t part, int64_t i0, int64_t i1) {
      std::vector<T> scratch;
      T* sums = data<T>(sums_) + part * z_.cols;
      if (i0 == part * kBlockRows) {
        std::fill_n(sums, z_.cols, T(0));
        fourth_[part] = 0;
      }
      const int64_t height = tile_height(std::min(z_.cols, kTileCols));
      for (int64_t i = i0; i < i1; i += height) {
        const int64_t rows = std::min(height, i1 - i);
        for (int64_t j0 = 0; j0 < z_.cols; j0 += kTileCols) {
          const int64_t cols = std::min(kTileCols, z_.cols - j0);
          int64_t ld;
          const T* x = tile(z_, i, i + rows, j0, j0 + cols, scratch, ld);
          f(x, ld, i, rows, j0, cols, sums + j0);
        }
      }
    });
  }

  const Matrix z_;
  T* const high_;
  T* const low_;
  const Tensor sums_;
  std::vector<double> fourth_, total_;
};

// Tiles of a gradient: written in place where it is a T already, rounded from a buffer otherwise.
template <class T>
class TileWriter {
 public:
  explicit TileWriter(const Matrix& grad) : grad_(grad), in_place_(grad.dtype == dtype_of<T>()) {}

  T* at(int64_t i, int64_t j, int64_t rows, int64_t cols, int64_t& ld) {
    ld = in_place_ ? grad_.row_stride : cols;
    if (in_place_) return reinterpret_cast<T*>(grad_.at(i, j));
    buffer_.resize(rows * cols);
    return buffer_.data();
  }

  void flush(int64_t i, int64_t j, int64_t rows, int64_t cols) {
    if (in_place_) return;
    if (grad_.dtype == ScalarType::BFloat16) return store<BFloatBits>(i, j, rows, cols);
    store<HalfBits>(i, j, rows, cols);
  }

 private:
  template <class To>
  void store(int64_t i, int64_t j, int64_t rows, int64_t cols) {
    convert_rows(buffer_.data(), cols, rows, cols, reinterpret_cast<To*>(grad_.at(i, j)), grad_.row_stride);
  }

  const Matrix grad_;
  const bool in_place_;
  std::vector<T> buffer_;
};

// f(i, j, rows, cols) over tiles of rows [begin, end) and columns [j0, j1).
template <class F>
void for_tiles(int64_t begin, int64_t end, int64_t j0, int64_t j1, const F& f) {
  for (int64_t j = j0; j < j1; j += kBlockCols) {  // few enough columns for their coefficients to stay in L1
    const int64_t cols = std::min(kBlockCols, j1 - j), height = tile_height(cols);
    for (int64_t i = begin; i < end; i += height) f(i, j, std::min(height, end - i), cols);
  }
}

// sum_ij (a_ij - b_ij)^2, a partial sum for every few rows
template <class T>
double squared_distance(const Matrix& a, const Matrix& b) {
  const int64_t height = std::clamp<int64_t>(16384 / a.cols, 1, kBlockRows);
  std::vector<double> partial(ceil_div(a.rows, height));
  stable::parallel_for(0, ceil_div(a.rows, height), 1, [&](int64_t first, int64_t last) {
    std::vector<T> scratch_a, scratch_b;
    for (int64_t part = first; part < last; ++part) {
      const int64_t i0 = part * height, rows = std::min(height, a.rows - i0);
      int64_t ld, other_ld;
      const T* x = tile(a, i0, i0 + rows, 0, a.cols, scratch_a, ld);
      const T* y = tile(b, i0, i0 + rows, 0, a.cols, scratch_b, other_ld);
      const int64_t fold = rows_in_fold(rows, a.cols, ld == a.cols && other_ld == a.cols);
      for (int64_t r = 0; r < rows; r += fold)
        partial[part] += distance_row(x + r * ld, y + r * other_ld, std::min(fold, rows - r) * a.cols);
    }
  });
  return sum_of(partial);
}

}  // namespace sslkern
