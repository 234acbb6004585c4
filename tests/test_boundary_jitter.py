"""The jitter of boundaries over mini-batches, against sigma / sqrt(B)."""

import copy

import pytest
import torch
from test_analysis_batch_norm import DIGITS, NETS, Images, normed

from sslkern.analysis import boundary_jitter, fit_batch_norm_


@pytest.mark.parametrize("replacement", (False, True))
@pytest.mark.parametrize("size", (1, 16, 600))
def test_it_is_sigma_by_the_root_of_the_batch_size(size, replacement):
    """Within 2 % for each layer, with the factor of a finite population."""
    net = fit_batch_norm_(normed(64, 32, 32), DIGITS)
    result = boundary_jitter(net, DIGITS, size, n_batches=4000, replacement=replacement, random_state=0)
    assert result.layers == ("1", "4") and (result.ratio - 1).abs().max() < 0.02, result.table()
    h = net[0](DIGITS).detach()
    left = 1 if replacement else (len(h) - size) / (len(h) - 1)
    torch.testing.assert_close(result.expected[0], h.var(0, unbiased=False).sqrt() * (left / size) ** 0.5)


def test_without_the_factor_a_large_batch_would_be_off():
    result = boundary_jitter(normed(64, 8), DIGITS, 1200, random_state=0)
    naive = result.expected[0] / ((1797 - 1200) / 1796) ** 0.5
    assert float((result.measured[0] / naive).square().mean().sqrt()) < 0.65
    whole = boundary_jitter(normed(64, 8), DIGITS, 1797, n_batches=5, random_state=0)
    assert whole.expected[0].max() == 0 and whole.measured[0].max() < 1e-12


def test_images_are_the_samples_of_a_convolution():
    """The mean of an image is one sample: the pixels of an image are not independent."""
    net = fit_batch_norm_(Images().double(), DIGITS)
    result = boundary_jitter(net, DIGITS, 16, n_batches=4000, random_state=0)
    assert result.layers == ("first.1.0", "block.norm")
    assert (result.ratio - 1).abs().max() < 0.02, result.table()
    h = net.first[0](DIGITS.view(-1, 1, 8, 8)).detach()
    naive = h.transpose(0, 1).flatten(1).std(1) / (16 * 36) ** 0.5
    assert (result.measured[0] / naive - 1).abs().max() > 0.2


def test_in_training_later_layers_jitter_less():
    """The first layer is as with running statistics. A batch norm removes the mean of the mini-batch, so what later
    layers see jitters less."""
    net = fit_batch_norm_(normed(64, 32, 32), DIGITS)
    running, training = (
        boundary_jitter(net, DIGITS, 32, n_batches=500, training=t, random_state=0) for t in (False, True)
    )
    torch.testing.assert_close(running.measured[0], training.measured[0], rtol=1e-9, atol=1e-12)
    assert training.ratio[1] < 0.5 < running.ratio[1]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", (False, True))
def test_a_network_stays_as_it_is(name, training):
    net = NETS[name]().train()
    net(DIGITS.clone().requires_grad_()).sum().backward()
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    rest = [dict(vars(part)) for part in net.modules()]
    state = torch.get_rng_state()
    first, second = (boundary_jitter(net, DIGITS, 8, n_batches=20, training=training, random_state=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.measured, second.measured, strict=True))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert all(
        torch.equal(a, p.grad) for a, p in zip(grads, [p for p in net.parameters() if p.grad is not None], strict=True)
    )
    assert rest == [dict(vars(part)) for part in net.modules()] and torch.equal(state, torch.get_rng_state())
    assert len(first.table().splitlines()) == len(first.layers) + 1


def test_plot():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    result = boundary_jitter(normed(64, 8, 6), DIGITS, 8, n_batches=20, random_state=0)
    axes = result.plot()
    assert result.plot(axes) is axes and "pre-activation" in axes.get_xlabel()
    plt.close("all")
