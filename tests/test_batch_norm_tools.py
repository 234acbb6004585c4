"""Batch norms in the hands of torch's own tools: conversion, states, copies, pruning, fusion."""

import copy
import inspect
import io
import pickle

import batch_norm_layers
import pytest
import torch
from batch_norm_layers import ACTIVATIONS, BATCH_NORM, IMAGES, LAYERS, agree, own, torchs, used
from torch import nn
from torch.nn.utils import parametrizations, prune, skip_init
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

from sslkern.nn import BatchNorm1d, BatchNorm2d, BatchNormReLU, SyncBatchNorm, convert_batchnorm

native = batch_norm_layers.native


@LAYERS
def test_signatures_are_torchs(ours, theirs, shape):
    """Names, order and defaults, and then the activation, by keyword alone; `skip_init` finds `device`."""
    expected = list(inspect.signature(theirs).parameters.values())
    found = list(inspect.signature(ours).parameters.values())
    *found, last = found
    positional = [p for p in expected if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in found[: len(positional)]] == [(p.name, p.default) for p in positional]
    assert {p.name for p in expected} <= {p.name for p in found}
    assert (last.name, last.kind, last.default) == ("activation", last.KEYWORD_ONLY, None)
    for activation in (None, "relu"):
        layer = skip_init(ours, 6, eps=1e-3, dtype=torch.float64, activation=activation)
        assert type(own(layer)) is ours and own(layer).eps == 1e-3 and own(layer).weight.dtype == torch.float64
    assert ours(6, bias=False).bias is None
    used(ours(6, bias=False, activation="relu"), shape)
    with pytest.raises(TypeError):
        ours(6, activaton="relu")
    with pytest.raises(TypeError):
        ours(6, 1e-5, 0.1, True, True, None, None, None, "relu")


@LAYERS
def test_with_relu_it_is_two_layers_in_one_pass(ours, theirs, shape):
    """Values and gradients are those of both, by one node of the graph; children that have hooks are called."""
    layer = used(ours(6, activation="relu"), shape)
    assert type(layer) is BatchNormReLU and type(layer[0]) is ours and type(layer[1]) is nn.ReLU
    x = torch.randn(shape)
    for training in (True, False):
        layer.train(training)
        split = nn.Sequential(*copy.deepcopy(layer))
        results = []
        for module in (layer, split):
            given = x.clone().requires_grad_()
            y = module(given)
            results.append([y, *torch.autograd.grad(y.sin().sum(), [given, *module.parameters()]), *module.buffers()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        saved = layer(x.requires_grad_()).grad_fn
        assert "Relu" not in type(saved).__name__ and "relu" in type(split(x).grad_fn).__name__.lower()
        x = x.detach()
    seen = []
    hooks = [layer[k].register_forward_hook(lambda m, i, o: seen.append((type(m), float(o.min())))) for k in (0, 1)]
    y = layer(x)
    assert [kind for kind, _ in seen] == [ours, nn.ReLU] and seen[0][1] < 0 <= seen[1][1]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(layer(x), y)


def test_a_subclass_takes_no_activation():
    """A sentence, since what it overrides would be lost."""

    class Own(BatchNorm2d):
        pass

    assert type(Own(3)) is Own
    with pytest.raises(TypeError, match=r"Own is a subclass .*BatchNormReLU"):
        Own(3, activation="relu")
    x = torch.randn(4, 3, 2, 2)
    assert float(BatchNormReLU(Own(3), nn.ReLU())(x).min()) == 0
    for layer in (BatchNormReLU(), BatchNormReLU(nn.Identity()), BatchNorm2d(3, activation="relu")[1:]):
        assert isinstance(layer(x), torch.Tensor)


@ACTIVATIONS
@LAYERS
def test_torchs_convert_sync_batchnorm(ours, theirs, shape, activation):
    """At the root and within: torch's SyncBatchNorm, the relu behind it, the same parameters, values and modes."""
    for wrap in (lambda m: m, lambda m: nn.Sequential(nn.Identity(), nn.Sequential(m))):
        for training in (False, True):
            model = wrap(used(ours(6, activation=activation), shape)).train(training)
            expected, parameters, x = torchs(model).eval(), list(model.parameters()), torch.randn(shape)
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            assert [type(m) for m in converted.modules() if isinstance(m, BATCH_NORM)] == [nn.SyncBatchNorm]
            assert all(a is b for a, b in zip(parameters, converted.parameters(), strict=True))
            assert all(m.training == training for m in converted.modules())
            assert activation is None or float(converted.eval()(x).min()) == 0
            agree(converted.eval(), expected, x)
            converted = SyncBatchNorm.convert_sync_batchnorm(torchs(converted))
            agree(converted, expected, x)


@ACTIVATIONS
@LAYERS
def test_they_are_seen_as_batch_norms(ours, theirs, shape, activation):
    """By `isinstance`, so by `update_bn` and by filters of weight decay; `update_bn` does as for torch's layers."""
    one = nn.Sequential(nn.Identity(), used(ours(6, activation=activation), shape))
    assert [isinstance(m, BATCH_NORM) for m in one.modules()].count(True) == 1
    decayed = {p for m in one.modules() if not isinstance(m, BATCH_NORM) for p in m.parameters(recurse=False)}
    assert not decayed
    other = torchs(one)
    batches = [torch.randn(shape) for _ in range(3)]
    for model in (one, other):
        update_bn(batches, model)
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert own(one[1]).momentum == 0.1


def test_back_is_torchs_sequential():
    """In place, the root itself too: types, names, hooks, modes and shared layers; and over again."""
    x = torch.randn(8, 6)
    shared = used(BatchNorm1d(6, activation="relu"), (8, 6))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, BatchNorm1d(6)), "c": SyncBatchNorm(6)}).eval()
    shared[0].train()
    calls = []
    shared.register_forward_hook(lambda m, i, o: calls.append("whole"))
    shared[0].register_forward_hook(lambda m, i, o: calls.append("norm"))
    before, keys, tensors = shared(x), list(model.state_dict()), [*model.parameters(), *model.buffers()]
    assert convert_batchnorm(model, back=True) is model and model["a"] is model["b"][0]
    assert [type(m) for m in model.modules()][1:] == [
        nn.Sequential, nn.BatchNorm1d, nn.ReLU, nn.Sequential, nn.BatchNorm1d, nn.SyncBatchNorm]  # fmt: skip
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert [m.training for m in model["a"].modules()] == [False, True, False]
    torch.testing.assert_close(model["a"](x), before)
    assert calls == ["norm", "whole"] * 2
    root = convert_batchnorm(used(BatchNorm2d(6, activation="relu"), (4, 6, 3, 3)), back=True)
    assert type(root) is nn.Sequential and [type(m) for m in root] == [nn.BatchNorm2d, nn.ReLU]
    assert vars(root).keys() == vars(nn.Sequential(nn.Identity())).keys()
    assert [type(m) for m in convert_batchnorm(root)] == [BatchNorm2d, nn.ReLU]


@LAYERS
def test_state_dicts(ours, theirs, shape):
    """A layer with a relu has the keys of nn.Sequential, and loads those of a bare batch norm as well."""
    for wrap in (lambda m: m, lambda m: nn.ModuleDict({"bn1": m})):
        bare, target = (
            wrap(used(theirs(6).eval().train(theirs is not nn.SyncBatchNorm), shape, 1)),
            wrap(ours(6, activation="relu")),
        )
        state = bare.state_dict()
        keys = list(state)
        assert not any(target.load_state_dict(state))
        assert list(state) == keys
        assert all(map(torch.equal, bare.state_dict().values(), target.state_dict().values()))
        pair = nn.Sequential(theirs(6), nn.ReLU())
        again = wrap(pair)
        assert not any(again.load_state_dict(target.state_dict()))
        assert not any(wrap(ours(6, activation="relu")).load_state_dict(again.state_dict()))
        broken = {key: value for key, value in state.items() if "running_var" not in key}
        with pytest.raises(RuntimeError, match=r"Missing key.*0.running_var"):
            target.load_state_dict(broken | {"other": torch.ones(1)})


@ACTIVATIONS
@LAYERS
def test_copies(ours, theirs, shape, activation):
    """deepcopy, pickle and torch.save give a layer of its own with the same bits."""
    layer, x = used(ours(6, activation=activation), shape), torch.randn(shape)
    file, state = io.BytesIO(), copy.deepcopy(layer.state_dict())
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(other) is type(layer) and repr(other) == repr(layer)
        assert not {p.data_ptr() for p in layer.parameters()} & {p.data_ptr() for p in other.parameters()}
        for training in (False, True):
            agree(other.train(training), layer.train(training), x, exactly=True)
        layer.load_state_dict(state)
    assert own(layer.to(torch.float64)).weight.dtype == torch.float64


@ACTIVATIONS
def test_pruned_and_parametrized(activation):
    """Masks and parametrizations of the batch norm act, with the relu behind it."""
    for change in (
        lambda bn: prune.random_unstructured(bn, "weight", 0.5),
        lambda bn: parametrizations.weight_norm(bn, "bias"),
        lambda bn: torch.nn.utils.parametrize.register_parametrization(bn, "weight", nn.Softplus()),
    ):
        torch.manual_seed(0)
        layer = used(BatchNorm2d(6, activation=activation), (4, 6, 5, 3))
        change(own(layer))
        x = torch.randn(4, 6, 5, 3)
        y = nn.functional.batch_norm(x, None, None, own(layer).weight, own(layer).bias, True)
        torch.testing.assert_close(layer(x), y.relu() if activation else y)
        layer(x).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


def test_fused_with_a_convolution():
    """`fuse_conv_bn_eval` takes the batch norm; a pair of it and a relu it does not take for one."""
    conv, x = nn.Conv2d(3, 6, 3).eval(), torch.randn(IMAGES)
    layer = used(BatchNorm2d(6, activation="relu"), (4, 6, 5, 3)).eval()
    torch.testing.assert_close(fuse_conv_bn_eval(conv, layer[0])(x).relu(), layer(conv(x)))
    with pytest.raises(AttributeError):
        fuse_conv_bn_eval(conv, layer)
    model = torchs(nn.Sequential(conv, layer)).eval()
    fused = torch.ao.quantization.fuse_modules(model, [["0", "1.0", "1.1"]])
    torch.testing.assert_close(fused(x), layer(conv(x)))
