"""Attention alone: every mechanism and implementation against torch's and others' kernels, and the table of targets.

    python -m vit_attn.bench attention --sizes 256,1024 --patterns strided --normalizers softmax,entmax15
    python -m vit_attn.bench attention --targets-only

Within one N and pass all candidates take turns. "× SDPA" is the time of torch's fused kernel over all keys, divided by
the candidate's, round by round: above 1 is faster.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vit_attn.arguments import whole
from vit_attn.attention import IMPLEMENTATIONS, MECHANISMS, NORMALIZERS, PATTERNS
from vit_attn.bench.cases import PASSES, SDPA, Case, make_inputs, mechanism_cases, own_cases, rival_cases, step
from vit_attn.bench.options import names, plot_path, positive_seconds, square_sizes
from vit_attn.bench.output import (
    Cell,
    Column,
    ConsoleProgress,
    Line,
    Plot,
    Spread,
    Table,
    milliseconds,
    times_faster,
)
from vit_attn.bench.targets import targets_table
from vit_attn.bench.timing import Failed, Timing, interleave
from vit_attn.cost import peak_memory
from vit_attn.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK = {"sizes": [64, 256], "target_sizes": [256], "seconds_per_candidate": 1.0}
_FLOOR = "floor: SDPA × share of entries"

_COLUMNS = (
    Column("N"),
    Column("pass", words=True),
    Column("mechanism", words=True),
    Column("implementation", words=True),
    Column("time", "ms"),
    Column("× SDPA"),
    Column("memory", "MiB"),
    Column("entries", "%"),
    Column("note", words=True),
)


@dataclass(frozen=True)
class Result:
    """A case at one N and pass: its timing or why it has none, and its peak memory in bytes."""

    size: int
    which: str
    case: Case
    timing: Timing | Failed
    memory: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    listed = {
        "normalizers": list(NORMALIZERS),
        "patterns": list(PATTERNS),
        "implementations": list(IMPLEMENTATIONS),
        "mechanisms": list(MECHANISMS),
    }
    sizes: dict[str, Any] = {"type": square_sizes, "metavar": "N,N,…"}
    parser.add_argument("--sizes", **sizes, default=[64, 256, 1024, 4096], help="tokens; default: 64,256,1024,4096")
    parser.add_argument("--batch", type=whole(1, 4096), default=2, help="B (default: %(default)s)")
    parser.add_argument("--heads", type=whole(1, 256), default=3, help="H (default: %(default)s)")
    parser.add_argument("--head-dim", type=whole(1, 1024), default=64, help="D (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: %(default)s")
    for option, known in listed.items():
        read = names(option.removesuffix("s"), known)
        text = f"of {','.join(known)}; default: all"
        parser.add_argument(f"--{option}", type=read, default=known, metavar="NAME,…", help=text)
    parser.add_argument(
        "--pass", dest="which", choices=["forward", "both"], default="both", help="default: %(default)s"
    )
    parser.add_argument(
        "--seconds-per-candidate",
        type=positive_seconds,
        default=20.0,
        help="slower ones get fewer rounds (default: %(default)s)",
    )
    parser.add_argument("--plot", type=plot_path, metavar="FILE", help="time against N: .png, .svg or .pdf")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--targets-only", action="store_true", help="the table of targets alone")
    only.add_argument("--no-targets", action="store_true", help="leave the table of targets out")
    parser.add_argument(
        "--target-sizes", **sizes, default=[1024, 4096], help="tokens in the table of targets; default: 1024,4096"
    )


def run(args: argparse.Namespace) -> list[Table]:
    """Measure; return the table of all candidates, with its plots, and the table of targets.

    Raises:
        UserError: a plot of nothing.
    """
    if args.plot is not None and args.targets_only:
        raise UserError("--plot draws what --targets-only leaves out: choose one")
    tables = []
    if not args.targets_only:
        passes = PASSES[:1] if args.which == "forward" else PASSES
        results = [result for size in args.sizes for which in passes for result in _measure(size, which, args)]
        tables.append(_table(results, args))
    if not args.no_targets:
        tables.append(targets_table(args))
    return tables


def _measure(size: int, which: str, args: argparse.Namespace) -> list[Result]:
    """Time all candidates for one N and pass in turn; then, one by one, weigh their memory."""
    shape = (args.batch, args.heads, size, args.head_dim)
    inputs = make_inputs(shape, dtype=DTYPES[args.dtype], device=args.device, seed=args.seed)
    cases = [*rival_cases(size, which, args.device, quick=args.quick)]
    cases += own_cases(size, args.normalizers, args.patterns, args.implementations)
    cases += mechanism_cases(size, args.mechanisms, args.head_dim, args.heads, args.device)
    calls = {case.name: step(case.attend, inputs, which) for case in cases if not case.skipped}
    timings = interleave(
        calls,
        rounds=args.rounds,
        device=args.device,
        seconds_per_candidate=args.seconds_per_candidate,
        progress=ConsoleProgress(f"attention, N={size:,}, {which}"),
    )
    results = []
    for case in cases:
        timing = Failed(case.name, case.skipped) if case.skipped else timings[case.name]
        memory = None if isinstance(timing, Failed) else peak_memory(calls[case.name], args.device)
        results.append(Result(size, which, case, timing, memory))
    return results


def _table(results: Sequence[Result], args: argparse.Namespace) -> Table:
    shape = f"B={args.batch} H={args.heads} D={args.head_dim} {args.dtype}"
    table = Table(f"attention, {shape}", _COLUMNS)
    references = {(r.size, r.which): r.timing for r in results if r.case.implementation == SDPA}
    for result in results:
        cells: dict[str, Cell] = {
            "N": result.size,
            "pass": result.which,
            "mechanism": result.case.mechanism,
            "implementation": result.case.implementation,
            "entries": None if result.case.entries is None else 100 * result.case.entries,
        }
        if isinstance(result.timing, Failed):
            table.add({**cells, "note": result.timing.reason})
            continue
        reference = references[result.size, result.which]
        cells |= {"time": milliseconds(result.timing), "memory": (result.memory or 0) / 2**20}
        if isinstance(reference, Timing):
            cells["× SDPA"] = times_faster(result.timing, reference)
        if len(result.timing.seconds) < args.rounds:
            cells["note"] = f"slow: {len(result.timing.seconds)} of {args.rounds} rounds"
        table.add(cells, [result.timing])
    table.note("× SDPA: how many times faster than torch's fused softmax over all keys, in the same rounds.")
    table.note("memory: the most that one call holds beyond its inputs. entries: share of N² that the pattern allows.")
    table.plots = [
        plot for which in PASSES for name in args.patterns if (plot := _plot(results, which, name)) is not None
    ]
    return table


def _plot(results: Sequence[Result], which: str, pattern: str) -> Plot | None:
    """One panel: the candidates of one pattern and pass, SDPA over all keys, and the floor; None without any."""
    measured = [(r, r.timing) for r in results if r.which == which and isinstance(r.timing, Timing)]
    lines: dict[str, Line] = {}
    for result, timing in measured:
        case = result.case
        if case.pattern not in (pattern, "") and case.implementation != SDPA:
            continue
        _extend(lines, _legend(case), _group(case), result.size, timing)
    if not lines:
        return None
    share = {r.size: r.case.entries or 1.0 for r, _ in measured if r.case.pattern == pattern}
    reference = lines.get(SDPA)
    if reference is not None and all(share.get(size, 1.0) < 1 for size in reference.sizes):
        floor = tuple(
            Spread(*(part * share[size] for part in (spread.median, spread.low, spread.high)))
            for size, spread in zip(reference.sizes, reference.seconds, strict=True)
        )
        lines[_FLOOR] = Line(_FLOOR, "", reference.sizes, floor, computed=True)
    return Plot(f"{pattern}, {which}", tuple(lines.values()))


def _extend(lines: dict[str, Line], name: str, group: str, size: int, timing: Timing) -> None:
    before = lines.get(name, Line(name, group, (), ()))
    spread = Spread(timing.median, timing.low, timing.high)
    lines[name] = replace(before, sizes=(*before.sizes, size), seconds=(*before.seconds, spread))


def _legend(case: Case) -> str:
    """The same name in the panel of every pattern."""
    if case.implementation in IMPLEMENTATIONS or case.implementation == "entmax package":
        return f"{case.normalizer} ({case.implementation})"
    return case.implementation


def _group(case: Case) -> str:
    """What shares a colour: a normalizer, or torch's own kernels."""
    return case.normalizer if _legend(case) != case.implementation else "torch"
