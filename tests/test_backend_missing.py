"""A Triton that is broken, and an extension that is: each is told for what it is, and sslkern works without."""

import json

import pytest
from interpreters import HIDE_NATIVE, python, pythons

BREAK = """
import json, sys, warnings
def broken(module, error):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        del sys.modules[name]
    class Break:
        def find_spec(self, name, path=None, target=None):
            if name == module:
                raise error
    sys.meta_path.insert(0, Break())
{how}
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sslkern
from sslkern import backend as b
said = [str(w.message) for w in caught if "sslkern" in str(w.message)]
left = sorted({{name for name in b.declared() for device in ("cpu", "cuda") if b.supports(name, device)["triton"]}})
loss = sslkern.vicreg_loss(torch.ones(4, 3), torch.ones(4, 3)).item()
print(json.dumps({{"reason": b.missing().get("triton", ""), "said": said, "left": left, "loss": loss}}))
"""
HOWS = {  # how Triton is broken: (what is missing, whether it warns)
    "not installed": (
        "broken('triton', ModuleNotFoundError('No module', name='triton'))",
        "3.6 or newer does not",
        False,
    ),
    "raises": ("broken('triton', OSError('libcuda is odd'))", "does not load (OSError: libcuda is odd)", True),
    "needs more": ("broken('triton', ModuleNotFoundError('none', name='numpy'))", "does not load (none)", True),
    "too old": (
        "import triton; triton.__version__ = '3.1.0'",
        "Triton 3.1.0 is too old: 3.6 or newer",
        True,
    ),
    "ours": (
        "broken('sslkern.triton_kernels.pairwise_chunks', ImportError('our fault'))",
        "loads, but sslkern's own kernels do not (our fault)",
        True,
    ),
    "ours, otherwise": (
        "broken('sslkern.triton_kernels.gram', AttributeError('tl.gone'))",
        "sslkern's own kernels do not (AttributeError: tl.gone)",
        True,
    ),
}


def test_a_broken_triton_is_told_for_what_it_is():
    """The import of sslkern works, with the reason and a warning; of a half that did load nothing is left."""
    runs = [(BREAK.format(how=code), {}) for code, *_ in HOWS.values()]
    first = "import torch._dynamo"  # which itself may not survive a broken Triton
    for done, (how, (_, reason, warns)) in zip(
        pythons(*runs, first=first, TRITON_INTERPRET="1"), HOWS.items(), strict=True
    ):
        assert done.returncode == 0, (how, done.stderr)
        found = json.loads(done.stdout)
        assert reason in found["reason"] and found["left"] == [] and found["loss"] == pytest.approx(24.75), (how, found)
        assert len(found["said"]) == warns and all(reason in text for text in found["said"]), (how, found)


def test_an_extension_that_is_there_and_does_not_load_warns():
    """One that was never compiled does not: that is a choice."""
    code = HIDE_NATIVE + "import sslkern"
    broken = python("-c", code)
    assert "RuntimeWarning: sslkern runs without its back-end 'native'" in broken.stderr, broken.stderr
    absent = python("-c", code.replace('ImportError("hidden by the test")', "ModuleNotFoundError(name=name)"))
    assert absent.returncode == 0 and "Warning" not in absent.stderr, absent.stderr
