// Products of bf16 matrices with sums in fp32, by the instructions that multiply and add pairs of bf16 numbers. They
// run at twice the rate of fp32 and round nothing: a product of two bf16 numbers has at most 16 bits.
#pragma once

#include <string>

#include "../common.h"
#include "types.h"

namespace sslkern {

// Whether this processor has them (AVX512-BF16) and SSLKERN_CPU_GEMM asks for nothing else, or it is "bf16": then the
// same steps run on any processor, slowly where it has no such instructions.
bool has_bfloat_products();

// The name of those instructions; "" without them.
std::string bfloat_products();

constexpr int64_t kPairSide = 128;  // smallest Gram matrix for which they gain, and side of a block of one

// Rows or columns of a bf16 matrix ("lines"), packed for products along them. A panel holds 16 lines; number
// [k * 16 + r] of it holds elements 2k and 2k + 1 of its line r. Lines are padded with zeros to a multiple of 32.
class BfloatPanels {
 public:
  static constexpr int64_t kPanel = 16, kLines = 32;

  BfloatPanels(const Tensor& like, int64_t lines, int64_t depth)
      : pairs_(ceil_div(depth, 2)),
        memory_(fresh(like, {round_up(lines, kLines) * pairs_}, ScalarType::Int)),
        data_(data<uint32_t>(memory_)) {}

  // Makes the lines shorter.
  void shorten(int64_t depth) {
    pairs_ = ceil_div(depth, 2);
  }

  int64_t pairs() const {
    return pairs_;
  }

  // The panel of a line that is a multiple of 16.
  uint32_t* at(int64_t line) const {
    return data_ + line * pairs_;
  }

  // Packs lines [begin, end), where begin is a multiple of 32 and end too, or the last line. Element k of line r is at
  // from[(r - begin) * across + k * along].
  void pack(const BFloatBits* from, int64_t across, int64_t along, int64_t begin, int64_t end, int64_t depth) const;

 private:
  int64_t pairs_;
  const Tensor memory_;
  uint32_t* const data_;
};

// out = or += a b', for lines [i0, i1) of a and [j0, j1) of b; i0 and j0 are multiples of 16. `out` points to the
// element (i0, j0). With `lower`, for i0 = j0, only what reaches the diagonal or lies below it. Serial.
void multiply(const BfloatPanels& a, int64_t i0, int64_t i1, const BfloatPanels& b, int64_t j0, int64_t j1, float* out,
              int64_t ld, bool lower, bool add);

}  // namespace sslkern
