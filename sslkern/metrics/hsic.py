"""Statistical dependence by kernels: the Hilbert-Schmidt independence criterion, without a kernel matrix."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import _torch
from ..ops import _checks, _joint
from ..ops._rows import precision
from ..ops.kernel_matmul import rbf_scale
from ..ops.pairwise_reduce import pairwise_reduce
from ..train import distributed
from ..train.distributed import Peers

Kernel = Literal["rbf", "linear"]
Estimator = Literal["biased", "unbiased"]
_LIBRARY, _OPS = torch.library.Library("sslkern", "FRAGMENT"), torch.ops.sslkern
_KERNELS, _ESTIMATORS = get_args(Kernel), get_args(Estimator)
_MOST_ROWS = 1000  # of the median heuristic: half a million distances


def median_bandwidth(x: Tensor) -> Tensor:
    r"""The median heuristic: the median of |x_i - x_j| over the pairs i < j; the lower of the two middle ones.

    Exact up to 1000 rows; of more, over the 1000 evenly spaced rows floor(k N / 1000): the same ones every time. A
    median of 0 gives 1.

    Args:
        x: (..., N, D), float32, bfloat16, float16 or float64, any strides, N >= 2.

    Returns:
        (...), float32 (float64 for float64), in units of x, > 0, detached; NaN where a distance is.

    Raises:
        TypeError, ValueError: one sentence, before any work.

    Source: Gretton et al., A kernel two-sample test (2012), section 8.
    """
    _checks.matrix_stack("x", x, min_rows=2)
    n = x.shape[-2]
    rows = x.detach().to(precision(x))
    if n > _MOST_ROWS:
        rows = rows[..., torch.arange(_MOST_ROWS, device=x.device) * n // _MOST_ROWS, :]
    traced = torch.compiler.is_compiling() or _torch.transforms_active()
    median = (_OPS.median_distance if traced else _median_distance)(rows)
    return torch.where(median == 0, 1, median)


def _median_distance(rows: Tensor) -> Tensor:
    """Slice by slice: the distances of a stack of features together would outgrow everything else."""
    medians = [torch.pdist(part).median() for part in rows.reshape(-1, *rows.shape[-2:])]
    return torch.stack(medians).view(rows.shape[:-2]) if medians else rows.new_empty(rows.shape[:-2])


# An op, for the loop over the slices is not to be unrolled by a compiler, and pdist knows neither stacks nor vmap.
_LIBRARY.define("median_distance(Tensor rows) -> Tensor")
_LIBRARY.impl("median_distance", _median_distance, "CompositeExplicitAutograd")
torch.library.register_fake("sslkern::median_distance", lambda rows: rows.new_empty(rows.shape[:-2]), lib=_LIBRARY)
torch.library.register_vmap(
    "sslkern::median_distance",
    lambda info, dims, rows: (_OPS.median_distance(rows.movedim(dims[0], 0)), 0),
    lib=_LIBRARY,
)


def hsic(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = "rbf",
    estimator: Estimator = "biased",
    bandwidth: float | Tensor | tuple[Any, Any] | None = None,
    *,
    group: distributed.Group = None,
) -> Tensor:
    r"""HSIC of the paired rows of x and y: 0 in expectation if they are independent, and, by "rbf", only then.

    With K and L the kernel matrices of x and y, rK and rL their row sums, and H = I - 11'/N:

        biased      Tr(KHLH)/(N-1)^2 = [sum K o L - (2/N) rK.rL + (sum K)(sum L)/N^2] / (N-1)^2
        unbiased    [sum K o L + (sum K)(sum L)/((N-1)(N-2)) - 2/(N-2) rK.rL] / (N(N-3)), with zeroed diagonals

        rbf         k(u, v) = exp(-|u - v|^2 / (2 bandwidth^2))
        linear      k(u, v) = <u, v>, whose biased HSIC is ||C_xy||_F^2, C_xy = Xc'Yc/(N-1)

    The sums of "rbf" are streamed, in O(N D) memory; "linear" takes the smaller of the cross-covariance and the two
    N x N Grams, in float64. Terms, which cancel, are combined in float64.

    Args:
        x: (..., N, D1), float32, bfloat16, float16 or float64, any strides; N >= 2, and N >= 4 when unbiased.
        y: (..., N, D2), of x's leading dimensions, N and device, in any of these dtypes.
        kernel: "rbf" or "linear".
        estimator: "biased", which is >= 0, or "unbiased", which may be negative.
        bandwidth: for "rbf", in units of x and y: a number > 0, or a floating tensor of one, or of several that
            broadcasts to (...), with a gradient; or None for `median_bandwidth`; or a pair of these, for x and for y.
        group: None, this process alone; "world", a torch.distributed.ProcessGroup, or
            `sslkern.train.distributed.over` of one. Each rank gives its own rows, equally many or not, or none, and
            every rank returns the number of the joint batch, and so does their mean; so gradients averaged over the
            ranks, as DistributedDataParallel does, are those of the joint batch.
            N, and the bandwidth of None, are those of the joint batch. For "rbf" all rows travel, and each rank sums
            the pairs of its own ones, in float64; for "linear" the N x N Grams likewise, and the cross-covariance is
            added up.

    Returns:
        (...), float32, or float64 if x or y is float64; dimensionless for "rbf", in units of x^2 y^2 for "linear";
        differentiable by x and y, once for "rbf". The bandwidth of None is a constant to the gradient.

    Raises:
        TypeError, ValueError: one sentence, before any work. With a group, bad input on one rank raises on all.

    Sources: Gretton et al., Measuring statistical dependence with Hilbert-Schmidt norms (2005), for the biased form;
    Song et al., Feature selection via dependence maximization (2012), for the unbiased one.
    """
    peers = distributed.peers_of(group)
    if peers is not None:
        return _joint_hsic(x, y, kernel, estimator, bandwidth, peers)
    _check_settings(kernel, estimator, bandwidth)
    _check_paired([("x", x), ("y", y)], _least_rows(estimator))
    n, dtype = x.shape[-2], precision(x, y)
    x, y = _of_one_dtype((x, y))
    if kernel == "linear":
        xc, yc = _centred(x), _centred(y)
        # equal by ||X'Y||_F^2 = <XX', YY'>_F; of the two, the one with less work also fits in the inputs' memory
        if _by_columns(x, y, n):
            product = (xc.mT @ yc).square().sum((-2, -1))
        else:
            product = ((xc @ xc.mT) * (yc @ yc.mT)).sum((-2, -1))
        diagonals = [z.square().sum(-1)[..., None, :] for z in (xc, yc)]
        sums = [torch.zeros_like(q) for q in diagonals]  # of centred rows
        found = _combine(product[..., None, None], sums, diagonals, estimator)
        return found[..., 0, 0].to(dtype)
    scales = _scales(bandwidth, [("x", x), ("y", y)])
    width = max(x.shape[-1], y.shape[-1])
    # autocast does not let float16 be stacked where its own dtype is bfloat16, nor the other way around
    stack = torch.stack([torch.nn.functional.pad(z.to(dtype), (0, width - z.shape[-1])) for z in (x, y)], -3)
    gram, rows = _rbf_sums(stack, torch.stack(scales, -1))
    sums = [rows[..., :1, :], rows[..., 1:, :]]
    found = _combine(gram[..., :1, 1:], sums, [torch.ones_like(r) for r in sums], estimator)
    return found[..., 0, 0].to(dtype)


def pairwise_hsic(
    z: Tensor,
    kernel: Kernel = "rbf",
    estimator: Estimator = "biased",
    bandwidth: float | Tensor | None = None,
    *,
    normalized: bool = False,
) -> Tensor:
    r"""HSIC of every pair of single features: entry (i, j) is `hsic(z[:, i:i+1], z[:, j:j+1])`.

    Every pair of rows is visited once, for all D kernels together: O(N D + D^2) memory, where D kernel matrices take
    D N^2. With `normalized`, divided by sqrt(HSIC_ii HSIC_jj), between 0 and 1 if biased; and 0 for a feature, itself
    included, that is constant or, by "rbf", has an HSIC_ii of rounding alone, below 1e-14.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides; N >= 2, and N >= 4 when unbiased.
        kernel, estimator: as in `hsic`.
        bandwidth: for "rbf", in units of z: a number > 0, or a floating tensor of one, or of several that broadcasts to
            (..., D), with a gradient; or None for the `median_bandwidth` of each feature.
        normalized: as above.

    Returns:
        (..., D, D), float32 (float64 for float64); differentiable as `hsic`.

    Raises:
        TypeError, ValueError: one sentence, before any work.

    Source: Mialon et al., Variance-covariance regularization enforces pairwise independence (2209.14905).
    """
    _check_settings(kernel, estimator, bandwidth)
    _checks.flag("normalized", normalized)
    _checks.matrix_stack("z", z, min_rows=_least_rows(estimator))
    if isinstance(bandwidth, tuple):
        raise TypeError("bandwidth must be a number, a torch.Tensor or None for all features, got a tuple.")
    if kernel == "linear":
        zc = _centred(z)
        product, diagonal = (zc.mT @ zc).square(), zc.mT.square()
        rows = torch.zeros_like(diagonal)
    else:
        features = z.mT[..., None]
        product, rows = _rbf_sums(features, _scales(bandwidth, [("z", features)])[0])
        diagonal = torch.ones_like(rows)
    out = _combine(product, [rows, rows], [diagonal, diagonal], estimator)
    if normalized:
        own = out.diagonal(dim1=-2, dim2=-1)
        none = own <= (1e-14 if kernel == "rbf" else 0)  # by rbf, 1 - 1 in float64; of centred rows, 0
        norm = own.masked_fill(none, 1).sqrt()
        out = out / (norm[..., :, None] * norm[..., None, :])
        out = out.masked_fill(none[..., :, None] | none[..., None, :], 0)
    return out.to(precision(z))


def dhsic(
    *variables: Tensor,
    bandwidth: float | Tensor | tuple[Any, ...] | None = None,
    group: distributed.Group = None,
) -> Tensor:
    r"""dHSIC: the joint dependence of d variables, by Gaussian kernels.

    With K^d the kernel matrix of the d-th variable, exp(-|u - v|^2 / (2 bandwidth_d^2)):

        mean_ij prod_d K^d_ij + prod_d mean_ij K^d_ij - (2/N) sum_i prod_d mean_j K^d_ij

    which for two variables is (N-1)^2/N^2 times their biased `hsic`. The product of Gaussians is the Gaussian of the
    variables side by side, so each term is a streamed sum, in O(N sum D) memory; products are taken in float64.

    Args:
        variables: two or more (..., N, D_d) of the same leading dimensions, N >= 2, and device; each float32, bfloat16,
            float16 or float64, any strides.
        bandwidth: in units of the variables: a number > 0, or a floating tensor of one, or of several that broadcasts
            to (...), with a gradient; or None for `median_bandwidth`; or a tuple with one of these for each variable.
        group: None, this process alone; "world", a torch.distributed.ProcessGroup, or
            `sslkern.train.distributed.over` of one. Each rank gives its own rows, equally many or not, or none, and
            every rank returns the number of the joint batch, and so does their mean; so gradients averaged over the
            ranks, as DistributedDataParallel does, are those of the joint batch.
            N, and the bandwidth of None, are those of the joint batch; all rows travel, and each rank sums the pairs
            of its own ones.

    Returns:
        (...), float32, or float64 if a variable is float64; dimensionless, >= 0, differentiable once by the variables.

    Raises:
        TypeError, ValueError: one sentence, before any work. With a group, bad input on one rank raises on all.

    Source: Pfister et al., Kernel-based tests for joint independence (1603.00285).
    """
    named = [(f"variables[{i}]", v) for i, v in enumerate(variables)]
    peers = distributed.peers_of(group)
    if peers is not None:
        return _joint_dhsic(named, bandwidth, peers)
    _check_variables(named, 2)
    dtype = precision(*variables)
    variables = _of_one_dtype(variables)
    scales = _scales(bandwidth, [(name, v) for (name, _), v in zip(named, variables, strict=True)])
    # centred before they are rounded again: a common mean costs no digits
    units = [_centred(v) * c.sqrt()[..., None, None] for v, c in zip(variables, scales, strict=True)]
    joint = pairwise_reduce(torch.cat(units, -1).to(dtype), kernel="rbf", reduction="sum").double()
    sums = [pairwise_reduce(u.to(dtype), kernel="rbf", reduction="sum").double() for u in units]
    n = joint.shape[-1]
    means = torch.stack(sums) / n
    out = joint.mean(-1) / n + means.mean(-1).prod(0) - 2 * means.prod(0).mean(-1)
    return out.to(dtype)


def _of_one_dtype(variables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As they are if they agree, or in the precision of the result, in which their medians are then taken, too."""
    if len({v.dtype for v in variables}) == 1:
        return variables
    return tuple(v.to(precision(*variables)) for v in variables)


def _joint_hsic(x: Tensor, y: Tensor, kernel: str, estimator: str, bandwidth: Any, peers: Peers) -> Tensor:
    """`hsic` of the rows of all ranks, each of which adds up the pairs of its own."""
    named = [("x", x), ("y", y)]

    def check() -> None:
        _check_settings(kernel, estimator, bandwidth)
        _check_paired(named, 0)
        if kernel == "rbf":
            _given(bandwidth, named)

    counts = _joint.rows(peers, _least_rows(estimator), check, x, y)
    n, own = sum(counts), counts[peers.rank]
    unbiased = estimator == "unbiased"
    if kernel == "linear":
        if _by_columns(x, y, n):
            xc, yc = _jointly_centred([x, y], counts, peers)
            product, ours = distributed.summed(xc.mT @ yc, peers).square().sum((-2, -1)), [xc, yc]
        else:
            every = [_centred(z) for z in _gathered([x, y], counts, peers)]
            ours = [z.narrow(-2, sum(counts[: peers.rank]), own) for z in every]
            grams = [z @ e.mT for z, e in zip(ours, every, strict=True)]
            product = distributed.summed((grams[0] * grams[1]).sum((-2, -1)), peers)
        if not unbiased:  # row sums of centred rows are 0
            return (product / (n - 1) ** 2).to(precision(x, y))
        squares = [z.square().sum(-1) for z in ours]
        both = (squares[0] * squares[1]).sum(-1)
        parts = torch.stack([both, *(q.sum(-1) for q in squares)], -1)
        rows, *totals = distributed.summed(parts, peers).unbind(-1)
        product = product - rows
    else:
        every = _gathered([x, y], counts, peers)
        scales = _scales(bandwidth, [("x", every[0]), ("y", every[1])])
        joint, *sums = _own_sums(every, scales, counts, peers)
        if not unbiased:  # with the diagonals, which are 1
            joint, sums = joint + 1, [r + 1 for r in sums]
        parts = torch.stack([joint.sum(-1), (sums[0] * sums[1]).sum(-1), *(r.sum(-1) for r in sums)], -1)
        product, rows, *totals = distributed.summed(parts, peers).unbind(-1)
    return _formula(product, rows, totals[0] * totals[1], n, estimator).to(precision(x, y))


def _joint_dhsic(named: list[tuple[str, Tensor]], bandwidth: Any, peers: Peers) -> Tensor:
    """`dhsic` of the rows of all ranks, each of which adds up the pairs of its own."""

    def check() -> None:
        _check_variables(named, 0)
        _given(bandwidth, named)

    counts = _joint.rows(peers, 2, check, *(v for _, v in named))
    n, every = sum(counts), _gathered([v for _, v in named], counts, peers)
    scales = _scales(bandwidth, [(name, v) for (name, _), v in zip(named, every, strict=True)])
    joint, *sums = (r + 1 for r in _own_sums(every, scales, counts, peers))
    means = torch.stack(sums) / n
    parts = torch.stack([joint.sum(-1), means.prod(0).sum(-1), *means.sum(-1).unbind()], -1)
    total, mixed, *each = (distributed.summed(parts, peers) / n).unbind(-1)
    out = total / n + torch.stack(each).prod(0) - 2 * mixed
    return out.to(every[0].dtype)


def _gathered(variables: list[Tensor], counts: tuple[int, ...], peers: Peers) -> list[Tensor]:
    """The rows of all ranks, in rank order and in the dtype of the result, by one collective."""
    kinds, dtype = {v.dtype for v in variables}, precision(*variables)
    if kinds in ({torch.bfloat16}, {torch.float16}):
        peers = peers._replace(transport=variables[0].dtype)  # without loss; their gradients come back in float32
    side_by_side = torch.cat([v.to(dtype) for v in variables], -1)
    return list(distributed.gathered(side_by_side, counts, peers).split([v.shape[-1] for v in variables], -1))


def _own_sums(every: list[Tensor], scales: list[Tensor], counts: tuple[int, ...], peers: Peers) -> list[Tensor]:
    """sum_{j != i} of the product of all kernels, then of each kernel, for the rank's own rows i: (..., n).

    In float64: terms cancel, and of a thousand independent rows float32 sums would leave three digits.
    """
    n, before = counts[peers.rank], sum(counts[: peers.rank])
    units = [_centred(v) * c.sqrt()[..., None, None] for v, c in zip(every, scales, strict=True)]
    sums = []
    for unit in (torch.cat(units, -1), *units):
        own = unit.narrow(-2, before, n)
        places = torch.arange(unit.shape[-2], device=unit.device).expand(unit.shape[:-1])
        labels = places.narrow(-1, before, n), places
        if n:
            rows = pairwise_reduce(own, unit, kernel="rbf", reduction="sum", mask="different", labels=labels)
        else:
            rows = own.sum(-1)  # keeps the rank in the graph, for it must take part in the backward
        sums.append(rows)
    return sums


def _jointly_centred(variables: list[Tensor], counts: tuple[int, ...], peers: Peers) -> list[Tensor]:
    """`_centred` by the mean over all ranks: of the rank's own rows."""
    z = torch.cat([v.double() for v in variables], -1)
    heads = tuple(min(count, 1) for count in counts)
    z = z - distributed.gather_rows(z.detach()[..., :1, :], heads, peers)[..., :1, :]
    z = z - distributed.summed(z.sum(-2, keepdim=True), peers) / sum(counts)
    return list(z.split([v.shape[-1] for v in variables], -1))


def _by_columns(x: Tensor, y: Tensor, n: int) -> bool:
    """Whether the cross-covariance is less work than the two Grams."""
    return x.shape[-1] * y.shape[-1] <= n * (x.shape[-1] + y.shape[-1])


def _combine(product: Tensor, sums: list[Tensor], diagonals: list[Tensor], estimator: str) -> Tensor:
    """HSIC (..., A, B) from sum_ij k^a_ij l^b_ij, and the row sums and diagonals, both (..., A, N) and (..., B, N)."""
    n = sums[0].shape[-1]
    if estimator == "unbiased":
        product = product - diagonals[0] @ diagonals[1].mT
        sums = [r - q for r, q in zip(sums, diagonals, strict=True)]
    rows = sums[0] @ sums[1].mT
    totals = sums[0].sum(-1)[..., :, None] * sums[1].sum(-1)[..., None, :]
    return _formula(product, rows, totals, n, estimator)


def _formula(product: Tensor, rows: Tensor, totals: Tensor, n: int, estimator: str) -> Tensor:
    """From sum K o L, rK.rL and (sum K)(sum L); unbiased, without the diagonals."""
    if estimator == "unbiased":
        return (product + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
    return (product - 2 / n * rows + totals / n**2) / (n - 1) ** 2


def _rbf_sums(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """sum_ij k^g_ij k^h_ij and sum_j k^g_ij of (..., G, N, D), in float64."""
    gram, rows = pairwise_reduce(groups, kernel="rbf", reduction="gram", scale=scale)
    return gram.double(), rows.double()


def _centred(z: Tensor) -> Tensor:
    """In float64; equal rows give exactly 0."""
    z = z.double()
    z = z - z[..., :1, :].detach()
    return z - z.mean(-2, keepdim=True)


def _scales(bandwidth: Any, named: list[tuple[str, Tensor]]) -> list[Tensor]:
    """1/(2 bandwidth^2) of each variable, (...)."""
    return [
        rbf_scale("bandwidth", median_bandwidth(z), z) if c is None else c
        for c, (_, z) in zip(_given(bandwidth, named), named, strict=True)
    ]


def _given(bandwidth: Any, named: list[tuple[str, Tensor]]) -> list[Tensor | None]:
    """Those of the bandwidths that are given, checked."""
    widths = bandwidth if isinstance(bandwidth, tuple) else (bandwidth,) * len(named)
    if len(widths) != len(named):
        raise ValueError(
            f"bandwidth must be one, or a tuple of {len(named)}, for {len(named)} variables, got {widths}."
        )
    return [w if w is None else rbf_scale("bandwidth", w, z) for w, (_, z) in zip(widths, named, strict=True)]


def _check_settings(kernel: str, estimator: str, bandwidth: object) -> None:
    _checks.one_of("kernel", kernel, _KERNELS)
    _checks.one_of("estimator", estimator, _ESTIMATORS)
    if kernel != "rbf" and bandwidth is not None:
        raise ValueError(f"bandwidth is for kernel='rbf', got one with kernel={kernel!r}.")


def _check_variables(named: list[tuple[str, Tensor]], least: int) -> None:
    if len(named) < 2:
        raise ValueError(f"variables must be two or more tensors of shape (..., N, D), got {len(named)}.")
    _check_paired(named, least)


def _check_paired(named: list[tuple[str, Tensor]], least: int) -> None:
    """All must be (..., N, D) with the leading dimensions, the N and the device of the first."""
    first, x = named[0]
    for name, z in named:
        _checks.matrix_stack(name, z, min_rows=least)
        if z.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"{name} must have the leading dimensions and the rows of {first}, "
                f"got shapes {tuple(x.shape)} for {first} and {tuple(z.shape)} for {name}."
            )
        _checks.beside(first, x, name, z)


def _least_rows(estimator: str) -> int:
    return 4 if estimator == "unbiased" else 2
