"""Batch norms on their way out of Python: traced, scripted, exported, as ONNX, by torch.fx, and quantized."""

import copy
import io
import warnings

import batch_norm_layers
import pytest
import torch
from batch_norm_layers import ACTIVATIONS, BATCH_NORM, IMAGES, PAIRS, agree, own, torchs, used
from torch import nn

from sslkern.nn import BatchNorm1d, BatchNorm2d, SyncBatchNorm

native = batch_norm_layers.native


class Net(nn.Module):
    """A convolution, a batch norm, and a head that is a batch norm too."""

    def __init__(self, activation=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = BatchNorm2d(6, activation=activation)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, 5), BatchNorm1d(5, activation=activation))

    def forward(self, x):
        return self.head(self.bn(self.conv(x)))


def net(activation):
    torch.manual_seed(0)
    return used(Net(activation), IMAGES).eval(), torch.randn(IMAGES)


def all_layers(activation):
    """(layer, input) for every layer by itself, without affine parameters and without statistics too."""
    for ours, _, shape in PAIRS:
        for settings in ({}, {"affine": False}, {"track_running_stats": False}, {"bias": False}):
            yield used(ours(6, activation=activation, **settings), shape).eval(), torch.randn(shape)
    yield net(activation)


@ACTIVATIONS
def test_jit_trace(activation):
    """Of eval layers: torch's batch norm, no kernel of this package, the same values in a file that is loaded again."""
    for module, x in all_layers(activation):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced, file = torch.jit.trace(module, x), io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            loaded = torch.jit.load(file)
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert "aten::batch_norm" in kinds and not any("sslkern" in k or "Python" in k for k in kinds)
        for other in (traced, loaded):
            agree(other, module, x)
            agree(other, module, x[:3] * 2)
    layer = BatchNorm1d(6, activation=activation)
    traced = torch.jit.trace(copy.deepcopy(layer), torch.randn(8, 6), check_trace=False)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::batch_norm" in kinds and not any("Python" in k for k in kinds)


@ACTIVATIONS
def test_jit_script(activation):
    """torch's layers, in training and in eval, on the same parameters; SyncBatchNorm, as torch's, is not compiled."""
    for module, x in all_layers(activation):
        if isinstance(own(module), SyncBatchNorm):
            continue
        scripted = torch.jit.script(copy.deepcopy(module))
        agree(scripted, module, x)
        scripted.train(), module.train()
        agree(scripted, module, x)
        for a, b in zip(scripted.buffers(), module.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", (True, False))
@ACTIVATIONS
def test_export(activation, strict):
    """torch.export in eval: aten's batch norm alone, for any batch size; a training graph as torch's own layer's, with
    a relu not strict, as it is by default, and without one strict."""
    module, x = net(activation)
    size = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(module, (x,), dynamic_shapes=(size,), strict=strict)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum("batch_norm" in t for t in targets) == 2 and not any("sslkern" in t for t in targets)
    for batch in (x, torch.randn(7, *IMAGES[1:])):
        agree(program.module(), module, batch)
    if strict == bool(activation):
        return
    trained = [
        torch.export.export(m, (x,), strict=strict).run_decompositions()
        for m in (Net(activation), torchs(Net(activation)))
    ]
    targets = [[str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in trained]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("dynamo", (False, True))
@ACTIVATIONS
def test_onnx(activation, dynamo, tmp_path):
    """Both exporters: BatchNormalization nodes, and the same values in onnxruntime."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, x = net(activation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = tmp_path / "net.onnx"
        torch.onnx.export(module, (x,), str(file), dynamo=dynamo)
    kinds = {node.op_type for node in onnx.load(str(file)).graph.node}
    assert kinds <= {"Conv", "BatchNormalization", "Relu", "Flatten", "Reshape", "Gemm", "Identity"}
    session = runtime.InferenceSession(str(file))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), module(x), rtol=1e-4, atol=1e-5)


@ACTIVATIONS
def test_fx(activation):
    """A call of the layer in the graph of a model, so its mode stays switchable; the formula where it is the root."""
    for module, x in all_layers(activation):
        agree(torch.fx.symbolic_trace(module), module, x)
    model, x = net(activation)
    traced = torch.fx.symbolic_trace(model)
    assert sum(isinstance(m, BATCH_NORM) for m in traced.modules()) == 2
    other = torchs(model)
    for training in (True, False):
        agree(traced.train(training), other.train(training), x)
    for a, b in zip(traced.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    if activation is None:
        with pytest.raises(ValueError, match="in eval mode only"):
            torch.fx.symbolic_trace(BatchNorm1d(6))
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor"):
        BatchNorm1d(6)([1.0])


@ACTIVATIONS
@pytest.mark.filterwarnings("ignore")
def test_quantization(activation):
    """`prepare_qat_fx` trains and converts; `prepare_fx` calibrates and converts: near the model in float."""
    quantization = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping

    engine = torch.backends.quantized.supported_engines[-1]
    model, x = net(activation)
    floats = model(x)
    prepared = quantization.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(engine), (x,))
    prepared(x)
    assert float((quantization.convert_fx(prepared)(x) - floats).abs().mean()) < 0.2 * float(floats.abs().mean())
    qat = quantization.prepare_qat_fx(copy.deepcopy(model).train(), get_default_qat_qconfig_mapping(engine), (x,))
    for _ in range(3):
        qat(x).sum().backward()
    steps = [int(b) for name, b in qat.named_buffers() if "num_batches_tracked" in name]
    assert steps == [6, 6]
    converted = quantization.convert_fx(copy.deepcopy(qat).eval())(x)
    assert converted.isfinite().all() and (activation is None or float(converted.min()) == 0)
    trained = {name: t for name, t in qat.state_dict().items() if name in model.state_dict()}
    assert not any(model.load_state_dict(trained))
    agree(qat.eval().apply(torch.ao.quantization.disable_fake_quant), model, x)
