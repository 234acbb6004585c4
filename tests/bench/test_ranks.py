"""What ranks owe is counted, and the conventions of gathering are told apart, at small sizes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import forked
from torch import nn

import sslkern
from bench import conventions, counter, gathered, ranks, report

SHAPES = {
    "vicreg": (4, 32),
    "barlow": (6, 32),
    "nt_xent": (8, 5),
}  # rows per rank and columns; the last two: N, D > 2 n
TALL = {"vicreg": (24, 16), "barlow": (24, 16)}  # at 2 ranks more rows than columns
CHOSEN = ("Barlow Twins official script", "VICReg official script", "VICReg sslkern", "Barlow Twins sslkern")


def test_counts_of_products():
    """Forward and backward of x @ w are three products; what they leave alive is the output and two gradients."""
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(7, 11, requires_grad=True)
    with counter.Counter(x, w) as counted:
        torch.autograd.grad((x @ w).sum(), (x, w))
    assert counted.flops == 3 * 2 * 5 * 7 * 11
    assert counted.received == 0
    assert 4 * (35 + 77) <= counted.peak <= 4 * (35 + 77 + 55 + 4)


def test_counts_of_storages():
    """A view is no memory, and what is gone does not count."""
    x = torch.zeros(100)
    with counter.Counter(x) as counted:
        y = x + 1
        y[10:].view(9, 10)
        del y
        z = x.double()
    assert counted.peak == z.untyped_storage().nbytes() == 800


@pytest.mark.parametrize("own", (True, False))
def test_counts_of_pairs(own):
    """Each pair once where both sides are the same: similarities, those again, and a product with them per side."""
    x, y = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    sides = (x,) if own else (x, y)
    with counter.Counter(x, y) as counted:
        torch.autograd.grad(sslkern.ops.pairwise_reduce(*sides).sum(), sides)
    assert counted.flops == (2 * 6 * 6 * 3 * (0.5 + 0.5 + 1) if own else 2 * 6 * 4 * 3 * (1 + 1 + 2))


@pytest.mark.parametrize("kernel", [name for name in sslkern.backend.declared() if "vicreg" in name or "corr" in name])
def test_kernels_have_a_count(kernel):
    assert kernel in counter.KERNELS


def test_counts_of_collectives():
    """A rank of 4 has a quarter of what it gathers already."""
    with ranks.simulated(4):
        x = torch.zeros(3, 5, requires_grad=True)
        with counter.Counter(x) as counted:
            rows = gathered.gathered_rows(x)
        assert rows.shape == (12, 5) and counted.received == 3 / 4 * 12 * 5 * 4
        with counter.Counter(x) as counted:
            gathered.reduced_sum(x)
        assert counted.received == 2 * 3 / 4 * 3 * 5 * 4
    assert not dist.is_initialized()


def of_rank():
    """All that two processes are asked for."""
    every = conventions.conventions()
    chosen = [k for k, c in enumerate(every) if f"{c.loss} {c.trainer}" in CHOSEN]
    return {
        "counts": ranks._all_measured(SHAPES),
        "tall": ranks._all_measured(TALL),
        "gradients": dict(zip(map(str, chosen), conventions.averaged(chosen), strict=True)),
    }


@pytest.fixture(scope="module")
def found():
    with forked():
        return ranks.processes(2, of_rank)


@pytest.mark.parametrize("shapes", ("counts", "tall"))
def test_a_simulated_rank_owes_what_a_real_one_does(found, shapes):
    with ranks.simulated(2):
        for name, shape in {"counts": SHAPES, "tall": TALL}[shapes].items():
            for way in ranks.WAYS:
                simulated = ranks.counted(name, way, shape)
                for rank in found:
                    real = rank[shapes][f"{name} {way}"]
                    assert real["flops"] == simulated["flops"] > 0, (name, way)
                    assert real["bytes"] == simulated["bytes"] > 0, (name, way)
                    assert real["allocated_bytes"] > 0


def test_ours_owes_less(found):
    """Where the joint batch has fewer rows than columns, of everything."""
    for name in ("vicreg", "barlow"):
        published, ours = (found[0]["counts"][f"{name} {way}"] for way in ranks.WAYS)
        assert ours["flops"] < published["flops"] and ours["bytes"] < published["bytes"]


def test_conventions(found):
    """A sum that the gradient knows nothing of leaves 1/W of it; the others, and ours, are the joint batch's."""
    every = conventions.conventions()
    for k, gradient in found[0]["gradients"].items():
        convention = every[int(k)]
        row = conventions.row(convention, gradient)
        assert abs(row["ratio"] - convention.expected) < 1e-12, row
        assert abs(row["cosine"] - 1) < 1e-12, row
        assert convention.expected == (0.5 if "raw" in convention.how else 1.0)


def test_trainers_of_one_process_agree():
    """Without ranks, the ways of the trainers are the losses that they are about."""
    joint, weights = conventions._batch()
    a, b = (z @ weights for z in joint)
    expected = {"VICReg": sslkern.vicreg_loss(a, b), "NT-Xent": sslkern.nt_xent_loss(a, b)}
    for c in conventions.conventions():
        if c.trainer in ("official script", "lightly", "stable-pretraining") and c.loss in expected:
            torch.testing.assert_close((c.of_joint or c.of_rank)(a, b), expected[c.loss], rtol=1e-12, atol=0)
        elif (c.trainer, c.loss) == ("solo-learn", "NT-Xent"):
            torch.testing.assert_close(c.of_rank(a, b), sslkern.nt_xent_loss(a, b, 0.1), rtol=1e-12, atol=0)
        elif (c.trainer, c.loss) == ("official script", "Barlow Twins"):
            torch.testing.assert_close(c.of_rank(a, b), sslkern.barlow_twins_loss(a, b), rtol=1e-12, atol=0)


def test_tables():
    """A table has a row per loss and number of ranks, and no speed-up beside an error that is too large."""
    rows = ranks.count({name: SHAPES[name] for name in ("vicreg", "barlow")}, simulate=(2, 8), run=())
    results = {"machine": {"torch": torch.__version__}, "commit": "-", "rows": rows}
    text = ranks.table(results)
    assert text.count("| simulated |") == 4 and "| VICReg | 8 | 32 x 32 |" in text
    timed = [{"way": "published", "median": 4.0, "grad_error": 1e-7}, {"way": "sslkern", "median": 1.0}]
    assert ranks.faster([timed[0], timed[1] | {"grad_error": 1e-7}]) == "4.0x"
    assert ranks.faster([timed[0], timed[1] | {"grad_error": 1e-3}]) == "-"


def test_into_document(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- ranks: begin -->\nold\n<!-- ranks: end -->\nafter\n")
    report.into_document(document, "ranks", "new\n")
    assert document.read_text() == "before\n<!-- ranks: begin -->\nnew\n<!-- ranks: end -->\nafter\n"
    with pytest.raises(SystemExit, match="no lines"):
        report.into_document(document, "conventions", "new\n")


def test_standardised_as_batch_norm():
    z = torch.randn(9, 4, dtype=torch.float64)
    expected = nn.BatchNorm1d(4, affine=False, dtype=torch.float64)(z)
    torch.testing.assert_close(conventions._synced(z), expected)
    assert F.mse_loss(conventions._std_plus_eps(z).std(0), torch.ones(4, dtype=torch.float64)) < 1e-8
