"""A back-end may serve devices that nothing in the package names."""

from interpreters import python

ANOTHER = """
import torch, sslkern
from sslkern import backend
assert backend.devices() == ("cpu", "cuda")
backend.implement("triton", "covariance_fwd", lambda z, unbiased, dual: None, "xpu", dtypes=(torch.float32,))
backend.implement("triton", "vicreg_fwd", lambda *args: None, on_request=("hpu",))
assert backend.devices() == ("cpu", "cuda", "xpu", "hpu")
assert backend.choice("covariance_fwd", "xpu") == "triton"
assert backend.choice("covariance_fwd", "xpu", torch.bfloat16) == "reference"
assert backend.supports("covariance_fwd", "xpu")["native"].reason == "it has no such kernel for xpu tensors"
assert backend.choice("vicreg_fwd", "hpu") == "reference"
with backend.use("triton"):
    assert backend.choice("vicreg_fwd", "hpu") == "triton"
for wrong in (("cuda", "covariance_fwd"), ("triton", "covariance")):
    try:
        backend.implement(*wrong, lambda z: None, "xpu")
    except ValueError as error:
        assert " must be one of " in str(error)
    else:
        raise AssertionError(wrong)
import runpy
runpy.run_module("sslkern", run_name="__main__")
"""


def test_another_device():
    """Kernels for it are chosen by the same rules, and `python -m sslkern` shows it."""
    done = python("-c", ANOTHER)
    assert done.returncode == 0, done.stderr
    assert "kernel                   cpu tensor   cuda tensor  xpu tensor   hpu tensor" in done.stdout
