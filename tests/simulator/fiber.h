// A thread of a simulated block, as a fiber: its state, its stack, the place where it waits; and the switch of fibers.
#pragma once

#include <setjmp.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "vector_types.h"

namespace simulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10, kGuardBytes = 4 << 10;  // the guard lies below the stack
constexpr unsigned char kPoison = 0xff;                          // NaN in every floating-point type

enum class State { kReady, kAtBarrier, kAtWarp, kReturned };

// Where a kernel calls an intrinsic. As a default argument it holds the line of that call.
struct Place {
  std::string_view file, name;
  int line;

  Place(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
  Place of(const char* intrinsic) const {
    Place place = *this;
    place.name = intrinsic;
    return place;
  }
  bool operator==(const Place&) const = default;

  std::string text() const {
    const std::string_view base = file.substr(file.rfind('/') + 1);
    return std::string(name) + " (" + std::string(base) + ":" + std::to_string(line) + ")";
  }
};

struct Thread {
  unsigned rank = 0;
  uint3 index{};
  State state = State::kReturned;
  Place place;            // the call at which it waits
  unsigned mask = 0;      // of a warp operation, as are the fields below
  int source = -1;        // the lane that it reads, or -1
  uint64_t given = 0;     // what it gives to the lanes of the mask
  uint64_t received = 0;  // what the source gave
  unsigned ballot = 0;    // the lanes that gave anything but zero
  std::unique_ptr<unsigned char[]> stack;
  jmp_buf registers;

  unsigned lane() const {
    return rank % kWarp;
  }
};

inline std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

// Saves where it is called in `from` and continues at `to`. ucontext only starts the fibers: its own switches take 20
// times as long, because of their system calls for signals.
[[gnu::noinline]] inline void jump(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

}  // namespace simulator
