"""The table of targets: what the sparse engine and the compiled normalizers owe, what they aim at, what they do.

Every row is a ratio of two candidates of the same rounds, forward and backward, B=2, H=3, D=64, fp32.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt

import entmax as entmax_package
import torch
import torch.nn.functional as F
from torch import Tensor

from vit_attn.attention import IMPLEMENTATIONS, attention, entmax, entmax15, make_pattern, sparsemax
from vit_attn.bench.cases import SDPA, Attend, make_inputs, step
from vit_attn.bench.model import Shape, build, training_step
from vit_attn.bench.output import Cell, Column, ConsoleProgress, Spread, Table
from vit_attn.bench.timing import Candidate, Failed, Timing, describe_failure, interleave, ratio
from vit_attn.cost import peak_memory

BATCH, HEADS, HEAD_DIM = 2, 3, 64
# Tokens: beyond, the entmax package is compared on one (N, N) matrix instead of B·H of them.
_WHOLE_PACKAGE_MAX = 1024
_ALPHA = 1.3
_MODEL_MAX_SIZE, _MODEL_BATCH = 1024, 4
_COLUMNS = (
    Column("target", words=True),
    Column("N"),
    Column("measured", "×"),
    Column("owed", "×", words=True),
    Column("aim", "×", words=True),
    Column("verdict", words=True),
    Column("note", words=True),
)


@dataclass(frozen=True)
class Target:
    """What a ratio owes and aims at, by N; ``at_least`` where more is better."""

    what: str
    owed: Mapping[int, float]
    aim: Mapping[int, float]
    at_least: bool = True

    def verdict(self, value: float, size: int) -> str:
        """Tell which bound the value reaches; nothing at an N without one."""
        if size not in self.owed:
            return ""
        for bound, words in ((self.aim[size], "aim met"), (self.owed[size], "owed met")):
            if value >= bound if self.at_least else value <= bound:
                return words
        return "short"

    def bound(self, bounds: Mapping[int, float], size: int) -> str:
        """Write "≥ 6" or "≤ 1.3"; nothing at an N without one."""
        return f"{'≥' if self.at_least else '≤'} {bounds[size]:g}" if size in bounds else ""


def _faster(what: str, small: tuple[float, float], large: tuple[float, float]) -> Target:
    """At least these (owed, aim) at 1,024 and 4,096 tokens."""
    return Target(what, {1024: small[0], 4096: large[0]}, {1024: small[1], 4096: large[1]})


def _slower(what: str, owed: float, aim: float) -> Target:
    """At most these at both sizes."""
    return Target(what, {1024: owed, 4096: owed}, {1024: aim, 4096: aim}, at_least=False)


_SPARSE = ("strided", "fixed", "sliding_window", "dilated_sliding_window")
_SPEED = {name: _faster(f"softmax+{name}: times faster than SDPA", (6, 10), (15, 25)) for name in _SPARSE}
_MECHANISM = {
    name: _slower(f"{name}+strided: time relative to softmax+strided", 1.3, 1.1) for name in ("entmax15", "sparsemax")
}
_NORMALIZER = {
    "entmax15": _slower("entmax15 alone: time relative to torch.softmax", 3, 1.5),
    "sparsemax": _slower("sparsemax alone: time relative to torch.softmax", 3, 1.5),
    "entmax": _slower(f"entmax α={_ALPHA} alone: time relative to torch.softmax", 5, 3),
    "learned α": _slower("entmax, learned α per head, alone: time relative to torch.softmax", 5, 3),
}
_PACKAGE = {
    name: _faster(f"{name} alone: times faster than the entmax package", (20, 40), (20, 40))
    for name in ("entmax15", "sparsemax")
}
_MEMORY = _faster("softmax+strided: times less peak memory than dense", (8, 16), (20, 40))
_TRAINING = Target("ViT training, strided: images/s relative to softmax", {1024: 1.5}, {1024: 2})


@dataclass(frozen=True)
class Finding:
    """One target at one N: the ratio, what it was computed from, and a remark."""

    target: Target
    size: int
    measured: Spread | float | None
    timings: tuple[Timing, ...] = ()
    note: str = ""


def targets_table(args: argparse.Namespace) -> Table:
    """Measure every target at ``args.target_sizes``, in fp32 whatever the suite's dtype."""
    found: list[Finding] = []
    for size in args.target_sizes:
        for measure in (_mechanisms, _normalizers, _against_package, _memory, _training):
            found += measure(size, args)
    order = list(dict.fromkeys(finding.target.what for finding in found))
    table = Table(f"targets, B={BATCH} H={HEADS} D={HEAD_DIM} float32, forward+backward", _COLUMNS)
    for finding in sorted(found, key=lambda finding: (order.index(finding.target.what), finding.size)):
        table.add(_cells(finding), finding.timings)
    table.note(
        f"Mechanisms and model: implementation {own_implementation()!r}. SDPA: over all keys, in the same rounds."
    )
    table.note("Normalizers alone: scores (2, 3, N, N), to weights and back. Memory: against implementation 'dense'.")
    return table


def own_implementation() -> str:
    """What the targets hold for: the sparse engine, as soon as there is one."""
    return "blocks" if "blocks" in IMPLEMENTATIONS else "auto"


def _cells(finding: Finding) -> dict[str, Cell]:
    target, size, measured = finding.target, finding.size, finding.measured
    cells: dict[str, Cell] = {
        "target": target.what,
        "N": size,
        "measured": measured,
        "owed": target.bound(target.owed, size),
        "aim": target.bound(target.aim, size),
        "note": finding.note,
    }
    if measured is not None:
        cells["verdict"] = target.verdict(measured.median if isinstance(measured, Spread) else measured, size)
    return cells


def _compare(target: Target, size: int, above: Timing | Failed, below: Timing | Failed, note: str = "") -> Finding:
    """The finding of above/below; without a number where either failed."""
    for timing in (above, below):
        if isinstance(timing, Failed):
            return Finding(target, size, None, note=f"{timing.name}: {timing.reason}")
    assert isinstance(above, Timing)
    assert isinstance(below, Timing)
    return Finding(target, size, Spread(*ratio(above, below)), (above, below), note)


def _interleave(
    title: str, candidates: Mapping[str, Candidate], args: argparse.Namespace
) -> dict[str, Timing | Failed]:
    return interleave(
        candidates,
        rounds=args.rounds,
        device=args.device,
        seconds_per_candidate=args.seconds_per_candidate,
        progress=ConsoleProgress(f"targets, {title}"),
    )


def _attend(normalizer: str, pattern: str, size: int, implementation: str) -> Attend:
    laid = make_pattern(pattern, num_tokens=size)
    return partial(attention, normalizer=normalizer, pattern=laid, implementation=implementation)


def _mechanisms(size: int, args: argparse.Namespace) -> list[Finding]:
    """Sparse softmax against SDPA over all keys, and sparse entmax against sparse softmax."""
    inputs = make_inputs((BATCH, HEADS, size, HEAD_DIM), dtype=torch.float32, device=args.device, seed=args.seed)
    own = own_implementation()
    attends: dict[str, Attend] = {SDPA: F.scaled_dot_product_attention}
    attends |= {name: _attend("softmax", name, size, own) for name in _SPEED}
    attends |= {name: _attend(name, "strided", size, own) for name in _MECHANISM}
    steps = {name: step(attend, inputs, "forward+backward") for name, attend in attends.items()}
    timings = _interleave(f"mechanisms, N={size:,}", steps, args)
    found = [_compare(target, size, timings[SDPA], timings[name]) for name, target in _SPEED.items()]
    return found + [_compare(t, size, timings[name], timings["strided"]) for name, t in _MECHANISM.items()]


def _scores(shape: tuple[int, ...], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Scores that want a gradient, and the gradient of the weights."""
    generator = torch.Generator().manual_seed(args.seed)
    scores = torch.randn(shape, generator=generator).to(args.device).requires_grad_()
    return scores, torch.randn(shape, generator=generator).to(args.device)


def _gradients(normalize: Callable[[Tensor], Tensor], scores: Tensor, grad: Tensor, *parameters: Tensor) -> object:
    return torch.autograd.grad(normalize(scores), (scores, *parameters), grad)


def _normalizers(size: int, args: argparse.Namespace) -> list[Finding]:
    """Each normalizer alone against torch.softmax, on (B, H, N, N) scores."""
    scores, grad = _scores((BATCH, HEADS, size, size), args)
    alpha = torch.full((HEADS, 1, 1), _ALPHA, device=args.device, requires_grad=True)
    learned = partial(entmax, alpha=alpha)
    candidates: dict[str, Candidate] = {
        "torch.softmax": partial(_gradients, partial(torch.softmax, dim=-1), scores, grad),
        "entmax15": partial(_gradients, entmax15, scores, grad),
        "sparsemax": partial(_gradients, sparsemax, scores, grad),
        "entmax": partial(_gradients, partial(entmax, alpha=_ALPHA), scores, grad),
        "learned α": partial(_gradients, learned, scores, grad, alpha),
    }
    timings = _interleave(f"normalizers, N={size:,}", candidates, args)
    return [_compare(target, size, timings[name], timings["torch.softmax"]) for name, target in _NORMALIZER.items()]


def _against_package(size: int, args: argparse.Namespace) -> list[Finding]:
    """The normalizers alone against those of the entmax package, on fewer rows where the package is too slow."""
    whole = size <= _WHOLE_PACKAGE_MAX
    scores, grad = _scores((BATCH, HEADS, size, size) if whole else (1, 1, size, size), args)
    note = "" if whole else f"on scores (1, 1, {size}, {size}): the package is slow and needs much memory"
    candidates: dict[str, Candidate] = {}
    for name, own in {"entmax15": entmax15, "sparsemax": sparsemax}.items():
        candidates[name] = partial(_gradients, own, scores, grad)
        candidates[f"package's {name}"] = partial(_gradients, getattr(entmax_package, name), scores, grad)
    timings = _interleave(f"the entmax package, N={size:,}", candidates, args)
    return [_compare(t, size, timings[f"package's {name}"], timings[name], note) for name, t in _PACKAGE.items()]


def _memory(size: int, args: argparse.Namespace) -> list[Finding]:
    """What softmax+strided holds at most, against the computation that forms all N² weights."""
    inputs = make_inputs((BATCH, HEADS, size, HEAD_DIM), dtype=torch.float32, device=args.device, seed=args.seed)
    peaks = []
    for implementation in ("dense", own_implementation()):
        call = step(_attend("softmax", "strided", size, implementation), inputs, "forward+backward")
        try:
            call()  # masks and tables that are kept are no part of a call's memory
            peaks.append(peak_memory(call, args.device))
        except RuntimeError as error:
            return [Finding(_MEMORY, size, None, note=f"{implementation}: {describe_failure(error)}")]
    dense, own = peaks
    return [Finding(_MEMORY, size, dense / own, note=f"{own / 2**20:,.1f} MiB against {dense / 2**20:,.1f} MiB")]


def _training(size: int, args: argparse.Namespace) -> list[Finding]:
    """Whole training steps, where the images are small enough for a step to end soon."""
    if size > _MODEL_MAX_SIZE:
        return []
    shape = Shape(image_size=isqrt(size), patch_size=1, embed_dim=192, depth=4, heads=HEADS, batch=_MODEL_BATCH)
    steps = {
        name: training_step(build(name, shape, args.device, implementation=implementation), shape, seed=args.seed)
        for name, implementation in (("softmax", "auto"), ("strided", own_implementation()))
    }
    timings = _interleave(f"training steps, {shape}", steps, args)
    return [_compare(_TRAINING, size, timings["softmax"], timings["strided"], str(shape))]
