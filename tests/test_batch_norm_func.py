"""Batch norm under torch.func, as torch's own formula; and compiled once for all sizes."""

from functools import partial

import batch_norms
import pytest
import torch
import torch.nn.functional as F
from batch_norms import skip_simulator
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vjp, vmap

from sslkern import ops
from sslkern.nn import BatchNorm1d, BatchNorm2d

backend = batch_norms.backend


def eval_of(function):
    mean, var = torch.linspace(-1, 1, 4, dtype=torch.float64), torch.linspace(1, 2, 4, dtype=torch.float64)
    if function is F.batch_norm:
        return lambda x, w, b: F.batch_norm(x, mean, var, w, b).relu()
    return lambda x, w, b: ops.batch_norm(x, w, b, mean, var, activation="relu")


def training_of(function):
    if function is F.batch_norm:
        return lambda x, w, b: F.batch_norm(x, None, None, w, b, True).relu()
    return lambda x, w, b: ops.batch_norm(x, w, b, training=True, activation="relu")


def summed(f):
    return lambda *a: f(*a).sin().sum()


ALL = (0, 1, 2)
TRANSFORMS = {
    "vmap of x": lambda f: vmap(f, (0, None, None)),
    "vmap of x along channels": lambda f: vmap(f, (2, None, None)),
    "vmap of weight": lambda f: lambda x, w, b: vmap(f, (None, 0, None))(x[0], torch.stack([w, b, w]), b),
    "vmap of weight and bias": lambda f: lambda x, w, b: vmap(f, (None, 1, 1))(x[0], *[torch.stack([w, b], 1)] * 2),
    "vmap of all": lambda f: lambda x, w, b: vmap(f)(x[:2], torch.stack([w, b]), torch.stack([b, w])),
    "nested vmap": lambda f: lambda x, w, b: vmap(vmap(f, (None, 0, None)), (0, None, None))(x, torch.stack([w, b]), b),
    "vmap of one": lambda f: lambda x, w, b: vmap(f, (0, None, None))(x[:1], w, b),
    "grad": lambda f: lambda x, w, b: grad(summed(f), ALL)(x[0], w, b),
    "grad of grad's input alone": lambda f: lambda x, w, b: grad(summed(f))(x[0], w, b),
    "grad of the weight alone": lambda f: lambda x, w, b: grad(summed(f), 1)(x[0], w, b),
    "vjp": lambda f: lambda x, w, b: vjp(f, x[0], w, b)[1](x[1]),
    "jacrev": lambda f: lambda x, w, b: jacrev(f, ALL)(x[0], w, b),
    "vmap of grad": lambda f: vmap(grad(summed(f), ALL), (0, None, None)),
    "grad of vmap": lambda f: grad(summed(vmap(f, (0, None, None))), ALL),
    "vmap of jacrev": lambda f: lambda x, w, b: vmap(jacrev(f), (0, None, None))(x[:2], w, b),
    "vmapped backward": lambda f: lambda x, w, b: vmap(lambda dy: vjp(f, x[0], w, b)[1](dy))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("mode", (training_of, eval_of))
def test_torch_func(mode, name, backend):
    """Every transform as of torch's own formula, in fp64 to 1e-12."""
    skip_simulator(backend, "no operators that a transform could see")
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 6, 4, dtype=torch.float64), *torch.rand(2, 4, dtype=torch.float64) + 0.1
    if name == "vmap of x along channels":
        x = x.movedim(0, 2)
    expected, found = (
        torch.utils._pytree.tree_leaves(TRANSFORMS[name](mode(f))(x, w, b)) for f in (F.batch_norm, ops.batch_norm)
    )
    for e, r in zip(expected, found, strict=True):
        torch.testing.assert_close(r, e, rtol=1e-12, atol=1e-12)


def test_a_vmapped_slice_has_its_own_bits(backend):
    """Of outputs, moments and gradients, in every layout."""
    skip_simulator(backend, "no operators that a transform could see")
    weight, bias = torch.rand(2, 5)
    for view in (lambda t: t, lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2)):
        x = view(torch.randn(3, 300, 5, 4, 3))
        f = partial(ops.batch_norm, training=True, activation="relu")
        df = grad(summed(f), ALL)
        for function, mapped in ((f, (0, None, None)), (df, (0, None, None))):
            whole = vmap(function, mapped)(x, weight, bias)
            for k, slice in enumerate(x):
                alone = function(slice, weight, bias)
                for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (whole, alone)), strict=True):
                    assert torch.equal(a[k], b)
        for whole, alone in zip(vmap(ops.batch_moments)(x), zip(*map(ops.batch_moments, x), strict=True), strict=True):
            assert torch.equal(whole, torch.stack(alone))


def test_what_cannot_be_derived_says_so(backend):
    """Second and forward derivatives: one sentence, never a zero."""
    skip_simulator(backend, "no operators that a transform could see")
    x, w, b = torch.randn(6, 4), *torch.rand(2, 4)
    for f in (training_of(ops.batch_norm), eval_of(ops.batch_norm), lambda x, w, b: ops.batch_moments(x)[1]):
        f = summed(f)
        for transform in (hessian, jacfwd, lambda f: jacrev(jacrev(f)), lambda f: grad(lambda *a: grad(f)(*a).sum())):
            with pytest.raises((RuntimeError, NotImplementedError), match="sslkern's ops"):
                transform(f)(x, w, b)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="sslkern's ops"):
            f(torch.autograd.forward_ad.make_dual(x, x), w, b)


def test_running_statistics_under_vmap(backend):
    """Mapped as well, each slice moves its own; one for all slices is refused, as by torch."""
    skip_simulator(backend, "no operators that a transform could see")
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    expected = [F.batch_norm(s, m := torch.zeros(4).double(), v := torch.ones(4).double(), training=True) for s in x]
    step = partial(ops.batch_norm, training=True)
    for dim in (0, 1):
        mean, var = torch.zeros(3, 4).double(), torch.ones(3, 4).double()
        given = [t if dim == 0 else t.t().contiguous() for t in (mean, var)]
        y = vmap(lambda x, m, v: step(x, None, None, m, v), (0, dim, dim))(x, *given)
        torch.testing.assert_close(y, torch.stack(expected))
        for k, running in enumerate(given):
            torch.testing.assert_close(running.select(dim, 2), (m, v)[k])
    for f in (lambda x, m, v: step(x, None, None, m, v), lambda x, m, v: F.batch_norm(x, m, v, training=True)):
        with pytest.raises(RuntimeError, match=r"running_mean.*in.place"):
            vmap(f, (0, None, None))(x, m, v)
    with pytest.raises(ValueError, match="mapped over 0 slices"):
        vmap(step)(x[:0])


@pytest.mark.parametrize("training", (True, False))
def test_functional_call(training, backend):
    """Gradients by functional_call, for an ensemble and for each sample, as of torch's layers."""
    skip_simulator(backend, "no operators that a transform could see")
    x = torch.randn(5, 6, 4, dtype=torch.float64)
    found = []
    for layers in ((BatchNorm1d(4, activation="relu"),), (nn.BatchNorm1d(4), nn.ReLU())):
        torch.manual_seed(1)
        models = [nn.Sequential(nn.Linear(4, 4), nn.Sequential(*layers), nn.Linear(4, 2)) for _ in range(3)]
        if len(layers) == 1:
            models = [nn.Sequential(m[0], BatchNorm1d(4, activation="relu"), m[2]) for m in models]
        models = [m.double().train(training) for m in models]
        state, buffers = stack_module_state(models)
        of_all = vmap(lambda s, c, x, m=models[0]: functional_call(m, (s, c), (x,)), (0, 0, None))(state, buffers, x[0])

        def loss(s, c, x, m=models[0]):
            return functional_call(m, (s, c), (x,)).sin().sum()

        state, own = dict(models[0].named_parameters()), dict(models[0].named_buffers())
        copies = {name: t.expand(5, *t.shape).clone() for name, t in own.items()}
        of_one = grad(loss)(state, {name: t.clone() for name, t in own.items()}, x[0])
        of_each = vmap(grad(loss), (None, 0, 0))(state, copies, x)
        found.append([of_all, *buffers.values(), *of_one.values(), *of_each.values(), *copies.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# On a CPU the others are cells of docs/support.md
SYMBOLIC = [("reference", "relu, channels last"), ("native", "relu, channels last"), ("native", "strided")]
SYMBOLIC += [("cuda", name) for name in ("training", "relu, channels last", "eval", "moments", "strided")]


@pytest.mark.parametrize("backend, name", SYMBOLIC, indirect=["backend"])
def test_compiled_once_for_all_sizes(name, backend):
    """dynamic=True, fullgraph=True: 20 batch sizes, forward and backward, and no compilation after the first."""
    strided = torch.rand(8)[::2]
    function = {
        "training": BatchNorm1d(4),
        "relu, channels last": BatchNorm2d(4, activation="relu"),
        "eval": BatchNorm1d(4, activation="relu").eval(),
        "moments": lambda x: torch.stack(ops.batch_moments(x)),
        "strided": lambda x: ops.batch_norm(x, strided, None, None, None, True),
    }[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, first = torch.compile(function, fullgraph=True, dynamic=True, backend=counter), 0
    for n in range(7, 27):  # a size that another dimension has too would be one symbol with it
        x = torch.randn(n, 4, *[5, 3] * ("last" in name))
        x = (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()
        y = compiled(x)
        torch.testing.assert_close(y, function(x))
        torch.autograd.grad(y.sum(), x)
        first = first or counter.frame_count
        assert counter.frame_count == first, n
