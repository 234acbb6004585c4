"""The callback of Lightning's Trainer that probes the layers, without Lightning."""

import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from sslkern.analysis import LayerwiseProbeCallback

LOADER = [(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)]


class Logged(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.drop, self.fc = nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.drop(self.stem(x)))

    def log(self, name, value):
        self.seen[name] = value


def test_the_callback(monkeypatch):
    """It probes every second epoch and logs each layer; it is a Callback of Lightning where that is imported."""
    net = Logged()
    callback = LayerwiseProbeCallback(LOADER, part="fc", every_n_epochs=2, prefix="cut", validation=LOADER)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net.seen = {}
        callback.on_train_epoch_end(SimpleNamespace(current_epoch=1), net)
    callback = LayerwiseProbeCallback(LOADER, every_n_epochs=2, prefix="cut", validation=LOADER, layers=["stem", "fc"])
    for epoch in range(4):
        net.seen = {}
        callback.on_train_epoch_end(SimpleNamespace(current_epoch=epoch), net)
        assert list(net.seen) == (["cut/stem", "cut/fc"] if epoch % 2 else [])
    assert net.seen["cut/fc"] == float(callback.result.best_accuracy[1]) and net.training
    for settings, said in (({"every_n_epochs": 0}, "every_n_epochs must be"), ({"part": 3}, "part must be a string")):
        with pytest.raises((TypeError, ValueError), match=said):
            LayerwiseProbeCallback(LOADER, **settings)
    assert "lightning" not in sys.modules

    class Callback:
        def on_fit_start(self):
            return "theirs"

    fake = ModuleType("lightning.pytorch")
    fake.Callback = Callback
    monkeypatch.setitem(sys.modules, "lightning.pytorch", fake)
    for made_here in (
        LayerwiseProbeCallback([1], part="x"),
        pickle.loads(pickle.dumps(LayerwiseProbeCallback([1], part="x"))),
    ):
        assert isinstance(made_here, LayerwiseProbeCallback) and isinstance(made_here, Callback)
        assert made_here.on_fit_start() == "theirs" and made_here.part == "x" and made_here.loader == [1]
