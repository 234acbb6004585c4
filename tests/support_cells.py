"""The cells of docs/support.md that need not be "value", each with its reason; and the document.

Every cell that is not named here must be "value", and every one that is must be what is said of it: a reason that has
gone fails the walk as much as one that is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from support_layers import SUBJECTS
from support_ranks import STATES as GROUP_STATES
from support_transforms import STATES
from support_verdicts import BAD, BREAK, NONE, REFUSED, TORCH, VALUE, Cell


@dataclass(frozen=True)
class Reason:
    kind: str
    states: str  # separated by ", "
    functions: str  # names or patterns, separated by "; "
    why: str

    def covers(self, function: str, state: str) -> bool:
        return state in self.states.split(", ") and any(fnmatch(function, p) for p in self.functions.split("; "))


COLUMNS = (
    "vicreg_loss; VICRegLoss; vcreg_loss; VCRegLoss; vibcreg_loss; VIbCRegLoss; barlow_twins_loss; BarlowTwinsLoss; "
    "whitening_mse_loss; WhiteningMSELoss"
)
MANY = "frossl_loss; FroSSLLoss; coding_rate_loss; CodingRateLoss; mmcr_loss; MMCRLoss; vicregl_loss; VICRegLLoss"
TICO = "tico_loss; TiCoLoss"
SPECTRAL = "spectral_contrastive_loss; SpectralContrastiveLoss"
CONTRASTIVE = (
    "nt_xent_loss*; NTXentLoss*; info_nce_loss*; InfoNCELoss*; supervised_contrastive_loss; SupervisedContrastiveLoss; "
    "sigmoid_loss; SigmoidLoss; detcon_loss*; DetConLoss*; macl_loss; MACLLoss"
)
PAIRS = f"{CONTRASTIVE}; {SPECTRAL}"
BYOL = "byol_loss; BYOLLoss; negative_cosine_loss*; NegativeCosineLoss*"
TOKENS = "kernel_alignment_loss; KernelAlignmentLoss; gram_anchoring_loss; GramAnchoringLoss"
SIMPLE = "simple_contrastive_loss; SimpleContrastiveLoss"
SPREAD = "koleo_loss; KoLeoLoss; alignment_uniformity_loss; AlignmentUniformityLoss"
PROTOTYPES = "swav_loss; SwAVLoss; dino_loss; DINOLoss; ibot_patch_loss; IBOTPatchLoss; msn_loss; MSNLoss"
INFO = "info_vicreg_loss*; InfoVICRegLoss*"
PROJECTED = "sigreg_loss; SIGRegLoss; lejepa_loss; LeJEPALoss; characteristic_sums"
KERNELS = (
    f"{CONTRASTIVE}; pairwise_reduce (logsumexp); pairwise_reduce (sum, rbf); pairwise_reduce (matmul, softplus); "
    "pairwise_reduce (gram, rbf)"
)
TRAINED = "BatchNorm1d; BatchNorm2d; BatchNorm3d; BatchNorm1d (relu); BatchNormReLU; SyncBatchNorm; convert_batchnorm"
TWO_ROWS = (
    f"{COLUMNS}; {SIMPLE}; frossl_loss; FroSSLLoss; vicregl_loss; VICRegLLoss; covariance; cross_correlation; "
    f"hsic*; dhsic; pairwise_hsic; median_bandwidth; participation_ratio; {SPREAD}; cka*"
)
ORTHOGONAL = "rank_k_update_*; project_direct_; project_tangent_; reorthogonalize_; init.*; skinny_products"

REASONS = [
    Reason(
        REFUSED,
        "empty",
        f"{PAIRS}; {INFO}; {BYOL}; {TICO}; coding_*; Coding*; mmcr_loss; MMCRLoss; pairwise_reduce*; "
        f"kernel_matmul; entropy*; rankme; amari_distance; {TOKENS}; {PROJECTED}; {PROTOTYPES}",
        "a mean needs at least one row",
    ),
    Reason(REFUSED, "empty, one row", TWO_ROWS, "a variance or a negative needs at least two rows"),
    Reason(REFUSED, "empty", "batch_moments; Whitening", "a mean needs at least one element"),
    Reason(REFUSED, "empty", "low_rank_residual*", "there is nothing to model"),
    Reason(
        REFUSED,
        "stack",
        f"{PAIRS}; {TICO}; {MANY}; OrthogonalRNN; UnitaryRNN; {SPREAD}; {TOKENS}; lejepa_loss; LeJEPALoss; "
        f"{PROTOTYPES}",
        "takes a single batch; use `torch.vmap` for a stack of them",
    ),
    Reason(
        REFUSED,
        "bf16, fp16",
        ORTHOGONAL,
        "an orthogonal matrix is no longer orthogonal after rounding to bfloat16 or float16",
    ),
    Reason(
        REFUSED,
        "bf16, fp16",
        "OrthogonalConv2d; UnitaryRNN",
        "has complex weights, which cannot become bfloat16 or float16",
    ),
    Reason(
        REFUSED,
        "mixed",
        f"{COLUMNS}; {INFO}; {MANY}; cross_correlation; linear_factors; skinny_products",
        "the arguments must have the same dtype, as outputs of one network do",
    ),
    Reason(
        REFUSED,
        "tensor settings",
        "barlow_twins_loss; BarlowTwinsLoss; cross_correlation",
        "`eps` must be a number, as it only guards a division; all other settings may be tensors, with a gradient",
    ),
    Reason(
        REFUSED,
        "twice",
        f"{COLUMNS}; {KERNELS}; {BYOL}; {TICO}; {MANY}; Whitening; covariance; cross_correlation; batch_*; "
        f"{TRAINED}; BatchNorm1d (eval); kernel_matmul; low_rank_residual*; {SPREAD}; {TOKENS}; cka (biased); "
        f"{PROJECTED}; {PROTOTYPES}; "
        "hsic (rbf); dhsic; pairwise_hsic; entropy (pairwise-kl); participation_ratio; "
        "large_batch; LargeBatch; info_vicreg_loss (pairwise-kl); InfoVICRegLoss (pairwise-kl)",
        "the kernels can be differentiated only once",
    ),
    Reason(
        REFUSED,
        "vmapped",
        "rank_k_update_*; project_direct_; project_tangent_",
        "`u` is written in place: if `torch.vmap` maps over it, the value is correct; if it maps only over other "
        "arguments, one `u` cannot hold the results of all slices",
    ),
    Reason(
        TORCH,
        "vmapped",
        "init.haar_; init.henaff_; init.cayley_; ProjUNN; low_rank_factors; linear_factors",
        "draws random numbers, for which `torch.vmap` raises an error unless its argument `randomness` is set",
    ),
    Reason(
        TORCH,
        "vmapped",
        TRAINED,
        "all slices would update the same `running_mean`; torch's own layers raise an error too",
    ),
    Reason(REFUSED, "vmapped", "TiCoLoss", "all slices would update the same `covariance`"),
    Reason(
        REFUSED,
        "strided, expanded",
        "factored_update_",
        "the weight and its state are written in place, and must be contiguous; the factors may have any strides",
    ),
    Reason(
        REFUSED,
        "stack, vmapped",
        "factored_update_",
        "moves the weight of one layer, which is a matrix",
    ),
    Reason(
        REFUSED,
        "bf16, fp16",
        "factored_update_",
        "the weight and its state must be float32 or float64; the factors may be bfloat16 or float16",
    ),
    Reason(
        REFUSED,
        "expanded",
        "init.*",
        "the tensor is written in place, but several elements of an expanded tensor share one address",
    ),
    Reason(
        REFUSED,
        "vmapped, func.grad",
        "large_batch; LargeBatch",
        "runs its backbone twice, which torch.func does not support",
    ),
    Reason(
        BREAK,
        "dynamic",
        "low_rank_residual (3-way, huber)",
        "takes parts of the tensor in a loop, which is compiled for one size; another size compiles again",
    ),
    Reason(
        BREAK,
        "compiled, dynamic",
        "init.*; ProjUNN",
        "is not traced as one graph, because it creates a `torch.Generator` or a parameter, which a graph cannot do",
    ),
    Reason(
        BREAK,
        "compiled, dynamic",
        "large_batch; LargeBatch",
        "runs outside of the graph by design, because what it keeps between forward and backward is not a tensor",
    ),
    Reason(
        REFUSED,
        "compiled group",
        "*_loss*; covariance; cross_correlation; hsic*; cka*; dhsic",
        "if the ranks have different numbers of rows, every rank raises an error, because the compiled graph assumes "
        "that all ranks have the same number of rows; "
        "otherwise the value is correct",
    ),
    Reason(TORCH, "zero", "frossl_loss; FroSSLLoss", "the logarithm of 0 if all elements of a view are 0"),
    Reason(TORCH, "zero", "participation_ratio; rankme; cka*", "0 / 0 if all elements are 0"),
]
NOT_FINITE = ("NaN", "inf")  # states of which the right value may be NaN or inf: that of the formula in plain torch


def reason_of(function: str, state: str) -> Reason | None:
    return next((reason for reason in REASONS if reason.covers(function, state)), None)


def complaint(function: str, state: str, cell: Cell) -> str:
    """What is not as it should be in a cell, or nothing."""
    reason = reason_of(function, state)
    expected = reason.kind if reason else VALUE
    if cell.kind in (NONE, expected) or (state in NOT_FINITE and cell.kind == TORCH):
        return ""
    return f"{state}: {cell.kind}, not {expected}" + (f": {cell.detail}" if cell.detail else "")


Table = dict[str, dict[str, Cell]]  # function -> state -> what was seen
SHORT = {VALUE: "+", REFUSED: "r", TORCH: "t", BREAK: "b", NONE: ""}
INPUTS = "strided offset expanded empty one-row stack fp64 bf16 fp16 autocast mixed zero NaN inf".replace("-", " ")
HEAD = """# What each function supports

How every public function behaves for each kind of input and context below, as observed by `tests/test_support.py` on a
CPU. The test writes this page (`SSLKERN_WRITE_SUPPORT=1 python -m pytest tests/test_support.py`) and fails if a
function neither returns the correct value nor has a documented reason below for not doing so.

| cell | meaning |
| --- | --- |
| + | Correct value and gradients: the error against fp64 is at most 4 times that of the plain formula, plus \
8 eps times the magnitude of the result. |
| r | Raises an error whose message names the argument. The number after r refers to the list of [reasons](#reasons). |
| t | Same as torch: NaN or inf where the torch formula gives them. A number after t refers to the \
reasons. In some of these cells torch itself raises an error; the reason then says so. |
| b | Correct value, but `torch.compile` breaks the graph here, so `fullgraph=True` raises an error. The \
number refers to the reasons. |
| | Does not apply. |
"""


def document(table: Table) -> str:
    """The page."""
    notes: list[Reason] = []
    parts = [HEAD]
    groups = {
        "Inputs": [s for s in STATES if s in INPUTS],
        "Gradients, transforms and processes": [*(s for s in STATES if s not in INPUTS), *GROUP_STATES],
    }
    for title, states in groups.items():
        parts.append(f"## {title}\n")
        parts += [f"- **{s}**: {meaning(s)}" for s in states]
        for family in dict.fromkeys(subject.family for subject in SUBJECTS.values()):
            parts.append(f"\n### {family}\n")
            parts.append(f"| | {' | '.join(states)} |\n|{' --- |' * (len(states) + 1)}")
            names = [name for name, subject in SUBJECTS.items() if subject.family == family]
            parts += [f"| `{name}` | {' | '.join(shown(table, name, s, notes) for s in states)} |" for name in names]
        parts.append("")
    parts.append("## Reasons\n")
    parts += [f"{k}. {reason.why[:1].upper()}{reason.why[1:]}." for k, reason in enumerate(notes, 1)]
    return "\n".join(parts) + "\n"


def meaning(state: str) -> str:
    looks = STATES.get(state)
    text = looks.__doc__ if looks else GROUP_MEANING[state]
    return " ".join((text or "").split())


GROUP_MEANING = {
    "group": "Two processes over gloo, with 3 and 3, 1 and 5, 5 and 1, or 0 and 6 rows: the result of the joint batch.",
    "compiled group": "The same under `torch.compile(fullgraph=True)`, with at least one row in every process: the "
    "correct value, or an error in every process.",
}


def shown(table: Table, function: str, state: str, notes: list[Reason]) -> str:
    cell = table.get(function, {}).get(state, Cell(NONE))
    if cell.kind in BAD:
        return f"**{cell.kind}**"
    reason = reason_of(function, state)
    if cell.kind in (VALUE, NONE) or reason is None:
        return SHORT[cell.kind]
    if reason not in notes:
        notes.append(reason)
    return f"{SHORT[cell.kind]} {notes.index(reason) + 1}"


def unused(table: Table) -> Iterable[Reason]:
    """Reasons that no cell has."""
    for reason in REASONS:
        if not any(
            cell.kind == reason.kind and reason_of(name, state) is reason
            for name, cells in table.items()
            for state, cell in cells.items()
        ):
            yield reason
