// Runs CUDA kernels on a CPU. A thread of a block is a fiber, which runs until it waits, at a barrier or a warp
// operation, or returns; then the first ready one in the chosen order runs. Blocks follow one another, in that order
// too. What a kernel does wrong is a std::runtime_error from its launch, and the next launch starts afresh.
//
// Not supported: -fsanitize, which does not follow the switches of stacks; threads and blocks that spin until another
// one has written; launches from two CPU threads at a time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "vector_types.h"

namespace simulator {

enum class Order { kAscending, kDescending, kRandom };

class Machine {
 public:
  dim3 grid, block;
  uint3 block_index{}, thread_index{};

  void set_order(Order order, unsigned seed) {
    order_ = order;
    random_.seed(seed);
  }

  void launch(const dim3& grid_size, const dim3& block_size, size_t shared_bytes, const std::function<void()>& kernel) {
    grid = grid_size;
    block = block_size;
    size_ = block.x * block.y * block.z;
    kernel_ = &kernel;
    while (threads_.size() < size_) start();
    try {
      for (const size_t b : ordered(static_cast<size_t>(grid.x) * grid.y * grid.z)) {
        block_index = index(b, grid);
        run_block(shared_bytes);
      }
    } catch (...) {
      abandon();
      throw;
    }
    current_ = nullptr;
  }

  Thread& self() {
    if (!current_) throw std::runtime_error("what belongs in a kernel was called outside of one");
    return *current_;
  }
  unsigned char* shared_memory() {
    self();
    return shared_.front().bytes;
  }
  void barrier(const Place& place) {
    wait(State::kAtBarrier, place);
  }
  // Waits for the other lanes of the mask; with a source, `received` is what that lane gave.
  const Thread& meet(const Place& place, unsigned mask, int source = -1, uint64_t given = 0) {
    Thread& t = self();
    t.place = place;
    if (!(mask >> t.lane() & 1)) throw failure(t, place.text() + " has a mask without the thread that calls it");
    t.mask = mask;
    t.source = source;
    t.given = given;
    wait(State::kAtWarp, place);
    return t;
  }
  std::runtime_error failure(const Thread& t, const std::string& what) const {
    return std::runtime_error("block " + text(block_index) + ", thread " + text(t.index) + ": " + what);
  }

 private:
  struct Abandoned {};  // unwinds a fiber whose launch has failed
  struct alignas(128) Line {
    unsigned char bytes[128];
  };

  Order order_ = Order::kAscending;
  std::mt19937 random_;
  std::deque<Thread> threads_;  // kept for the next launch; a block takes the first ones
  unsigned size_ = 0;
  std::vector<Line> shared_;
  const std::function<void()>* kernel_ = nullptr;
  Thread* current_ = nullptr;
  jmp_buf scheduler_;
  std::exception_ptr thrown_;
  bool abandoning_ = false;

  static uint3 index(size_t rank, const dim3& size) {
    return make_uint3(rank % size.x, rank / size.x % size.y, rank / size.x / size.y);
  }

  std::vector<size_t> ordered(size_t count) {
    std::vector<size_t> ranks(count);
    std::iota(ranks.begin(), ranks.end(), size_t(0));
    if (order_ == Order::kDescending) std::reverse(ranks.begin(), ranks.end());
    if (order_ == Order::kRandom) std::shuffle(ranks.begin(), ranks.end(), random_);
    return ranks;
  }

  void start();

  void fiber() {
    Thread& t = *current_;
    for (;;) {
      t.state = State::kReturned;
      jump(t.registers, scheduler_);
      if (abandoning_) continue;
      try {
        (*kernel_)();
      } catch (const Abandoned&) {
      } catch (...) {
        thrown_ = std::current_exception();
      }
    }
  }

  void wait(State state, const Place& place) {
    Thread& t = self();
    t.state = state;
    t.place = place;
    jump(t.registers, scheduler_);
    if (abandoning_) throw Abandoned();
  }

  void resume(Thread& t) {
    current_ = &t;
    thread_index = t.index;
    jump(scheduler_, t.registers);
    if (!whole(t.stack.get(), kGuardBytes)) {
      std::memset(t.stack.get(), kPoison, kGuardBytes);
      throw failure(t, "more than " + std::to_string(kStackBytes) + " bytes on its stack");
    }
    if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
  }

  void abandon() {
    abandoning_ = true;
    for (Thread& t : threads_) {
      current_ = &t;
      if (t.state != State::kReturned) jump(scheduler_, t.registers);
    }
    abandoning_ = false;
    current_ = nullptr;
    thrown_ = nullptr;
  }

  static bool whole(const unsigned char* poisoned, size_t bytes) {
    return poisoned[0] == kPoison && std::memcmp(poisoned, poisoned + 1, bytes - 1) == 0;
  }

  void run_block(size_t shared_bytes) {
    shared_.resize(shared_bytes / sizeof(Line) + 2);  // a line or more that the kernel has not asked for
    std::memset(shared_.data(), kPoison, shared_.size() * sizeof(Line));
    for (unsigned rank = 0; rank < size_; ++rank) {
      threads_[rank].index = index(rank, block);
      threads_[rank].state = State::kReady;
    }
    do {
      while (run_ready()) continue;
    } while (release_barrier());
    if (!whole(shared_.front().bytes + shared_bytes, shared_.size() * sizeof(Line) - shared_bytes))
      throw std::runtime_error("block " + text(block_index) + " wrote past the " + std::to_string(shared_bytes) +
                               " bytes of its shared memory");
  }

  // Starts over as soon as a warp may go on, so that warps get ahead of each other as far as barriers let them.
  bool run_ready() {
    bool ran = false;
    for (const size_t rank : ordered(size_)) {
      Thread& t = threads_[rank];
      if (t.state != State::kReady) continue;
      ran = true;
      resume(t);
      if (release_warp(t.rank - t.lane())) break;
    }
    return ran;
  }

  // Whether `b` is where `a`, which waits, needs it. Stricter than CUDA: at a barrier no thread may have returned, and
  // threads meet in one line of the source.
  static bool meets(const Thread& a, const Thread& b) {
    const bool together = b.state == a.state && b.place == a.place;
    if (a.state == State::kAtBarrier) return together;
    return a.rank / kWarp != b.rank / kWarp || !(a.mask >> b.lane() & 1) || b.state == State::kReturned ||
           (together && b.mask == a.mask);
  }

  bool release_warp(unsigned first) {
    const auto begin = threads_.begin() + first, end = threads_.begin() + std::min(first + kWarp, size_);
    bool released = false;
    for (auto a = begin; a != end; ++a) {
      if (a->state != State::kAtWarp || !std::all_of(begin, end, [&](Thread& b) { return meets(*a, b); })) continue;
      unsigned members = 0, ballot = 0;
      for (auto b = begin; b != end; ++b) {
        if (b->state != State::kAtWarp || !(a->mask >> b->lane() & 1)) continue;
        members |= 1u << b->lane();
        if (b->given != 0) ballot |= 1u << b->lane();
      }
      for (auto b = begin; b != end; ++b) {
        if (!(members >> b->lane() & 1)) continue;
        if (b->source >= 0 && !(members >> b->source & 1))
          throw failure(*b, b->place.text() + " reads lane " + std::to_string(b->source) + ", which takes no part");
        if (b->source >= 0) b->received = begin[b->source].given;
        b->ballot = ballot;
        b->state = State::kReady;
      }
      released = true;
    }
    return released;
  }

  // False where all threads have returned.
  bool release_barrier() {
    const auto begin = threads_.begin(), end = begin + size_;
    const auto a = std::find_if(begin, end, [](Thread& t) { return t.state != State::kReturned; });
    if (a == end) return false;
    const auto b = std::find_if(begin, end, [&](Thread& t) { return !meets(*a, t); });
    if (b != end) {
      const bool masks = a->state == State::kAtWarp && b->state == State::kAtWarp && a->mask != b->mask;
      throw failure(*a, "waits at " + a->place.text() + " for thread " + text(b->index) + ", which " +
                            (b->state == State::kReturned ? "has returned" : "waits at " + b->place.text()) +
                            (masks ? " with another mask" : ""));
    }
    std::for_each(begin, end, [](Thread& t) { t.state = State::kReady; });
    return true;
  }
};

inline Machine machine;

inline void Machine::start() {
  Thread& t = threads_.emplace_back();
  t.rank = threads_.size() - 1;
  t.stack.reset(new unsigned char[kGuardBytes + kStackBytes]);
  std::memset(t.stack.get(), kPoison, kGuardBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = t.stack.get() + kGuardBytes;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, [] { machine.fiber(); }, 0);
  current_ = &t;
  if (_setjmp(scheduler_) == 0) setcontext(&context);
}

inline unsigned char* shared_memory() {
  return machine.shared_memory();
}

}  // namespace simulator
