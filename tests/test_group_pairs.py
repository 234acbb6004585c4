"""Losses of all pairs, and HSIC, over several processes against one on the joint batch in fp64."""

import time
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from contrastive import cosines
from group_pairs import (
    COLUMNS,
    LABELS,
    LOSSES,
    ROWS,
    masked,
    no_rows,
    of_patches,
    rows,
    taught,
    to_codes,
    value_and_grad,
)
from ranks import TOLERANCE, Collectives, assert_joint, close, divisions, mean_over_ranks, mine, normal, run
from torch.nn import functional as F

from sslkern import metrics
from sslkern.distributed import over
from sslkern.losses import (
    byol_loss,
    info_nce_loss,
    nt_xent_loss,
    sigmoid_loss,
    sigreg_loss,
    simple_contrastive_loss,
    spectral_contrastive_loss,
)
from sslkern.losses import supervised_contrastive_loss as supervised


def joint():
    """Every loss in its main settings: the mean of the values, and the gradients of the rows; in more than two
    processes, the dtypes in turn."""
    dtypes = list(TOLERANCE)
    for k, (case, (loss, inputs)) in enumerate(LOSSES.items()):
        for dtype in dtypes if dist.get_world_size() == 2 else (dtypes[k % len(dtypes)],):
            assert_joint(loss, inputs, dtype, case)
        with patch("ranks.divisions", no_rows):
            assert_joint(loss, inputs, torch.float64, case)


MAIN = (
    *("nt_xent", "info_nce, symmetric", "supervised", "sigmoid", "spectral by rows", "simple, beta", "byol", "sigreg"),
    *("hsic", "dhsic"),
    *("nt_xent", "info_nce, symmetric", "supervised", "sigmoid", "spectral by rows", "simple, beta", "byol"),
    *("swav", "dino", "msn", "hsic", "dhsic"),
)


def half():
    """bfloat16 rows: arithmetic in float32, gradients rounded once."""
    for case in MAIN:
        assert_joint(*LOSSES[case], torch.bfloat16, case, tolerance=2**-8)


def by_lists(z, group, counts=None):
    """Positives on the same rank: the next two rows, with one of them missing now and then."""
    counts = counts or [len(z)]
    index = torch.cat([torch.arange(n)[:, None] + torch.tensor([1, 2]) for n in counts]).where(
        torch.cat([(torch.arange(n)[:, None] + torch.tensor([1, 2])) < n for n in counts]), -1
    )
    before = torch.cat([torch.full((n, 1), sum(counts[:r])) for r, n in enumerate(counts)])
    return supervised(z, positives=index.where(index < 0, index + before), temperature=0.3, group=group)


def own_places():
    """Places among the rank's own rows and keys, of which there may be more than queries."""
    me, size = dist.get_rank(), dist.get_world_size()
    for counts in (*divisions(ROWS), *no_rows(ROWS)):
        (z,) = rows(1)
        leaf = z.clone().requires_grad_()
        expected = by_lists(leaf, None, counts)
        (gradient,) = torch.autograd.grad(expected, leaf)
        own = mine(z, counts).requires_grad_()
        value = by_lists(own, "world")
        close(mean_over_ranks(value), expected, 1e-12, (counts, "lists"))
        close(torch.autograd.grad(value, own)[0] / size, mine(gradient, counts), 1e-12, (counts, "lists"))

        many = [2 * n + r for r, n in enumerate(counts)]
        q, k = normal(ROWS, COLUMNS), normal(sum(many), COLUMNS)
        for given in (True, False):
            places = [sum(many[:r]) + (2 * i + 1 if given else i) for r, n in enumerate(counts) for i in range(n)]
            leaves = [x.clone().requires_grad_() for x in (q, k)]
            expected = info_nce_loss(*leaves, 0.3, positives=torch.tensor(places))
            gradients = torch.autograd.grad(expected, leaves)
            own = [mine(q, counts).requires_grad_(), mine(k, many).requires_grad_()]
            chosen = 2 * torch.arange(counts[me]) + 1 if given else None
            value = info_nce_loss(*own, 0.3, positives=chosen, group="world")
            close(mean_over_ranks(value), expected, 1e-12, (counts, given))
            for found, gradient, parts in zip(torch.autograd.grad(value, own), gradients, (counts, many), strict=True):
                close(found / size, mine(gradient, parts), 1e-12, (counts, given))


COEFFICIENTS = {
    "nt_xent": (lambda a, b, t, group: nt_xent_loss(a, b, t, group=group), 2, (0.3,)),
    "bank": (lambda a, b, t, bank, group: nt_xent_loss(a, b, t, negatives=bank, group=group), 2, (0.3, normal(7, 5))),
    "info_nce": (lambda a, b, t, group: info_nce_loss(a, b, t, group=group), 2, (0.3,)),
    "clip": (lambda a, b, t, group: info_nce_loss(a, b, scale=t.exp(), symmetric=True, group=group), 2, (1.5,)),
    "supervised": (lambda z, labels, t, group: supervised(z, labels, None, t, group=group), 1, (0.3,)),
    "sigmoid": (lambda a, b, t, c, group: sigmoid_loss(a, b, t, c, group=group), 2, (5.0, -2.0)),
    "swav": (lambda a, b, c, w, group: to_codes(a, b, c, group, w), 3, (normal(7, 5),)),
    "dino": (lambda a, b, c, w, group: taught(a, b, c, group, w), 3, (normal(7, 5),)),
    "ibot": (lambda a, b, w, group: of_patches(a, b, group, w), 2, (normal(7, 5),)),
    "msn": (lambda a, b, c, w, group: masked(a, b, c, group, w, iterations=2), 3, (normal(7, 5),)),
    "simple": (lambda a, b, t, group: simple_contrastive_loss(a, b, t, group=group), 2, (0.7,)),
    "hsic": (lambda a, b, t, group: metrics.hsic(a, b, bandwidth=t, group=group), 2, (0.9,)),
    "dhsic": (lambda a, b, t, group: metrics.dhsic(a, b, bandwidth=(t, None), group=group), 2, (0.9,)),
}


def coefficients():
    """Parameters that all ranks have: the mean of their gradients is that of the joint batch."""
    for case, (loss, number, values) in COEFFICIENTS.items():
        inputs = [*rows(number), LABELS] if case == "supervised" else rows(number)
        leaves = [torch.as_tensor(v, dtype=torch.float64).clone().requires_grad_() for v in values]
        expected = torch.autograd.grad(loss(*inputs, *leaves, group=None), leaves)
        for counts in (*divisions(ROWS), *no_rows(ROWS)):
            own = [mine(x, counts) for x in inputs]
            gradients = torch.autograd.grad(loss(*own, *leaves, group="world"), leaves)
            for found, gradient in zip(gradients, expected, strict=True):
                close(mean_over_ranks(found), gradient, 1e-12, (case, counts))


def transported():
    """bfloat16 on the way: to its precision, in more than two processes of the main losses; and by the definition, own
    rows as they are against rounded ones."""
    group = over(transport=torch.bfloat16)
    for case in LOSSES if dist.get_world_size() == 2 else MAIN:
        assert_joint(*LOSSES[case], torch.float32, case, group=group, tolerance=2e-2)
    q, k = rows(2)
    t = cosines(q, k).diagonal()
    x, y = F.normalize(q, dim=1), F.normalize(k, dim=1).bfloat16().double()
    logits = (x @ y.T).diagonal_scatter(t) / 0.3
    for symmetric in (False, True):
        expected = F.cross_entropy(logits, torch.arange(ROWS))
        if symmetric:
            expected = (expected + F.cross_entropy(logits.T, torch.arange(ROWS))) / 2
        for counts in divisions(ROWS):
            own = [mine(z, counts) for z in (q, k)]
            value = info_nce_loss(*own, 0.3, symmetric=symmetric, group=group)
            close(mean_over_ranks(value), expected, 1e-12, (symmetric, counts, "rounded keys"))


def alone():
    """A group of one gives the bits of no group."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    for case, (loss, inputs) in LOSSES.items():
        results = [value_and_grad(loss, inputs, group) for group in (groups[dist.get_rank()], None)]
        assert all(map(torch.equal, *results)), case


def stacked():
    """HSIC of each slice of a stack."""
    for function in (metrics.hsic, partial(metrics.hsic, kernel="linear", estimator="unbiased"), metrics.dhsic):

        def loss(x, y, group, function=function):
            values = function(x, y, group=group)
            assert values.shape == (2, 3)
            return (values * torch.arange(1.0, 7.0, dtype=values.dtype).view(2, 3)).sum()

        inputs = [normal(2, 3, ROWS, 2), normal(2, 3, ROWS, 4)]
        assert_joint(loss, inputs, torch.float64, (function, "stack"), dim=-2)
        with patch("ranks.divisions", no_rows):
            assert_joint(loss, inputs, torch.float64, (function, "stack"), dim=-2)


GATHERED, SCATTERED, REDUCED = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"
TRAFFIC = {
    "nt_xent, 3 views": ([GATHERED], [SCATTERED]),
    "nt_xent, bank": ([], []),
    "info_nce": ([GATHERED], [SCATTERED]),
    "info_nce, symmetric": ([GATHERED, REDUCED, REDUCED], [REDUCED, SCATTERED]),
    "supervised": ([GATHERED, GATHERED, REDUCED], [SCATTERED]),
    "sigmoid": ([GATHERED], [SCATTERED]),
    "spectral by rows": ([GATHERED], [SCATTERED]),
    "spectral by columns": ([REDUCED], [REDUCED]),
    "simple": ([REDUCED], [REDUCED]),
    "byol": ([], []),
    "negative cosine": ([], []),
    "alignment and uniformity": ([GATHERED, REDUCED, REDUCED], [REDUCED, SCATTERED]),
    "macl": ([REDUCED, GATHERED], [SCATTERED]),
    "kernel alignment": ([], []),
    "gram anchoring": ([], []),
    "detcon": ([GATHERED], [SCATTERED]),
    "koleo": ([GATHERED], [SCATTERED]),
    "sigreg": ([REDUCED], [REDUCED]),
    "sigreg, drawn": (["broadcast", REDUCED], [REDUCED]),
    "sigreg, all directions": ([GATHERED], [SCATTERED]),
    "lejepa": ([REDUCED], [REDUCED]),
    "swav": ([REDUCED] * 8, []),
    "dino": ([], []),
    "ibot": ([], []),
    "msn": ([REDUCED], []),
    "msn, equal": ([REDUCED] * 3, []),
    "hsic": ([GATHERED, REDUCED], [REDUCED, SCATTERED]),
    "hsic, linear": ([GATHERED, REDUCED, REDUCED], [REDUCED, REDUCED]),
    "dhsic": ([GATHERED, REDUCED], [REDUCED, SCATTERED]),
}


def collectives():
    """What is exchanged, and that a promise of even batches saves the counts and changes no bits."""
    size = dist.get_world_size()
    for case, (forward, backward) in TRAFFIC.items():
        loss, inputs = LOSSES[case]
        counts = [ROWS // size] * size
        own = [mine(x[: sum(counts)], counts) for x in inputs]
        own = [x.requires_grad_() if x.is_floating_point() else x for x in own]
        with Collectives() as called:
            value = loss(*own, group=over(even=True))
            assert called.names == forward, (case, called.names)
            value.backward()
            assert called.names == forward + backward, (case, called.names)
        assert torch.equal(value, loss(*own, group="world")), case


def one_row():
    """A joint batch of one row, on the last rank: as alone, and no gradient is NaN."""
    last = dist.get_rank() == dist.get_world_size() - 1
    for case in (
        "nt_xent",
        "info_nce",
        "info_nce, symmetric",
        "supervised",
        "sigmoid",
        "spectral by rows",
        "byol",
        "sigreg",
        "sigreg, all directions",
    ):
        loss, inputs = LOSSES[case]
        expected, *gradients = value_and_grad(loss, [x[:1] for x in inputs], None)
        value, *found = value_and_grad(loss, [x[: int(last)] for x in inputs], "world")
        close(mean_over_ranks(value), expected, 1e-12, case, scale=1.0)
        for f, gradient in zip(found, gradients, strict=True):
            close(f / dist.get_world_size(), gradient[: int(last)], 1e-12, case, scale=1e-3)


A, INT = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
REFUSED = {
    "views": (lambda g: nt_xent_loss(A, A[:2], group=g), ValueError, "a and b must have the same shape"),
    "others": (lambda g: nt_xent_loss(A, A, others=3, group=g), TypeError, "others must be a list or tuple"),
    "temperature": (lambda g: nt_xent_loss(A, A, 0.0, group=g), ValueError, "temperature must be"),
    "bank": (lambda g: nt_xent_loss(A, A, negatives=A[:, :2], group=g), ValueError, "negatives must have shape"),
    "keys": (lambda g: info_nce_loss(A, A[:2], group=g), ValueError, "k must have a row for every row of q"),
    "places": (lambda g: info_nce_loss(A, A, positives=INT + 4, group=g), ValueError, "positives must be in"),
    "no labels": (lambda g: supervised(A, group=g), ValueError, "Give labels or positives"),
    "labels": (lambda g: supervised(A, INT[:2], group=g), ValueError, "labels must have shape"),
    "list": (lambda g: sigmoid_loss([1.0], A, group=g), TypeError, "a must be a torch.Tensor"),
    "mu": (lambda g: spectral_contrastive_loss(A, A, 0.0, group=g), ValueError, "mu must be"),
    "kernel": (lambda g: metrics.hsic(A, A, "cosine", group=g), ValueError, "kernel must be one of"),
    "bandwidth": (lambda g: metrics.hsic(A, A, bandwidth=0.0, group=g), ValueError, "bandwidth must be"),
    "one variable": (lambda g: metrics.dhsic(A, group=g), ValueError, "variables must be two or more"),
}
FINE = {"kernel": metrics.hsic, "bandwidth": metrics.hsic, "one variable": metrics.dhsic, "list": sigmoid_loss}
FINE |= {"keys": info_nce_loss, "places": info_nce_loss, "mu": spectral_contrastive_loss}
FINE |= {"no labels": lambda z, _, group: supervised(z, INT, group=group)}
FINE["labels"] = FINE["no labels"]
DIFFERENT = {
    "columns": lambda r, g: nt_xent_loss(*[torch.ones(4, 3 + (r == 0))] * 2, group=g),
    "views": lambda r, g: nt_xent_loss(A, A, others=[A] * r, group=g),
    "many views": lambda r, g: nt_xent_loss(A, A, others=[A] * (9 + r), group=g),
    "dtypes": lambda r, g: sigmoid_loss(*[A.to(torch.float64 if r else torch.float32)] * 2, group=g),
    "key columns": lambda r, g: info_nce_loss(*[torch.ones(4, 3 + (r == 0))] * 2, group=g),
    "gradients": lambda r, g: supervised(A.clone().requires_grad_(r == 0), INT, group=g),
    "variables": lambda r, g: metrics.dhsic(*[A] * (2 + r), group=g),
    "leading": lambda r, g: metrics.hsic(*[torch.ones(1 + (r == 0), 4, 3)] * 2, group=g),
}
NONE = {
    "nt_xent": (lambda g: nt_xent_loss(A[:0], A[:0], group=g), "at least 1 rows"),
    "info_nce": (lambda g: info_nce_loss(A[:0], A[:0], group=g), "at least 1 rows"),
    "simple": (lambda g: simple_contrastive_loss(A[:0], A[:0], group=g), "at least 2 rows"),
    "byol": (lambda g: byol_loss(A[:0], A[:0], group=g), "at least 1 rows"),
    "sigreg": (lambda g: sigreg_loss(A[:0], group=g), "at least 1 rows"),
    "hsic": (lambda g: metrics.hsic(A[:0], A[:0], group=g), "at least 2 rows"),
    "unbiased": (lambda g: metrics.hsic(A[:0], A[:0], estimator="unbiased", group=g), "at least 4 rows"),
}


def refused():
    """Bad input on one rank, ranks that differ, and no rows at all: a sentence on each of them, at once."""
    rank, start = dist.get_rank(), time.monotonic()
    for case, (bad, error, sentence) in REFUSED.items():
        if rank == 0:
            with pytest.raises(error, match=sentence):
                bad("world")
        else:
            with pytest.raises(RuntimeError, match="Invalid input on rank 0"):
                FINE.get(case, nt_xent_loss)(A, A, group="world")
    for call in DIFFERENT.values():
        with pytest.raises(ValueError, match="all ranks of a group must be given"):
            call(rank, "world")
    for call, sentence in NONE.values():
        with pytest.raises(ValueError, match=sentence):
            call("world")
    with pytest.raises(ValueError, match="at least 2 rows"):
        nt_xent_loss(A[: int(rank == 0)], A[: int(rank == 0)], decoupled=True, group="world")
    assert time.monotonic() - start < 30


def compiled():
    """Whole, without a graph break: eager's values and gradients, of even batches. What is exchanged as for nt_xent is
    traced alone, as a compiler gets it."""
    compilers = dict.fromkeys(("nt_xent", "info_nce, symmetric", "supervised", "spectral by columns"), "aot_eager")
    compilers |= dict.fromkeys(("sigmoid", "spectral by rows", "simple, beta", "sigreg, all directions"), "eager")
    for case, compiler in compilers.items():
        loss, inputs = LOSSES[case]
        n = ROWS // dist.get_world_size()
        own = [mine(x[: n * dist.get_world_size()], [n] * dist.get_world_size()) for x in inputs]
        torch._dynamo.reset()
        whole = torch.compile(loss, fullgraph=True, backend=compiler)
        results = [value_and_grad(function, own, "world") for function in (whole, loss)]
        for found, expected in zip(*results, strict=True):
            close(found, expected, 1e-12, (case, "compiled"), scale=1e-3)


CHECKS = (joint, half, own_places, coefficients, transported, alone, stacked, collectives, one_row, refused)


@pytest.mark.parametrize(("size", "checks"), ((2, (*CHECKS, compiled)), (4, CHECKS)), ids=("2", "4"))
def test_ranks_are_one(size, checks, tmp_path):
    """All of CHECKS, in some processes over gloo."""
    run(size, checks, tmp_path)
