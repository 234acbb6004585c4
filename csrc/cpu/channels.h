// Walks over the channels of x, (M, C) or (N, C, L), in memory order. Long runs of one channel are planes. Everything
// else is columns: M rows of C columns, or N rows of C * L columns, of which L form a channel.
#pragma once

#include "../common.h"
#include "column_loops.h"

namespace sslkern {

constexpr int64_t kColumnChunk = 1 << 16;  // elements of a block of columns: it stays in L2 for a second pass
constexpr int64_t kPilot = 32;             // rows of the first piece; its mean is the pivot of the next
constexpr int64_t kPiece = 4096;           // elements of a piece of a plane: it stays in L1
constexpr int64_t kMapRows = 32;           // rows per piece of a map
constexpr int64_t kLine = 64;              // least width of a block of columns, where the width can be chosen
constexpr int64_t kShortPlane = 64;        // elements; shorter runs are treated as columns
constexpr int64_t kInOrder = 256 << 10;    // bytes that a thread writes in sequence
constexpr int64_t kTasks = 64;             // parallel tasks for a large x; their results are merged in order
constexpr int64_t kFused = 4 << 20;        // largest x, in bytes, for which two passes share one parallel region

struct Layout : Channels {
  bool planes;

  explicit Layout(const Tensor& x) : Channels(channels_of(x)), planes(length >= kShortPlane) {}

  int64_t width() const {
    return channels * length;
  }
  int64_t count() const {
    return rows * length;
  }
  // Number of separate means: one per channel for planes, one per column otherwise.
  int64_t sums() const {
    return planes ? channels : width();
  }
  // Number of narrow rows that a map processes as one row, with the coefficients of the channels repeated.
  int64_t fold() const {
    return length == 1 ? std::max<int64_t>(1, kBlockCols / width()) : 1;
  }
  int64_t columns_per_channel() const {
    return planes ? 1 : length;
  }
  int64_t unit() const {
    return planes ? ceil_div(channels, ceil_div(kTasks, rows)) : std::min(kBlockCols, width());
  }
  int64_t units() const {
    return ceil_div(sums(), unit());
  }
  int64_t chunk_rows() const {
    return planes ? 1 : std::clamp<int64_t>(kColumnChunk / unit(), 128, 512);
  }
  // Rows per part. The parts have one size, so that threads share them evenly: 7 parts of 512 rows would give one of
  // two threads 2/3 of 3136 rows.
  int64_t part_rows() const {
    const int64_t wanted = ceil_div(rows, ceil_div(kTasks, units()));
    if (planes) return wanted;
    const int64_t parts = ceil_div(rows, std::max(wanted, 4 * chunk_rows()));
    return parts == 1 ? rows : round_up(ceil_div(rows, round_up(parts, 4)), 4);
  }
  int64_t parts() const {
    return ceil_div(rows, part_rows());
  }
};

// Rows [row0, row1) of sums [begin, end): planes of some channels, or a block of columns.
struct Range {
  int64_t part, row0, row1, begin, end;
};

// Calls f(range) in parallel, with `parts()` ranges for every sum.
template <class F>
void for_ranges(const Layout& v, const F& f) {
  const int64_t step = v.part_rows(), units = v.units(), unit = v.unit();
  const int64_t numbers = std::min(step, v.rows) * unit * (v.planes ? v.length : 1);
  in_turns(0, v.parts() * units, ceil_div(16384, numbers), [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t part = task / units, begin = task % units * unit;
      f(Range{part, part * step, std::min(v.rows, (part + 1) * step), begin, std::min(v.sums(), begin + unit)});
    }
  });
}

// Calls f(range) in parallel, where a range has all rows of its channels. This serves passes that need the sums of the
// pass before. Returns false, without any call, if x is too large or too narrow.
template <class F>
bool for_whole_channels(const Layout& v, int64_t bytes, const F& f) {
  const int64_t unit = v.planes ? 1 : std::min(kBlockCols, round_up(ceil_div(v.channels, 8), kLine));
  const int64_t units = ceil_div(v.channels, unit);
  if (!(v.planes || v.length == 1) || units < 4 || v.count() * v.channels * bytes > kFused) return false;
  in_turns(0, units, ceil_div(16384, v.count() * unit), [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) f(Range{0, 0, v.rows, k * unit, std::min(v.channels, (k + 1) * unit)});
  });
  return true;
}

// Position of a piece: `rows` rows of `cols` elements, `ld` apart.
struct Piece {
  int64_t offset, rows, cols, ld;
};

// Calls f(piece, sum) over a range in memory order. A piece fits L1 or L2. It is a block of rows whose first column is
// `sum` (the first piece has few rows), or a run of one plane of channel `sum`.
template <class F>
void for_pieces(const Layout& v, const Range& r, const F& f) {
  if (!v.planes) {
    for (int64_t i = r.row0, rows = kPilot; i < r.row1; i += rows, rows = v.chunk_rows())
      f(Piece{i * v.width() + r.begin, std::min(rows, r.row1 - i), r.end - r.begin, v.width()}, r.begin);
    return;
  }
  for (int64_t i = r.row0; i < r.row1; ++i)
    for (int64_t c = r.begin; c < r.end; ++c)
      for (int64_t k = 0; k < v.length; k += kPiece) {
        const int64_t cols = std::min(kPiece, v.length - k);
        f(Piece{(i * v.channels + c) * v.length + k, 1, cols, cols}, c);
      }
}

// Calls f(piece, channel) in parallel and in memory order, for elementwise maps. Each thread writes whole huge pages: a
// half-written one would go to memory and come back. For (M, C), a piece is a block of rows whose first column is
// `channel`. For (N, C, L), it is `rows` runs of `cols` elements, one per channel from `channel` on.
template <class F>
void for_pieces_in_order(const Layout& v, int64_t bytes, const F& f) {
  if (v.length == 1) {
    const int64_t fold = v.fold(), width = fold * v.channels, rows = v.rows / fold;
    const int64_t grain = std::max<int64_t>(1, kInOrder / (kMapRows * width * bytes));
    in_turns(0, ceil_div(rows, kMapRows), grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first * kMapRows; i < std::min(rows, last * kMapRows); i += kMapRows)
        for (int64_t j = 0; j < width; j += kBlockCols)
          f(Piece{i * width + j, std::min(kMapRows, rows - i), std::min(kBlockCols, width - j), width}, j);
    });
    const int64_t rest = v.rows - rows * fold;
    if (rest > 0) f(Piece{rows * width, rest, v.channels, v.channels}, 0);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kInOrder / (v.length * bytes));
  in_turns(0, v.rows * v.channels, grain, [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last;) {
      const int64_t channel = run % v.channels, runs = std::max<int64_t>(1, kPiece / v.length);
      const int64_t rows = std::min({last - run, v.channels - channel, runs});
      for (int64_t k = 0; k < v.length; k += kPiece) {
        const int64_t cols = std::min(kPiece, v.length - k);
        f(Piece{run * v.length + k, rows, cols, cols}, channel);
      }
      run += rows;
    }
  });
}

// One value per column of a range, expanded from one per channel.
template <class T>
struct PerColumn {
  T spread[kBlockCols];
  const T* values;

  PerColumn(const Layout& v, const T* channel, const Range& r) : values(channel + r.begin) {
    if (v.columns_per_channel() == 1) return;
    values = spread;
    for (int64_t k = r.begin; k < r.end;) {
      const int64_t c = k / v.length, end = std::min(r.end, (c + 1) * v.length);
      std::fill(spread + (k - r.begin), spread + (end - r.begin), channel[c]);
      k = end;
    }
  }
};

}  // namespace sslkern
