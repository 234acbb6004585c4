// Cuts a matrix into blocks that stay in cache. The cut depends on the shape alone, so every slice of a stack takes the
// same steps and yields the same bits.
#pragma once

#include "columns.h"
#include "gemm.h"

namespace sslkern {

constexpr int64_t kColumnBlock = 1 << 19;  // elements in a block of columns: 2 MB; it shares L2 and L3 with its product
constexpr int64_t kRowBlock = 3 << 18;     // elements in a block of rows
constexpr int64_t kSmallBlock = 1 << 15;   // elements in a block for tiles: 128 KB in L2, with its product and a Gram
constexpr int64_t kTileRows = 64;          // 64 x 128 fp32 elements are 32 KB, which fits L1
constexpr int64_t kTileCols = 128;
constexpr int64_t kTileNumbers = kTileRows * kTileCols;

// Rows of a tile with this many columns.
inline int64_t tile_height(int64_t cols) {
  return std::clamp<int64_t>(kTileNumbers / cols, 16, kBlockRows);
}

// How the long side of a matrix is cut. It is cut into parts, which run in parallel, and each part into blocks.
// Products by tiles run on one thread each: there are several parts, and their partial Grams take at most half the
// memory of the matrix. A vendor library uses all threads itself: there is one part, and a block is about a third of
// the matrix. The block, its product and the library's packed copies then take less memory than the matrix.
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

// Blocks of columns, with all rows. With fewer than 1024 columns at a time, a vendor library would spend its time on
// adding products up.
inline Cut cut_columns(int64_t n, int64_t d, Gemm gemm) {
  if (gemm == Gemm::tiles) {
    const int64_t width = std::min(kBlockCols, kSmallBlock / n / kTile * kTile);
    return cut_for_tiles(d, n, width, width);
  }
  const int64_t wanted = std::max<int64_t>(kColumnBlock / n, 1024);
  return {d, d, round_up(std::min(wanted, ceil_div(d, 3)), kBlockCols)};
}

// Blocks of rows, with all columns.
inline Cut cut_rows(int64_t n, int64_t d, Gemm gemm) {
  if (gemm == Gemm::tiles) {
    const int64_t height = std::min(kBlockRows, kSmallBlock / d / kTileRows * kTileRows);
    return cut_for_tiles(n, d, height, kBlockRows);
  }
  const int64_t wanted = std::max<int64_t>(kRowBlock / d, 2048);
  // A third, rounded down: a block, its product and the library's scratch, at most half a block, fit into N x D.
  const int64_t third = std::max<int64_t>(kTileRows, n / 3 / kTileRows * kTileRows);
  return {n, n, round_up(std::min(wanted, third), kTileRows)};
}

// A block [begin, end) of the cut, its part, and whether it is the first block of that part.
struct Span {
  int64_t part, begin, end;
  bool first;
};

// Calls f(span, memory, products) for every block. memory[k], for k < count, holds a block with `across` elements per
// row or column.
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
  if (parts == 1) return run(0);  // not in in_turns: parallel regions do not nest
  in_turns(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) run(part);
  });
}

// Calls f(span, block, products) over column blocks of `count` matrices at once; block[k] is (N, columns).
template <class T, class F>
void for_column_blocks(const Tensor& like, int64_t n, const Cut& cut, int count, Gemm gemm, const F& f) {
  for_blocks<T>(like, cut, n, count, gemm,
                [&](const Span& span, const std::vector<Tensor>& memory, Products<T>& products) {
                  std::vector<Operand<T>> block;
                  for (const Tensor& flat : memory) block.push_back({flat, data<T>(flat), n, span.end - span.begin});
                  f(span, block, products);
                });
}

// Calls f(span, block, products) over row blocks; block[k] is (rows, D), stored transposed if `transposed`.
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

// Calls f(part, j0, j1) in parallel for parts of [begin, end) with at most kBlockCols columns each.
template <class F>
void for_column_parts(int64_t begin, int64_t end, int64_t rows, const F& f) {
  const int64_t grain = ceil_div(16384, rows * kBlockCols);
  in_turns(0, ceil_div(end - begin, kBlockCols), grain, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t j0 = begin + part * kBlockCols;
      f(part, j0, std::min(end, j0 + kBlockCols));
    }
  });
}

// Calls f(part, i0, i1) in parallel for the rows [begin, end), cut at the multiples of kBlockRows.
template <class F>
void for_row_parts(int64_t begin, int64_t end, int64_t cols, const F& f) {
  const int64_t first_part = begin / kBlockRows, grain = ceil_div(16384, cols * kBlockRows);
  in_turns(first_part, ceil_div(end, kBlockRows), grain, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      f(part, std::max(begin, part * kBlockRows), std::min(end, (part + 1) * kBlockRows));
  });
}

}  // namespace sslkern
