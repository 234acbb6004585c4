// The order in which threads process pairs of blocks.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>

#include "../common.h"

namespace sslkern {

// Calls f(i, j) for the pairs (i, j) = pair(k), k in [0, count). i and j index `things`; i < 0 marks an empty slot.
// Pairs that share a thing run one at a time and in the order of k, for any number of threads. A free thread takes the
// next pair and waits for the earlier pairs that share a thing with it, all of which are in progress. A barrier would
// make all threads wait for the slowest.
template <class Pair, class F>
void for_each_in_order(int64_t count, int64_t things, int64_t work, const Pair& pair, const F& f) {
  std::mutex taking;
  int64_t next = 0;
  std::vector<int64_t> taken(things);
  std::vector<std::atomic<int64_t>> done(things);
  std::atomic<bool> failed{false};
  const auto await = [&](int64_t thing, int64_t turn) {
    for (int spins = 0; done[thing].load(std::memory_order_acquire) < turn && !failed; ++spins)
      if (spins > 1000) std::this_thread::yield();
  };
  in_parallel(count, work, [&](int64_t, int64_t) {
    try {
      while (!failed) {
        std::unique_lock lock(taking);
        if (next == count) return;
        const auto [i, j] = pair(next++);
        if (i < 0) continue;
        const int64_t turn_i = taken[i]++, turn_j = i == j ? turn_i : taken[j]++;
        lock.unlock();
        await(i, turn_i);
        await(j, turn_j);
        if (!failed) f(i, j);
        done[i].fetch_add(1, std::memory_order_release);
        if (i != j) done[j].fetch_add(1, std::memory_order_release);
      }
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

// Calls f(i, j) for all pairs of `nx` and `ny` blocks; with `self_pairs`, for the pairs i <= j of one side. The pairs
// come in rounds, and within a round every block appears in at most one pair.
template <class F>
void for_pairs(int64_t nx, int64_t ny, bool self_pairs, int64_t work, const F& f) {
  using Two = std::pair<int64_t, int64_t>;
  if (self_pairs) {
    const int64_t half = ceil_div(nx, 2), others = 2 * half - 1;  // round-robin: one block stays, the others rotate
    const auto pair = [&](int64_t k) -> Two {
      if (k < nx) return {k, k};
      const int64_t round = (k - nx) / half, place = (k - nx) % half;
      const int64_t a = place == 0 ? others : (round + place) % others, b = (round - place + others) % others;
      return a < nx && b < nx ? Two{std::min(a, b), std::max(a, b)} : Two{-1, -1};
    };
    return for_each_in_order(nx + (nx > 1 ? others * half : 0), nx, work, pair, f);
  }
  const int64_t few = std::min(nx, ny), many = std::max(nx, ny);
  const auto pair = [&](int64_t k) -> Two { return {k % few, few + (k / few + k % few) % many}; };
  for_each_in_order(few * many, few + many, work, pair,
                    [&](int64_t a, int64_t b) { nx == few ? f(a, b - few) : f(b - few, a); });
}

}  // namespace sslkern
