"""What covariance operators take and refuse, and that they leave the network as it was."""

import copy

import pytest
import torch
from covariance_operators import contrastive, descent, relu_net, residual_net, views_of
from torch import nn

import sslkern
from sslkern.analysis import byol_covariance_operator, covariance_operator


def state(net):
    tensors = {name: x.clone() for name, x in net.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    modes = [part.training for part in net.modules()]
    return tensors, grads, modes, torch.get_rng_state(), [len(part._forward_hooks) for part in net.modules()]


def assert_untouched(net, before):
    after = state(net)
    assert all(torch.equal(x, after[0][name]) for name, x in before[0].items())
    for x, y in zip(before[1], after[1], strict=True):
        assert (x is None and y is None) or torch.equal(x, y)
    assert before[2] == after[2] and torch.equal(before[3], after[3]) and before[4] == after[4]
    assert [p.requires_grad for p in net.parameters()] == [True] * len(before[1])


@pytest.mark.parametrize("chunk_size", (None, 4))
def test_the_network_is_left_as_it_was(chunk_size):
    """In training mode with dropout and batch norm, with gradients and hooks; after an error too."""
    net, views = residual_net(), views_of(2, 7, 1, 4, 4)
    net.stem[1].eval()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    net.register_forward_hook(lambda *_: None)
    before = state(net)
    operator = covariance_operator(net, views, "entry", chunk_size=chunk_size)
    values, _ = operator.eigenvectors(1)
    operator.update()
    assert_untouched(net, before)
    same = covariance_operator(copy.deepcopy(net).eval(), views, "entry")
    torch.testing.assert_close(same.eigenvectors(1)[0], values)

    def broken(*_):
        torch.rand(3)
        raise RuntimeError("a hook's own error")

    net.head.register_forward_hook(broken)
    before = state(net)
    with pytest.raises(RuntimeError, match="a hook's own error"):
        covariance_operator(net, views, "entry", chunk_size=chunk_size)
    assert_untouched(net, before)


@pytest.mark.parametrize("chunk_size", (None, 5))
def test_it_is_of_the_network_at_the_call(chunk_size):
    net, views = relu_net(), views_of(2, 5, 6)
    operator = covariance_operator(net, views, "2", chunk_size=chunk_size)
    expected = operator.apply()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
        views.mul_(1.0)
    torch.testing.assert_close(operator.apply(), expected, rtol=1e-12, atol=0)
    operator.weight.zero_()
    torch.testing.assert_close(operator.apply(), expected, rtol=1e-12, atol=0)


def test_chunks_change_nothing_but_rounding():
    net, views = relu_net(), views_of(3, 5, 6)
    whole = covariance_operator(net, views, "2", beta=0.3)
    for chunk_size in (1, 4, 15, 100):
        parts = covariance_operator(net, views, "2", beta=0.3, chunk_size=chunk_size)
        torch.testing.assert_close(parts.apply(), whole.apply(), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(parts.update(), whole.update(), rtol=1e-12, atol=1e-15)


def test_contexts_wrappers_and_lists():
    """Without gradients, in inference mode, under autocast, compiled, in DataParallel, frozen; views as a list."""
    net, views = relu_net(), views_of(2, 5, 6)
    expected = covariance_operator(net, views, "2").apply()

    def apply(net, views, layer="2"):
        return covariance_operator(net, views, layer).apply()

    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            found = apply(net, views.clone())
        assert torch.equal(found, expected)
    assert torch.equal(apply(torch.compile(net), views), expected)
    assert torch.equal(apply(nn.DataParallel(net), list(views)), expected)
    assert torch.equal(apply(nn.Sequential(net), views, "0.2"), expected)
    assert torch.equal(apply(net.requires_grad_(False), views.requires_grad_()), expected)


def test_a_tied_weight_counts_in_all_its_places():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(2)], nn.Tanh()).double()
    net[1].weight = net[0].weight
    views = views_of(2, 6, 5)
    expected = descent(net, net[0].weight, views, contrastive)
    for layer in ("0", "1"):
        torch.testing.assert_close(covariance_operator(net, views, layer).update(), expected)


def test_integers_and_outputs_of_more_dimensions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)).double()
    views = torch.randint(11, (2, 6, 5))
    for layer in ("0", "1"):
        operator = covariance_operator(net, views, layer)
        expected = descent(net, net.get_submodule(layer).weight, views, contrastive)
        torch.testing.assert_close(operator.update(), expected)


def test_attention_and_batch_norms_of_sslkern():
    """Kernels with one derivative are replaced."""
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).double()
    views = views_of(2, 4, 3, 6)
    for layer in ("linear1", "self_attn.in_proj_weight"):
        operator = covariance_operator(attention, views, layer)
        expected = descent(attention.train(), attention.get_parameter(operator.layer), views, contrastive)
        torch.testing.assert_close(operator.update(), expected)
        assert operator.norm() > 0
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    net(views.flatten(0, 2))
    ours = sslkern.nn.convert_batchnorm(copy.deepcopy(net))
    before = state(ours)
    for layer in ("0", "1", "3"):
        found, expected = (covariance_operator(x, views[:, :, 0], layer).apply() for x in (ours, net))
        torch.testing.assert_close(found, expected)
    assert_untouched(ours, before)
    assert type(ours[1]) is sslkern.nn.BatchNorm1d


def test_float32():
    """As accurate as autograd's own gradient in float32; eigenvalues to single precision."""
    net, views = relu_net(), views_of(3, 20, 6)
    wide = covariance_operator(net, views, "2")
    narrow = covariance_operator(net.float(), views.float(), "2")
    assert narrow.apply().dtype == torch.float32
    torch.testing.assert_close(narrow.apply().double(), wide.apply(), rtol=1e-4, atol=1e-6)
    assert narrow.norm() == pytest.approx(wide.norm(), rel=1e-5)
    values, vectors = narrow.eigenvectors(4)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(values.double(), wide.eigenvectors(4)[0], rtol=1e-4, atol=1e-6)


def test_degenerate_samples():
    """Equal samples have no covariance; equal views have no variance; NaN stays NaN and has no norm."""
    net, views = relu_net(), views_of(2, 5, 6)
    for layer in ("2", "4"):
        operator = covariance_operator(net, torch.zeros(2, 5, 6).double(), layer)
        assert operator.norm() == 0 and not operator.apply().any()
        values, vectors = operator.eigenvectors(2)
        assert not values.any() and vectors.flatten(1).norm(dim=1).tolist() == [1, 1]
    equal = covariance_operator(net, views[:1].expand(2, -1, -1), "2", beta=1.0)
    assert equal.within.apply().abs().max() < 1e-15 < equal.between.norm()
    operator = covariance_operator(net, views.fill_(float("nan")), "2")
    assert operator.apply().isnan().all()
    with pytest.raises(ValueError, match="must be finite"):
        operator.norm()


NET, VIEWS = relu_net(), views_of(2, 5, 6)
LINEAR = nn.Linear(4, 4).double()
REFUSED = {
    "function": (lambda: covariance_operator(torch.relu, VIEWS), TypeError, "net must be a torch.nn.Module"),
    "list": (lambda: covariance_operator(NET, [1.0]), TypeError, "views must be a torch.Tensor"),
    "ragged": (lambda: covariance_operator(NET, [VIEWS[0], VIEWS[0, :2]]), ValueError, "views must be tensors of one"),
    "one sample": (lambda: covariance_operator(NET, VIEWS[:, :1]), ValueError, r"N >= 2, got \(2, 1, 6\)"),
    "vector": (lambda: covariance_operator(NET, VIEWS[0, 0]), ValueError, "views must have shape"),
    "dtype": (lambda: covariance_operator(NET, VIEWS.float()), TypeError, "dtype of '4.weight', float64, got float32"),
    "device": (lambda: covariance_operator(NET, VIEWS.to("meta")), ValueError, "views must be on the device of net"),
    "half": (lambda: covariance_operator(relu_net().half(), VIEWS.half()), TypeError, "must be float32 or float64"),
    "layer": (lambda: covariance_operator(NET, VIEWS, "5"), ValueError, "one of '0', '2', '4'; got '5'"),
    "no weight": (lambda: covariance_operator(NET, VIEWS, "1"), ValueError, "got '1'"),
    "index": (lambda: covariance_operator(NET, VIEWS, 2), TypeError, "layer must be the name of a layer"),
    "no layer": (lambda: covariance_operator(nn.ReLU(), VIEWS), ValueError, "net must have a layer with a weight"),
    "lazy": (lambda: covariance_operator(nn.LazyLinear(3), VIEWS), ValueError, "call it once before"),
    "statistics": (
        lambda: covariance_operator(nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), LINEAR), VIEWS, "1"),
        ValueError,
        "batch norms of net must have running statistics, but '0'",
    ),
    "pairs": (lambda: covariance_operator(NET, VIEWS, pairs="both"), ValueError, "pairs must be one of"),
    "one view": (lambda: covariance_operator(NET, VIEWS[:1], pairs="distinct"), ValueError, "at least two views"),
    "beta": (lambda: covariance_operator(NET, VIEWS, beta=float("nan")), ValueError, "beta must be a finite number"),
    "chunk": (lambda: covariance_operator(NET, VIEWS, chunk_size=0), ValueError, "chunk_size must be an integer >= 1"),
    "weights": (lambda: covariance_operator(NET, VIEWS, weights=torch.ones(4, 4)), ValueError, r"shape \(5, 5\)"),
    "weights list": (lambda: covariance_operator(NET, VIEWS, weights=[1]), TypeError, "weights must be a torch.Tensor"),
    "weights NaN": (
        lambda: covariance_operator(NET, VIEWS, weights=torch.full((5, 5), float("nan"))),
        ValueError,
        "weights must be finite",
    ),
    "direction": (lambda: covariance_operator(NET, VIEWS).apply(VIEWS), ValueError, "must have the same shape"),
    "direction dtype": (lambda: covariance_operator(NET, VIEWS).apply(torch.ones(4, 7)), TypeError, "dtype float64"),
    "direction list": (lambda: covariance_operator(NET, VIEWS).apply([1]), TypeError, "weight must be a torch.Tensor"),
    "k": (lambda: covariance_operator(NET, VIEWS).eigenvectors(0), ValueError, "k must be an integer >= 1"),
    "large k": (lambda: covariance_operator(NET, VIEWS).eigenvectors(29), ValueError, "k must be at most 28"),
    "predictor": (lambda: byol_covariance_operator(NET, "p", VIEWS), TypeError, "predictor must be a number"),
    "infinite": (lambda: byol_covariance_operator(NET, float("inf"), VIEWS), ValueError, "predictor must be finite"),
    "bias": (lambda: byol_covariance_operator(NET, LINEAR, VIEWS, batch_norm=False), ValueError, "have no bias"),
    "predictor shape": (lambda: byol_covariance_operator(NET, torch.ones(3, 3), VIEWS), ValueError, r"shape \(4, 4\)"),
    "predictor dtype": (lambda: byol_covariance_operator(NET, torch.ones(4, 4), VIEWS), TypeError, "dtype of net"),
    "batch norm": (lambda: byol_covariance_operator(NET, 0.5, VIEWS, batch_norm="on"), TypeError, "must be a bool"),
    "asymmetric": (
        lambda: byol_covariance_operator(NET, torch.ones(4, 4).double().triu(), VIEWS).eigenvectors(),
        ValueError,
        "not symmetric",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert str(caught.value).count(". ") == 0


def test_networks_that_cannot_be_right():
    class Pair(nn.Linear):
        def forward(self, x):
            return self.output(super().forward(x))

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    unused = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).double()
    unused.other = nn.Linear(2, 2).double()
    unused.forward = lambda x: unused[1](unused[0](x))
    outputs = {
        "must return a floating-point torch.Tensor, got tuple": lambda y: (y, y),
        "got a tensor of int64": lambda y: y.long(),
        "must return 10 rows for 10 rows": lambda y: y.sum(0),
        "must be twice differentiable in 'weight'": Once.apply,
    }
    for sentence, output in outputs.items():
        net = Pair(6, 3).double()
        net.output = output
        with pytest.raises((TypeError, ValueError), match=sentence):
            covariance_operator(net, VIEWS)
    with pytest.raises(ValueError, match=r"no output depends on 'other\.weight'"):
        covariance_operator(unused, VIEWS, "other")
