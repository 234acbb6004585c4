"""A factored gradient is either factored or formed: whatever torch does to a gradient, nothing is lost."""

import copy
import io
import pickle

import pytest
import torch

from sslkern.core.factored_gradient import FactoredGradient

Q, P = 3, 4
DOUBLE = torch.float64
SKIPPED = {
    # what they do is not a function of the values, or takes the process with it
    "set_", "resize_", "resize_as_", "resize_as_sparse_", "rename_", "_resize_output_", "set_data", "bernoulli_",
    "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_", "rrelu_with_noise_",
    "rrelu_", "dropout_", "alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_", "retain_grad",
    "requires_grad_", "sparse_resize_", "sparse_resize_and_clear_", "_coalesced_", "detach_", "_fw_primal", "_version",
    "as_strided_", "unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "copy_sparse_to_sparse_",
}  # fmt: skip


def gradient(dtype=DOUBLE, seed=0, rows=2, shape=(Q, P)):
    """A factored gradient of two products with scales, and the matrix. All numbers are exact."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(shape, dtype=dtype)
    parts = []
    for scale in (None, 0.25):
        dy, x = ((torch.randint(-8, 8, (rows, n), generator=generator) + 0.5).to(dtype) / 4 for n in shape)
        part = FactoredGradient.of(w, dy, x)
        parts.append((part, dy.mT @ x))
        if scale is not None:
            part.mul_(scale)
            parts[-1] = part, scale * parts[-1][1]
    grad = parts[0][0]
    grad.add_(parts[1][0])
    assert grad.factored and len(grad.blocks) == 2
    return grad, parts[0][1] + parts[1][1]


def value_for(argument, like):
    """A value for an argument of an operator, by its type and name."""
    kind, name = str(argument.type), argument.name
    if argument.has_default_value() and "Tensor" not in kind:
        return argument.default_value
    if kind.startswith("Optional") and "Tensor" not in kind:
        return None
    if kind in ("Tensor", "Optional[Tensor]"):
        if name in ("mask", "condition"):
            return torch.eye(*like.shape) > 0
        if name in ("index", "indices"):
            return torch.zeros(1, P, dtype=torch.long)
        return torch.linspace(0.1, 0.9, like.numel(), dtype=like.dtype).view(like.shape)
    return {"number": 0.5, "Scalar": 0.5, "int": 0, "SymInt": 0, "float": 0.5, "bool": False, "List[int]": [0, 1],
            "List[SymInt]": [0, 1], "List[Tensor]": [like.new_ones(like.shape)] * 2}[kind]  # fmt: skip


def operators(wanted):
    """(name, overload, schema) of every operator of torch whose schema is wanted."""
    for name in sorted(dir(torch.ops.aten)):
        packet = getattr(torch.ops.aten, name)
        if name in SKIPPED or name.startswith("__") or not hasattr(packet, "overloads"):
            continue
        for overload in packet.overloads():
            schema = getattr(packet, overload)._schema
            if schema.arguments and str(schema.arguments[0].type) == "Tensor" and wanted(schema):
                yield f"{name}.{overload}", getattr(packet, overload), schema


def written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def close(a, b):
    torch.testing.assert_close(a.clone() if isinstance(a, FactoredGradient) else a, b, equal_nan=True)


def run(operator, schema, first, out=None):
    args = [value_for(a, first) for a in schema.arguments[1:] if not a.kwarg_only]
    kwargs = {a.name: value_for(a, first) for a in schema.arguments[1:] if a.kwarg_only}
    if out is not None:
        kwargs[next(a.name for a in schema.arguments if written(a))] = out
    return operator(first, *args, **kwargs)


def attempt(operator, schema, first, out=None):
    """The result, or None if the operator does not take such arguments."""
    try:
        return run(operator, schema, first, out)
    except (RuntimeError, KeyError, IndexError, NotImplementedError, TypeError, ValueError):
        return None


@pytest.mark.filterwarnings("ignore")
def test_every_operator_in_place_lands():
    """And returns the gradient itself, as torch's do; what follows reads what was written."""
    tried = 0
    for name, operator, schema in operators(lambda s: written(s.arguments[0]) and not s.arguments[0].kwarg_only):
        grad, dense = gradient()
        if attempt(operator, schema, dense) is None:
            continue
        result = run(operator, schema, grad)
        close(grad, dense)
        assert result is grad or not isinstance(result, torch.Tensor), name
        tried += 1
    assert tried > 130, tried


@pytest.mark.filterwarnings("ignore")
def test_every_view_is_a_view():
    """What is written to a view of a gradient is written to the gradient."""
    tried = 0
    views = operators(lambda s: s.arguments[0].alias_info and not written(s.arguments[0]) and len(s.returns) == 1)
    for _, operator, schema in views:
        grad, dense = gradient()
        of_dense = attempt(operator, schema, dense)
        if of_dense is None or not isinstance(of_dense, (torch.Tensor, list, tuple)):
            continue
        of_grad = run(operator, schema, grad)
        for view, expected in (
            ((of_grad, of_dense),) if isinstance(of_dense, torch.Tensor) else zip(of_grad, of_dense, strict=True)
        ):
            close(view, expected)
            if expected.dtype == DOUBLE and expected.numel() and expected._base is dense:
                expected.add_(1)
                view.add_(1)
        close(grad, dense)
        tried += 1
    assert tried > 25, tried
    grad, dense = gradient()
    for x in (grad, dense):
        x[0].zero_()
        x[1, 2:] = 5
        x.view(-1)[3] = 7
        x.data.mul_(2)
        x.detach().add_(x)
    close(grad, dense)


@pytest.mark.filterwarnings("ignore")
def test_every_operator_reads_and_writes_out():
    """Functions of a gradient, and out= a gradient."""
    read = wrote = 0
    skipped = ("rand", "multinomial", "poisson", "bernoulli", "normal", "dropout", "empty", "new_", "_like", "sparse")

    def wanted(schema):
        first = [a for a in schema.arguments if not a.is_out]
        return len(first) < 3 and (not any(map(written, schema.arguments)) or schema.arguments[-1].is_out)

    for name, operator, schema in operators(wanted):
        if name.startswith("_") or any(part in name for part in (*skipped, "quant", "mkldnn", "cudnn", "backward")):
            continue
        grad, dense = gradient()
        if schema.arguments[-1].is_out and sum(map(written, schema.arguments)) == 1:
            into, expected = gradient(seed=1)
            if attempt(operator, schema, dense, expected) is not None and expected.shape == (Q, P):
                run(operator, schema, dense, into)
                close(into, expected)
                wrote += 1
        elif not any(map(written, schema.arguments)):
            of_dense = attempt(operator, schema, dense)
            if not isinstance(of_dense, torch.Tensor) or of_dense.layout != torch.strided:
                continue
            close(run(operator, schema, grad), of_dense)
            close(grad, dense)
            read += 1
    assert read > 200 and wrote > 100, (read, wrote)


def test_lists_of_gradients():
    """Each _foreach_ operator in place, on a factored, a formed and an ordinary gradient together."""
    tried = 0
    for name in sorted(n for n in dir(torch) if n.startswith("_foreach_") and n.endswith("_")):
        for args in ((), (0.5,), (torch.tensor(0.5, dtype=DOUBLE),), ("lists",), ("lists", "lists")):
            pairs = [gradient(seed=k) for k in range(3)]
            pairs[1][0].form_()
            pairs[2] = pairs[2][1].clone(), pairs[2][1].clone()
            others = [torch.full((Q, P), 0.5, dtype=DOUBLE) for _ in pairs]
            given = [others if arg == "lists" else arg for arg in args]
            operator = getattr(torch, name)
            try:
                operator([dense for _, dense in pairs], *given)
            except (RuntimeError, TypeError):
                continue
            operator([grad for grad, _ in pairs], *given)
            for grad, dense in pairs:
                close(grad, dense)
            tried += 1
    assert tried > 60, tried


def test_what_stays_factored():
    """Multiples, sums and the norm; and their values."""
    grad, dense = gradient()
    torch.testing.assert_close(torch.linalg.vector_norm(grad), dense.norm())
    for change in (
        lambda x: x.mul_(3),
        lambda x: x.div_(torch.tensor(7.0)),
        lambda x: x.mul_(True),
        lambda x: x * 2,
        lambda x: 0.5 * x,
        lambda x: x / 3,
        lambda x: x + x,
        lambda x: (torch._foreach_mul_([x], 0.3), x)[1],
        lambda x: x.detach(),
    ):
        grad, dense = change(grad), change(dense)
        assert grad.factored
        torch.testing.assert_close(torch._foreach_norm([grad])[0], dense.norm())
    assert "rows=8" in repr(grad) and grad.rows == 8
    close(grad, dense)
    assert grad.factored
    other = torch.ones(Q, P, dtype=DOUBLE)
    close(other.clone().add_(grad, alpha=-2), other - 2 * dense)
    close(torch.add(other + grad, grad, alpha=3), other + 4 * dense)
    assert grad.factored
    for odd in (lambda x: x.div_(0), lambda x: x * torch.inf, lambda x: x / 0.0):
        close(odd(gradient()[0]), odd(gradient()[1]))
    grad.zero_()
    assert grad.factored and not grad.clone().any() and grad.square() == 0
    assert "formed" in repr(gradient()[0].add_(other))


def test_the_norm_keeps_its_digits_beside_a_large_mean():
    """In float32, where the columns of dy sum to zero, as before a batch norm."""
    dy, x = torch.randn(64, 50), torch.randn(64, 40) + 100
    dy = dy - dy.mean(0)
    truth = (dy.double().mT @ x.double()).norm()
    assert abs(FactoredGradient.of(torch.zeros(50, 40), dy, x).square().sqrt() / truth - 1) < 2e-6


def test_complex_factors():
    dy, x = (torch.randn(5, n, dtype=torch.complex128) for n in (Q, P))
    grad, dense = FactoredGradient.of(torch.zeros(Q, P, dtype=dy.dtype), dy, x.conj()), dy.mT @ x.conj()
    torch.testing.assert_close(grad.square().sqrt(), dense.norm())
    close(grad * 0.5, dense * 0.5)
    close(grad * 1j, dense * 1j)


def test_the_sum_is_formed_past_its_rows():
    w = torch.zeros(Q, P, dtype=DOUBLE)
    dy, x = torch.ones(2, Q, dtype=DOUBLE), torch.ones(2, P, dtype=DOUBLE)
    parts = [FactoredGradient.of(w, dy, x, most=4) for _ in range(3)]
    parts[0].add_(parts[1])
    assert parts[0].factored and parts[0].rows == 4
    parts[0].add_(parts[2])
    assert not parts[0].factored
    close(parts[0], torch.full((Q, P), 6.0, dtype=DOUBLE))


def test_a_changed_buffer_is_an_error():
    """Never a wrong gradient."""
    w = torch.zeros(Q, P)
    for change in range(2):
        dy, x = torch.ones(2, Q), torch.ones(2, P)
        grad = FactoredGradient.of(w, dy, x)
        (dy, x)[change].add_(1)
        for use in (grad.form_, grad.clone, grad.square, lambda g=grad: w.clone().add_(g)):
            with pytest.raises(RuntimeError, match=r"^The input of a factored layer, or the gradient of its output"):
                use()


def test_half_factors_keep_their_scale_outside():
    """65504 is the largest float16: a scale of 1024 would overflow it, and the sum is in float32."""
    dy, x = torch.full((2, Q), 60000.0).half(), torch.ones(2, P).half()
    grad = FactoredGradient.of(torch.zeros(Q, P), dy, x)
    grad.mul_(1024).mul_(1 / 1024)
    close(grad, torch.full((Q, P), 2 * dy[0, 0].item()))
    assert grad.dtype == torch.float32


def test_gradscaler_unscales_and_finds_infinities():
    for bad in (None, torch.inf, torch.nan):
        grad, dense = gradient(torch.float32)
        if bad is not None:
            grad = FactoredGradient.of(dense, torch.full((1, Q), bad), torch.ones(1, P))
        found, inverse = torch.zeros(1), torch.tensor([0.5])
        plain = torch.ones(2)
        torch._amp_foreach_non_finite_check_and_unscale_([grad, plain], found, inverse)
        assert bool(found) == (bad is not None) and torch.equal(plain, torch.full((2,), 0.5))
        if bad is None:
            assert grad.factored
            close(grad, dense * 0.5)


def test_copies_and_files_are_ordinary_tensors():
    grad, dense = gradient()
    state = io.BytesIO()
    torch.save(grad, state)
    state.seek(0)
    for other in (copy.deepcopy(gradient()[0]), pickle.loads(pickle.dumps(gradient()[0])), torch.load(state)):
        assert type(other) is torch.Tensor
        close(other, dense)
    assert gradient()[0].tolist() == dense.tolist() and (gradient()[0].numpy() == dense.numpy()).all()
    grad = gradient()[0]
    assert grad.data_ptr() == grad.form_().data_ptr() == grad.untyped_storage().data_ptr()
    transposed = FactoredGradient.of(torch.zeros(P, Q).mT, torch.ones(2, Q), torch.ones(2, P))
    assert transposed.stride() == (1, Q) == transposed.form_().stride()
