"""The states in which the walk meets every public function, and how it tells from what it saw what a cell is."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import OWN, POSITIONS, WHOLE, N, Subject
from torch import Tensor, nn
from torch.func import functional_call

VALUE, REFUSED, TORCH, BREAK, NONE = "value", "refused", "as torch", "graph break", "-"
WRONG, CRASH, UNCLEAR = "wrong", "crash", "unclear error"
BAD = (WRONG, CRASH, UNCLEAR)
STATES: dict[str, Callable[[Subject], Any]] = {}
ACCUMULATED = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Cell:
    kind: str
    detail: str = ""


def state(name: str) -> Callable:
    def register(function: Callable[[Subject], Any]) -> Callable:
        STATES[name] = function
        return function

    return register


def worst(cells: Sequence[Cell]) -> Cell:
    """Of several looks at one cell: what is bad, else what is most restricted."""
    order = (CRASH, WRONG, UNCLEAR, REFUSED, BREAK, TORCH, VALUE, NONE)
    return min(cells, key=lambda cell: order.index(cell.kind))


# what a function gives, and what it should


def flat(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def weights_of(outputs: Sequence[Tensor], expanded: bool = False) -> list[Tensor]:
    """The gradients of the outputs, numbers that bfloat16 holds; all the same, of strides 0, where `expanded`."""
    weights = []
    for k, out in enumerate(outputs):
        shape = torch.Size() if expanded else out.shape
        w = (torch.arange(shape.numel(), dtype=torch.float64) * 1.7 + k).cos().bfloat16().double().view(shape)
        w = torch.complex(w, w.flip(-1) if shape else w) if out.is_complex() else w
        weights.append(w.to(out.dtype).expand(out.shape))
    return weights


def gradients(
    outputs: Sequence[Tensor], wanted: Sequence[Tensor], expanded: bool = False, backward: bool = False, **rest: Any
) -> list[Any]:
    outputs = [out for out in outputs if out.requires_grad]
    if not outputs or not wanted:
        return [None] * len(wanted)
    if backward:  # a factored weight leaves its factors in no other way
        torch.autograd.backward(outputs, weights_of(outputs, expanded), **rest)
        return [x.grad for x in wanted]
    return list(torch.autograd.grad(outputs, wanted, weights_of(outputs, expanded), allow_unused=True, **rest))


@dataclass
class Seen:
    outputs: tuple[Tensor, ...]
    grads: list[Tensor | None]
    terms: float = 1.0  # the largest of what was added up, in units of the result


def built(subject: Subject, dtype: torch.dtype, factory: Callable | None = None) -> nn.Module:
    module = (factory or subject.call)()
    return module if dtype == torch.float32 else module.to(dtype)


def load(module: nn.Module, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The last leaves as the module's parameters, in their own layout; returns the inputs."""
    parameters = list(module.parameters())
    first = len(leaves) - len(parameters)
    for parameter, leaf in zip(parameters, leaves[first:], strict=True):
        parameter.data = leaf.detach()
        held = getattr(module, "factored", False) and parameter is module.weight_u
        parameter.requires_grad_(leaf.requires_grad or held)
    return list(leaves[:first])


def factored(subject: Subject) -> bool:
    return any(leaf.kind == "factored" for leaf in subject.leaves)


def wanted_of(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What gets a gradient."""
    held = {id(module.weight_u)} if getattr(module, "factored", False) else set()
    return [x for x in (*inputs, *module.parameters()) if x.requires_grad and id(x) not in held]


def buffers_of(module: nn.Module) -> tuple[Tensor, ...]:
    return tuple(b for b in module.buffers() if b.is_floating_point())


def functional(subject: Subject, dtype: torch.dtype, theirs: bool = False) -> Callable[..., Any]:
    """The subject, or its counterpart in torch, as a function of its leaves."""
    if not subject.module:
        return subject.torch if theirs else subject.ours
    module = built(subject, dtype, subject.torch if theirs else None)
    names = [name for name, _ in module.named_parameters()]

    def call(*leaves: Tensor) -> Any:
        first = len(subject.leaves) - len(names)
        state = dict(zip(names, leaves[first:], strict=True)) | {k: b.clone() for k, b in module.named_buffers()}
        return functional_call(module, state, leaves[:first])

    return call


def observe(
    subject: Subject,
    leaves: Sequence[Tensor],
    *,
    run: Callable | None = None,
    expanded: bool = False,
    factory: Callable | None = None,
    settings: dict[str, Any] | None = None,
) -> Seen:
    """Outputs and gradients of the function, or of `run` in its place."""
    settings = settings or {}
    wanted = [x for x in (*leaves, *settings.values()) if isinstance(x, Tensor) and x.requires_grad]
    if subject.module and run is None:
        module = built(subject, real(leaves[0].dtype), factory)
        inputs = load(module, leaves)
        outputs = flat(module(*inputs))
        wanted = wanted_of(module, inputs)
        grads = gradients(outputs, wanted, expanded, factored(subject)) if subject.grad else []
        return Seen((*(o.detach() for o in outputs), *(b.clone() for b in buffers_of(module))), grads)
    outputs = flat((run or subject.ours)(*leaves, **settings))
    grads = gradients(outputs, wanted, expanded) if subject.grad else []
    return Seen(tuple(o.detach() for o in outputs), grads, subject.terms)


def truth(subject: Subject, leaves: Sequence[Tensor], run: Callable | None = None, **rest: Any) -> Seen:
    """The formula, and what a counterpart of torch makes of its buffers."""
    if subject.torch and subject.module and run is None and any(True for _ in subject.torch().buffers()):
        relu = "relu" in subject.name
        return observe(subject, leaves, factory=(lambda: Behind(subject.torch())) if relu else subject.torch, **rest)
    seen = observe(subject, leaves, run=run or subject.right, **rest)
    return seen


class Behind(nn.Module):
    """A relu behind a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def wide(x: Tensor) -> Tensor:
    if not (x.is_floating_point() or x.is_complex()):
        return x
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64).requires_grad_(x.requires_grad)


def prepared(
    subject: Subject, dtype: torch.dtype = torch.float32, base: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The leaves, rounded to a dtype, those that are differentiable with a gradient to come."""
    leaves = []
    for leaf, x in zip(subject.leaves, base or subject.make(), strict=True):
        if leaf.complex:
            x = x.to(dtype.to_complex() if dtype in (torch.float32, torch.float64) else torch.complex64)
        elif leaf.kind != "labels":
            x = x.to(dtype)
        leaves.append(x.requires_grad_(subject.grad and leaf.differentiable))
    return leaves


def judged(found: Seen, exact: Seen, plain: Seen | None) -> str:
    """What is wrong, or nothing: at most 4 times the plain formula's error and 8 eps of the output's scale."""
    named = [("output", *z) for z in zip_longest(found.outputs, exact.outputs, plain and plain.outputs)]
    named += [("gradient", *z) for z in zip_longest(found.grads, exact.grads, plain and plain.grads)]
    for k, (name, ours, right, theirs) in enumerate(named):
        where = f"{name} {k if name == 'output' else k - len(found.outputs)}"
        if ours is None or right is None:
            if right is not None and bool(right.any()):
                return f"{where} is missing"
            continue
        if ours.shape != right.shape:
            return f"{where} has shape {tuple(ours.shape)}, not {tuple(right.shape)}"
        if not ours.numel():
            continue
        if not (ours.is_floating_point() or ours.is_complex()):
            if not torch.equal(ours, right):
                return f"{where} differs"
            continue
        far = off(ours, right)
        scale = exact.terms * float(right.abs().max())
        slack = 0.0 if theirs is None else off(theirs, right)
        eps = torch.finfo(ours.dtype).eps
        if not far <= 4 * slack + 8 * eps * scale:
            return f"{where} off by {far:.1e}, plain {slack:.1e}, scale {scale:.1e}"
    return ""


def zip_longest(ours: Sequence, right: Sequence, theirs: Sequence | None) -> list[tuple]:
    if len(ours) != len(right):
        raise AssertionError(f"{len(ours)} results for {len(right)}")
    return list(zip(ours, right, theirs or [None] * len(ours), strict=True))


def off(x: Tensor, right: Tensor) -> float:
    return float((wide(x.detach()) - wide(right.detach())).abs().max())


def plain_of(subject: Subject, leaves: Sequence[Tensor], run: Callable | None = None, **rest: Any) -> Seen | None:
    """The formula in the dtype of the leaves; in float32 where torch has no such operator, or it overflows."""
    try:
        seen = truth(subject, leaves, run, **rest)
        if all(x is None or bool(x.isfinite().all()) for x in (*seen.outputs, *seen.grads)):
            return seen
    except (RuntimeError, TypeError):
        pass
    if any(x.dtype in ACCUMULATED for x in leaves):
        single = [x.detach().float().requires_grad_(x.requires_grad) if x.dtype in ACCUMULATED else x for x in leaves]
        return truth(subject, single, run, **rest)
    return None


def compare(subject: Subject, leaves: Sequence[Tensor], run: Callable | None = None, **rest: Any) -> str:
    """The function at these leaves against its formula in fp64, at the same numbers."""
    exact = truth(subject, [wide(x) for x in leaves], **rest)
    plain = plain_of(subject, leaves, **rest)
    return judged(observe(subject, leaves, run=run, **rest), exact, plain)


# what an error is


def words(subject: Subject) -> set[str]:
    """What a refusal may be about: the function, and its arguments."""
    found = {subject.public, subject.public.strip("_"), "sslkern"}
    for candidate in targets(subject):
        found |= set(inspect.signature(candidate).parameters)
    return found - {"args", "kwargs", "self", "z"} | {"z"}


def targets(subject: Subject) -> list[Callable]:
    import sslkern

    rooms = (sslkern.losses, sslkern.ops, sslkern.metrics, sslkern.nn, sslkern.optim, sslkern.train, sslkern.nn.init)
    name = subject.public.removeprefix("init.")
    found = [getattr(room, name) for room in rooms if callable(getattr(room, name, None))]
    return found + [c.forward for c in found if isinstance(c, type) and issubclass(c, nn.Module)]


INTERNAL = re.compile(r"\b_[A-Z]\w+|sslkern_(?:native|reference|triton)|torch::|c10|at::|Traceback|0x[0-9a-f]{6}")


def clear(error: BaseException, subject: Subject) -> bool:
    """One sentence that ends, is about something the caller knows, and shows nothing from inside."""
    text = str(error)
    sentence = text.endswith(".") and "\n" not in text
    named = set(re.findall(r"[A-Za-z_]\w*", text)) & words(subject)
    return sentence and bool(named) and not INTERNAL.search(text)


def told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def attempt(subject: Subject, look: Callable[[], Any], counterpart: Callable[[], Any] | None = None) -> Cell:
    """What `look` sees: "" for the right value, or what is wrong with it, or a Cell; or it raises."""
    try:
        seen = look()
    except (TypeError, ValueError, RuntimeError) as error:
        if counterpart is not None and (theirs := raised(counterpart)) and type(theirs) is type(error):
            if isinstance(error, torch.linalg.LinAlgError):
                return Cell(TORCH, "torch.linalg's own error")
            same = str(theirs) == str(error) or clear(error, subject)
            return Cell(TORCH, told(error)) if same else Cell(UNCLEAR, f"{told(error)} (torch: {told(theirs)})")
        return Cell(REFUSED if clear(error, subject) else UNCLEAR, told(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Cell(CRASH, told(error))
    if isinstance(seen, Cell):
        return seen
    return Cell(WRONG, seen) if seen else Cell(VALUE)


def raised(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def counterpart_of(subject: Subject, leaves: Sequence[Tensor], wrap: Callable = lambda f: f) -> Callable | None:
    """torch's own function or layer on the same leaves."""
    if subject.torch is None:
        return None
    return lambda: wrap(functional(subject, real(leaves[0].dtype), theirs=True))(*leaves)


def may_spread(subject: Subject, value: float) -> bool:
    """Whether more than torch's formula may become NaN: a distance to infinity may be inf or inf - inf."""
    return subject.spreads or value == float("inf")


# layouts


def relaid(subject: Subject, lay: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """New leaves of the same numbers in another layout."""
    leaves = prepared(subject, dtype)
    return [lay(x.detach()).requires_grad_(x.requires_grad) for x in leaves]


def every_second(x: Tensor) -> Tensor:
    big = x.new_zeros([2 * side for side in x.shape])
    view = big[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else every_second(x)


def permuted(x: Tensor) -> Tensor:
    """The batch innermost."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@state("strided")
def _(subject: Subject) -> Cell:
    """Every argument, parameters too, at every second number, transposed, and with the batch innermost."""
    return worst(
        [attempt(subject, lambda lay=lay: compare_relaid(subject, lay)) for lay in (every_second, transposed, permuted)]
    )


def compare_relaid(subject: Subject, lay: Callable[[Tensor], Tensor]) -> str:
    """In-place functions write into their leaf, so each call has its own."""
    exact = truth(subject, [wide(x) for x in relaid(subject, lay)])
    plain = plain_of(subject, relaid(subject, lay))
    return judged(observe(subject, relaid(subject, lay)), exact, plain)


@state("offset")
def _(subject: Subject) -> Cell:
    """Every argument one number into its memory: not aligned."""

    def lay(x: Tensor) -> Tensor:
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    return attempt(subject, lambda: compare_relaid(subject, lay))


@state("expanded")
def _(subject: Subject) -> Cell:
    """Each argument in turn expanded along its last dimension, and an incoming gradient of strides 0."""
    cells = []
    for k, leaf in enumerate(subject.leaves):
        if leaf.kind in ("orthonormal", "near", "factored", "labels"):
            continue

        def leaves(k: int = k) -> list[Tensor]:
            out = prepared(subject)
            x = out[k].detach()
            out[k] = x[..., :1].expand(x.shape).requires_grad_(out[k].requires_grad)
            return out

        def look(leaves: Callable = leaves) -> str:
            exact = truth(subject, [wide(x) for x in leaves()], expanded=True)
            return judged(observe(subject, leaves(), expanded=True), exact, plain_of(subject, leaves(), expanded=True))

        cells.append(attempt(subject, look, in_place_refusal(subject, leaves)))
    return worst(cells) if cells else Cell(NONE)


def in_place_refusal(subject: Subject, leaves: Callable) -> Callable | None:
    """torch's own words for a write into expanded memory."""
    return (lambda: leaves()[0].copy_(torch.ones(leaves()[0].shape))) if subject.public.endswith("_") else None


# sizes


@state("empty")
def _(subject: Subject) -> Cell:
    """No rows."""
    return of_rows(subject, 0)


@state("one row")
def _(subject: Subject) -> Cell:
    """One row."""
    return of_rows(subject, 1)


def of_rows(subject: Subject, rows: int) -> Cell:
    if all(leaf.rows is None for leaf in subject.leaves):
        return Cell(NONE)
    leaves = prepared(subject, base=subject.make(rows))

    def look() -> Any:
        found = observe(subject, leaves)
        return like_torch(found, truth(subject, leaves), judged_at(subject, leaves, found))

    return attempt(subject, look, counterpart_of(subject, leaves))


def judged_at(subject: Subject, leaves: Sequence[Tensor], found: Seen) -> str:
    return judged(found, truth(subject, [wide(x) for x in leaves]), plain_of(subject, leaves))


def like_torch(found: Seen, theirs: Seen, verdict: str, strict: bool = True) -> Any:
    """The value where it is finite; NaN or inf where plain torch in the same dtype has either, and unless `strict`
    elsewhere, too: a distance to infinity may be inf, or inf - inf."""
    bad = [x for x in (*theirs.outputs, *theirs.grads) if x is not None and not bool(torch.isfinite(x).all())]
    if not bad:
        return verdict
    pairs = [*zip(found.outputs, theirs.outputs, strict=True), *zip(found.grads, theirs.grads, strict=True)]
    for k, (ours, right) in enumerate(pairs):
        if ours is None or right is None:
            continue
        what = f"output {k}" if k < len(found.outputs) else f"gradient {k - len(found.outputs)}"
        if bool((ours.isfinite() & ~right.isfinite()).any()):
            return f"{what} is finite where torch's is not"
        if strict and bool((~ours.isfinite() & right.isfinite()).any()):
            return f"{what} is not finite where torch's is"
        ok = right.isfinite() & ours.isfinite()
        if ok.any() and off(ours[ok], right[ok]) > 1e-3 * float(right[ok].abs().max()):
            return f"{what} differs from torch's in what is finite"
    return Cell(TORCH, "NaN or inf in, NaN or inf out")


@state("stack")
def _(subject: Subject) -> Cell:
    """Leading dimensions (2, 2): each slice as if alone; for losses of columns, positions."""
    if subject.more == OWN:
        return Cell(NONE)
    slices = [prepared(subject, base=subject.make(seed=k)) for k in range(4)]
    joined = []
    for k, leaf in enumerate(subject.leaves):
        parameter = (subject.module and leaf.rows is None) or leaf.kind == "shared"
        parts = [leaves[k].detach() for leaves in slices]
        if parameter or leaf.kind in ("constant", "variance"):
            stacked = parts[0]
        elif subject.more == POSITIONS:
            stacked = torch.stack(parts, 1).unflatten(1, (2, 2))
        else:
            stacked = torch.stack(parts).unflatten(0, (2, 2))
        joined.append(stacked.requires_grad_(slices[0][k].requires_grad))
    theirs = counterpart_of(subject, [x.detach() for x in joined])
    return attempt(subject, lambda: compare_run(subject, clones(joined), by_slice(subject)), theirs)


def clones(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(x.requires_grad) for x in leaves]


def by_slice(subject: Subject) -> Callable[..., Any]:
    """The formula of (2, 2) slices."""
    if subject.more == WHOLE:
        return subject.right

    def run(*leaves: Tensor) -> Any:
        axis = 1 if subject.more == POSITIONS else 0
        parts = []
        for k, (leaf, x) in enumerate(zip(subject.leaves, leaves, strict=True)):
            alone = x.dim() == len(leaf.shape)
            parts.append([x] * 4 if alone else x.flatten(axis, axis + 1).unbind(axis))
        results = [flat(subject.right(*z)) for z in zip(*parts, strict=True)]
        out = [torch.stack(r) for r in zip(*results, strict=True)]
        if subject.more == POSITIONS:
            return out[0].mean()
        return tuple(o.unflatten(0, (2, 2)) for o in out)

    return run


def compare_run(subject: Subject, leaves: list[Tensor], formula: Callable, run: Callable | None = None) -> str:
    """Against another formula than that of a slice."""
    exact = observe(subject, [wide(x) for x in leaves], run=formula)
    plain = observe(subject, clones(leaves), run=formula)
    return judged(observe(subject, leaves, run=run), exact, plain)


# dtypes


@state("fp64")
def _(subject: Subject) -> Cell:
    """Everything in float64."""
    return of_dtype(subject, torch.float64)


@state("bf16")
def _(subject: Subject) -> Cell:
    """Everything in bfloat16, a module by `module.bfloat16()`."""
    return of_dtype(subject, torch.bfloat16)


@state("fp16")
def _(subject: Subject) -> Cell:
    """Everything in float16."""
    return of_dtype(subject, torch.float16)


def of_dtype(subject: Subject, dtype: torch.dtype) -> Cell:
    return attempt(subject, lambda: compare_dtype(subject, dtype))


def compare_dtype(subject: Subject, dtype: torch.dtype) -> str:
    exact = truth(subject, [wide(x) for x in prepared(subject, dtype)])
    plain = plain_of(subject, prepared(subject, dtype))
    return judged(observe(subject, prepared(subject, dtype)), exact, plain)


@state("autocast")
def _(subject: Subject) -> Cell:
    """float32 under `torch.autocast` to bfloat16."""

    def look() -> str:
        exact = truth(subject, [wide(x) for x in prepared(subject)])
        with torch.autocast("cpu", torch.bfloat16):
            plain = plain_of(subject, prepared(subject))
            return judged(observe(subject, prepared(subject)), exact, plain)

    return attempt(subject, look)


@state("mixed")
def _(subject: Subject) -> Cell:
    """The first argument in bfloat16 and the others in float32, under autocast: as a network hands them over."""
    if len(subject.leaves) < 2 or subject.leaves[0].rows is None or subject.leaves[1].kind == "labels":
        return Cell(NONE)

    def leaves() -> list[Tensor]:
        first, *others = prepared(subject)
        return [first.detach().bfloat16().requires_grad_(first.requires_grad), *others]

    def single() -> list[Tensor]:
        return [x.detach().float().requires_grad_(x.requires_grad) if x.dtype in ACCUMULATED else x for x in leaves()]

    def look() -> str:
        exact = truth(subject, [wide(x) for x in leaves()])
        with torch.autocast("cpu", torch.bfloat16):
            plain = plain_of(subject, single())
            return judged(observe_mixed(subject, leaves()), exact, plain)

    return attempt(subject, look)


def observe_mixed(subject: Subject, leaves: list[Tensor]) -> Seen:
    """A module stays in float32."""
    if not subject.module:
        return observe(subject, leaves)
    module = subject.call()
    inputs = load(module, leaves)
    outputs = flat(module(*inputs))
    wanted = wanted_of(module, inputs)
    grads = gradients(outputs, wanted, backward=factored(subject))
    return Seen((*(o.detach() for o in outputs), *(b.clone() for b in buffers_of(module))), grads)


# compilers


@state("compiled")
def _(subject: Subject) -> Cell:
    """`torch.compile(fullgraph=True)`, sizes fixed."""
    return compiled(subject, lambda run: look_compiled(subject, run, (N,)), dynamic=False)


@state("dynamic")
def _(subject: Subject) -> Cell:
    """The same with `dynamic=True`: one graph for 20 sizes of batch on one side of N = D."""
    sizes = (N + 1, N, *range(N + 2, N + 20))
    with torch._dynamo.config.patch(error_on_recompile=True):
        return compiled(subject, lambda run: look_compiled(subject, run, sizes), dynamic=True)


def compiled(subject: Subject, look: Callable[[Callable], str], dynamic: bool) -> Cell:
    cells = []
    for fullgraph in (True, False):
        torch._dynamo.reset()
        run = torch.compile(traceable(subject), fullgraph=fullgraph, dynamic=dynamic, backend="eager")
        cells.append(attempt(subject, lambda run=run: look(run)))
        if cells[-1].kind in (VALUE, WRONG):
            break
    if cells[-1].kind == VALUE and len(cells) > 1:
        return Cell(BREAK, cells[0].detail)
    return cells[0]


def traceable(subject: Subject) -> Callable:
    if subject.module:
        return functional(subject, torch.float32)
    return lambda *leaves: subject.call(*leaves, **subject.settings)


def look_compiled(subject: Subject, run: Callable, sizes: Sequence[int]) -> str:
    for rows in sizes:
        base = subject.make(rows)
        leaves = prepared(subject, base=[x.clone() for x in base])
        found = observe(subject, leaves, run=run)
        if rows in (N, sizes[-1]):
            exact = observe(
                subject, [wide(x) for x in prepared(subject, base=[x.clone() for x in base])], run=subject.right
            )
            plain = observe(subject, prepared(subject, base=[x.clone() for x in base]), run=subject.right)
            if verdict := judged(found, exact, plain):
                return f"{rows} rows: {verdict}"
    return ""


# torch.func


@state("vmapped")
def _(subject: Subject) -> Cell:
    """`torch.vmap` over all arguments and over each alone, along two dimensions, and gradients through it and in it."""
    run = functional(subject, torch.float32)
    slices = [prepared(subject, base=subject.make(seed=k)) for k in range(3)]
    arguments = [k for k, leaf in enumerate(subject.leaves) if not (subject.module and leaf.rows is None)]
    mapped = [k for k in arguments if subject.leaves[k].kind not in ("constant", "variance")]
    choices = [tuple(mapped)] + [(k,) for k in mapped if len(mapped) > 1]
    cells = []
    for along, chosen in [(0, choices[0]), (1, choices[0]), *((0, choice) for choice in choices[1:])]:
        dims = tuple(min(along, len(leaf.shape)) if k in chosen else None for k, leaf in enumerate(subject.leaves))

        def leaves(dims: tuple = dims) -> list[Tensor]:
            return [
                slices[0][k].detach().clone().requires_grad_(slices[0][k].requires_grad)
                if dim is None
                else torch.stack([s[k].detach() for s in slices], dim).requires_grad_(slices[0][k].requires_grad)
                for k, dim in enumerate(dims)
            ]

        def look(dims: tuple = dims, leaves: Callable = leaves) -> str:
            formula = over_slices(subject, dims)
            return compare_run(subject, leaves(), formula, torch.vmap(run, in_dims=dims))

        theirs = counterpart_of(subject, leaves(), lambda f, dims=dims: torch.vmap(f, in_dims=dims))
        cells.append(attempt(subject, look, theirs))
    if subject.grad:
        cells.append(attempt(subject, lambda: per_sample(subject, run, slices, tuple(mapped)), theirs))
    return worst(cells)


def over_slices(subject: Subject, dims: tuple) -> Callable[..., Any]:
    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        parts = [[x] * 3 if d is None else x.unbind(d) for x, d in zip(leaves, dims, strict=True)]
        results = [flat(subject.right(*z)) for z in zip(*parts, strict=True)]
        return tuple(torch.stack(r) for r in zip(*results, strict=True))

    return run


def scalar(run: Callable) -> Callable[..., Tensor]:
    """The outputs weighed into one real number."""

    def call(*leaves: Tensor) -> Tensor:
        outputs = [o for o in flat(run(*leaves)) if o.is_floating_point() or o.is_complex()]
        total = [
            (o * w.conj()).real.sum() if o.is_complex() else (o * w).sum()
            for o, w in zip(outputs, weights_of(outputs), strict=True)
        ]
        return torch.stack([t.to(total[0].dtype) for t in total]).sum()

    return call


def differentiable(subject: Subject) -> tuple[int, ...]:
    return tuple(k for k, leaf in enumerate(subject.leaves) if leaf.differentiable)


def per_sample(subject: Subject, run: Callable, slices: list[list[Tensor]], mapped: tuple[int, ...]) -> str:
    dims = tuple(0 if k in mapped else None for k in range(len(subject.leaves)))
    wanted = differentiable(subject)
    leaves = [
        torch.stack([s[k].detach() for s in slices]) if k in mapped else slices[0][k].detach() for k in range(len(dims))
    ]
    found = torch.vmap(torch.func.grad(scalar(run), argnums=wanted), in_dims=dims)(*leaves)
    formulas = []
    for cast in (wide, lambda x: x):
        each = []
        for s in slices:
            z = [cast((s[k] if k in mapped else slices[0][k]).detach()) for k in range(len(dims))]
            z = [x.requires_grad_(k in wanted) for k, x in enumerate(z)]
            each.append(torch.autograd.grad(scalar(subject.right)(*z), [z[k] for k in wanted], allow_unused=True))
        formulas.append(
            [
                torch.stack([torch.zeros_like(leaves[0]) if g is None else g for g in gs])
                for gs in zip(*each, strict=True)
            ]
        )
    return judged(Seen((), list(found)), Seen((), formulas[0]), Seen((), formulas[1]))


@state("func.grad")
def _(subject: Subject) -> Cell:
    """`torch.func.grad_and_value` and `jacrev`, a module by `functional_call`."""
    if not subject.grad:
        return Cell(NONE)
    run = functional(subject, torch.float32)
    wanted = differentiable(subject)

    def look() -> str:
        leaves = [x.detach() for x in prepared(subject)]
        found, value = torch.func.grad_and_value(scalar(run), argnums=wanted)(*leaves)
        of_real = not any(leaf.complex for leaf in subject.leaves)  # all that jacrev takes
        jacobian = torch.func.jacrev(scalar(run), argnums=wanted)(*leaves) if of_real else found
        formulas = []
        for cast in (wide, lambda x: x):
            z = [cast(x).detach().requires_grad_(k in wanted) for k, x in enumerate(leaves)]
            total = scalar(subject.right)(*z)
            formulas.append(
                Seen((total.detach(),), list(torch.autograd.grad(total, [z[k] for k in wanted], allow_unused=True)))
            )
        return judged(Seen((value,), list(found)), *formulas) or judged(Seen((value,), list(jacobian)), *formulas)

    theirs = counterpart_of(subject, [x.detach() for x in prepared(subject)], lambda f: torch.func.grad(scalar(f)))
    return attempt(subject, look, theirs)


# gradients


@state("frozen")
def _(subject: Subject) -> Cell:
    """Each argument without a gradient, and each alone with one."""
    wanted = differentiable(subject)
    if not subject.grad or len(wanted) < 2:
        return Cell(NONE)

    def leaves(on: Sequence[int]) -> list[Tensor]:
        return [x.detach().requires_grad_(k in on) for k, x in enumerate(prepared(subject))]

    def look(on: Sequence[int]) -> str:
        exact = truth(subject, [wide(x) for x in leaves(on)])
        return judged(observe(subject, leaves(on)), exact, plain_of(subject, leaves(on)))

    choices = [[j for j in wanted if j != k] for k in wanted] + [[k] for k in wanted]
    return worst([attempt(subject, lambda on=on: look(on)) for on in choices])


@state("no grad")
def _(subject: Subject) -> Cell:
    """`torch.no_grad` and `torch.inference_mode`."""

    def look(mode: Callable) -> str:
        with mode():
            found = observe(subject, prepared(subject))
        leaves = [x.detach() for x in prepared(subject)]
        exact = truth(subject, [wide(x) for x in leaves])
        verdict = judged(Seen(found.outputs, []), Seen(exact.outputs, []), Seen(plain_of(subject, leaves).outputs, []))
        return "a gradient without grad" if any(g is not None for g in found.grads) else verdict

    return worst([attempt(subject, lambda m=m: look(m)) for m in (torch.no_grad, torch.inference_mode)])


@state("twice")
def _(subject: Subject) -> Cell:
    """The gradient of the squared norm of the gradient: never lost in silence."""
    if not subject.grad:
        return Cell(NONE)

    def twice(run: Callable | None, leaves: list[Tensor]) -> Seen:
        if subject.module and run is None:
            module = built(subject, real(leaves[0].dtype))
            inputs = load(module, leaves)
            wanted, outputs = wanted_of(module, inputs), flat(module(*inputs))
        else:
            outputs = flat((run or subject.ours)(*leaves))
            wanted = [x for x in leaves if x.requires_grad]
        grads = gradients(outputs, wanted, create_graph=True)
        penalty = sum(g.abs().square().sum() for g in grads if g is not None)
        lost = [g is not None and g.requires_grad for g in grads]
        second = torch.autograd.grad(penalty, wanted, allow_unused=True) if any(lost) else [None] * len(wanted)
        return Seen((penalty.detach(),), list(second))

    def look() -> str:
        found = twice(None, prepared(subject))
        formula = subject.right
        exact = twice(formula, [wide(x) for x in prepared(subject)])
        return judged(found, exact, twice(formula, prepared(subject)))

    return attempt(subject, look)


@state("tensor settings")
def _(subject: Subject) -> Cell:
    """Each number among the settings as a tensor of shape () and (1,), and its gradient."""
    if not subject.settings:
        return Cell(NONE)
    cells = []
    for name, value in subject.settings.items():
        for shape in ((), (1,)):

            def leaves(dtype: torch.dtype, name: str = name, value: float = value, shape: tuple = shape) -> tuple:
                setting = torch.full(shape, value, dtype=dtype, requires_grad=subject.grad)
                return prepared(subject, dtype), {name: setting}

            def look(leaves: Callable = leaves, shape: tuple = shape, name: str = name) -> str:
                def formula(*z: Tensor, **settings: Tensor) -> Any:
                    return subject.right(*z, **{k: v.reshape(()) for k, v in settings.items()})

                parts = []
                for run, dtype in ((None, torch.float32), (formula, torch.float64), (formula, torch.float32)):
                    z, settings = leaves(dtype)
                    parts.append(observe(subject, z, run=run, settings=settings))
                verdict = judged(*parts)
                return f"{name} {shape}: {verdict}" if verdict else ""

            cell = attempt(subject, look)
            cells.append(Cell(cell.kind, f"{name} {shape}: {cell.detail}" if cell.detail else ""))
    return worst(cells)


# values


@state("zero")
def _(subject: Subject) -> Cell:
    """A row of zeros, all zeros, and in float16 a row of zeros whose gradient must be finite."""
    places = (lambda x: x[:1] if x.dim() else x, lambda x: x)
    cells = [of_values(subject, place, 0.0) for place in places]
    if not subject.full:
        half = attempt(subject, lambda: finite_in_half(subject))
        cells += [half] if half.kind != REFUSED else []  # which the column of float16 tells
    return worst(cells)


def finite_in_half(subject: Subject) -> str:
    leaves = filled(subject, lambda x: x[:1], 0.0, torch.float16)
    found = observe(subject, leaves)
    bad = [k for k, x in enumerate((*found.outputs, *found.grads)) if x is not None and not x.isfinite().all()]
    return f"result {bad[0]} of a zero row in float16 is not finite" if bad else ""


@state("NaN")
def _(subject: Subject) -> Cell:
    """One NaN in the input: what is finite, and what is not."""
    return of_values(subject, lambda x: x.reshape(-1)[1:2], float("nan"))


@state("inf")
def _(subject: Subject) -> Cell:
    """One infinity in the input."""
    return of_values(subject, lambda x: x.reshape(-1)[1:2], float("inf"))


def filled(subject: Subject, place: Callable, value: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The value in the first leaf that may hold it."""
    leaves = [x.detach().clone() for x in prepared(subject, dtype)]
    first = next(k for k, leaf in enumerate(subject.leaves) if leaf.kind not in ("orthonormal",))
    place(leaves[first]).fill_(value)
    return [
        x.requires_grad_(subject.grad and leaf.differentiable) for x, leaf in zip(leaves, subject.leaves, strict=True)
    ]


def of_values(subject: Subject, place: Callable, value: float) -> Cell:
    def leaves() -> list[Tensor]:
        return filled(subject, place, value)

    def look() -> Any:
        found = observe(subject, leaves())
        try:
            theirs = truth(subject, leaves())
        except RuntimeError as error:  # torch.linalg refuses what is not finite
            return Cell(TORCH, told(error)) if not found.outputs[0].isfinite().all() else "finite where torch refuses"
        return like_torch(found, theirs, judged_at(subject, leaves(), found), strict=not may_spread(subject, value))

    return attempt(subject, look, lambda: truth(subject, leaves()))


# modules


@state("copied")
def _(subject: Subject) -> Cell:
    """`copy.deepcopy`, `pickle` and a `state_dict` give the same bits."""
    if not subject.module:
        return Cell(NONE)

    def look() -> str:
        module = subject.call()
        inputs = load(module, [x.detach() for x in prepared(subject)])
        fresh = subject.call()
        fresh.load_state_dict(module.state_dict())
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh]
        first, *others = [[x.detach() for x in flat(m(*inputs))] for m in (module, *copies)]
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        return "" if same else "a copy gives other bits"

    return attempt(subject, look)


def row(subject: Subject) -> dict[str, Cell]:
    """All cells of a function but those of several processes."""
    cells = {}
    for name, look in STATES.items():
        torch.manual_seed(0)
        cells[name] = look(subject)
    return cells
