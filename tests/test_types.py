"""Numbers of 16 bits on the CPU: as torch converts them, with the processor's instructions and without."""

import pytest
import simulator
import torch
from conftest import ROOT

CODE = """
#include <pybind11/pybind11.h>
#include "types.cpp"
using namespace sslkern;

template <class From, class To>
void each(uintptr_t from, int64_t n, uintptr_t to) {
  const From* x = reinterpret_cast<const From*>(from);
  To* out = reinterpret_cast<To*>(to);
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (sizeof(From) < sizeof(To)) out[j] = wide(x[j]);
    if constexpr (sizeof(From) > sizeof(To)) out[j] = narrow<To>(x[j]);
  }
}
template <class From, class To>
void together(uintptr_t from, int64_t n, uintptr_t to) {
  convert(reinterpret_cast<const From*>(from), n, reinterpret_cast<To*>(to));
}
PYBIND11_MODULE(types, m) {
  m.def("wide_float16", each<HalfBits, float>);
  m.def("wide_bfloat16", each<BFloatBits, float>);
  m.def("narrow_float16", each<float, HalfBits>);
  m.def("narrow_bfloat16", each<float, BFloatBits>);
  m.def("convert_from_float16", together<HalfBits, float>);
  m.def("convert_from_bfloat16", together<BFloatBits, float>);
  m.def("convert_to_float16", together<float, HalfBits>);
  m.def("convert_to_bfloat16", together<float, BFloatBits>);
}
"""
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def compiled():
    """The conversions, out of the binary: `wide` and `narrow` number by number, and `convert`."""
    try:
        return simulator.build("types", CODE, [ROOT / "csrc" / "cpu"])
    except simulator.Unavailable as reason:
        pytest.skip(str(reason))


def called(function, x, dtype):
    """function(x), of the same shape and this dtype."""
    out = torch.empty(x.shape, dtype=dtype)
    function(x.data_ptr(), x.numel(), out.data_ptr())
    return out


def assert_same(found, expected):
    """Bit for bit, where it is not NaN."""
    kind = torch.int16 if found.dtype in DTYPES else torch.int32
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(kind), expected[~nan].view(kind))


@pytest.mark.parametrize("how", ("wide_{}", "convert_from_{}"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_read(compiled, dtype, how):
    """All 65,536 of them, with subnormal numbers, infinities and NaN."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert_same(called(getattr(compiled, how.format(str(dtype)[6:])), x, torch.float32), x.float())


@pytest.mark.parametrize("how", ("narrow_{}", "convert_to_{}"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_written_to_the_nearest(compiled, dtype, how):
    """Each number of the type, what lies in the middle of two of them, and the neighbours of both, past its largest
    and below its smallest too; and bits at random, in every number of lanes that is left over."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()].sort().values
    largest = values[-1].double() * torch.tensor((1.0, 1.0001, 1.001, 1.01, 2.0), dtype=torch.float64)
    middles = ((values[1:].double() + values[:-1]) / 2).float()
    exact = torch.cat(
        (values, middles, largest.float(), -largest.float(), torch.tensor((torch.inf, -torch.inf, torch.nan)))
    )
    near = [torch.nextafter(exact, torch.full_like(exact, to)) for to in (torch.inf, -torch.inf)]
    bits = torch.randint(-(2**31), 2**31, (10_007,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat((exact, *near, bits.view(torch.float32)))
    for n in (x.numel(), *range(18)):
        assert_same(called(getattr(compiled, how.format(str(dtype)[6:])), x[:n], dtype), x[:n].to(dtype))
