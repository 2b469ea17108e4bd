"""Times that can be compared: candidates take turns, so that a machine's bad minute meets all of them.

One measurement repeats a candidate until it has lasted long enough for the clock; a round measures every candidate
once; ratios are taken within a round, and reported as the median over the rounds with their quartiles.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vit_attn.cost import no_garbage_collection
from vit_attn.errors import one_line

Candidate = Callable[[], object]


class Progress(Protocol):
    """Whoever wants to know how far :func:`interleave` is; see :class:`vit_attn.bench.output.ConsoleProgress`."""

    def start(self, total: int) -> None:
        """Announce ``total`` steps: each candidate's warm-up, and its part in each round."""

    def step(self, name: str) -> None:
        """Candidate ``name`` is next."""

    def stop(self) -> None:
        """No more steps, whether or not all were taken."""


@dataclass(frozen=True)
class Timing:
    """Seconds that one call took, one number per round: round i of two candidates of one run belongs together."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return quartiles(self.seconds)[0]

    @property
    def low(self) -> float:
        """Lower quartile over the rounds, in seconds."""
        return quartiles(self.seconds)[1]

    @property
    def high(self) -> float:
        """Upper quartile over the rounds, in seconds."""
        return quartiles(self.seconds)[2]


@dataclass(frozen=True)
class Failed:
    """A candidate that could not be measured, and why, on one line."""

    name: str
    reason: str


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return median, low, high


def ratio(a: Timing, b: Timing) -> tuple[float, float, float]:
    """Median, lower and upper quartile of a/b, over the rounds in which both were measured.

    A candidate that was too slow for every round took part in the first ones.
    """
    return quartiles([x / y for x, y in zip(a.seconds, b.seconds, strict=False)])


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device,
    min_round_seconds: float = 0.02,
    seconds_per_candidate: float = math.inf,
    progress: Progress | None = None,
) -> dict[str, Timing | Failed]:
    """Time every candidate in every round, starting each round with the next one.

    Args:
        candidates: functions without arguments, by name. One that raises ``RuntimeError`` (out of memory, an
            operation that the device lacks, a failed compilation) or ``ValueError`` (a case that it refuses) is
            recorded as :class:`Failed`; the rest go on.
        rounds: how often each is measured.
        warmup: calls before the first measurement; at least one is made, since it may compile.
        min_round_seconds: a measurement repeats short candidates until it lasts about this long.
        seconds_per_candidate: a candidate that would need longer for its rounds is left out of the last ones.
        progress: told of every step.

    Returns:
        What was measured, by name, in the order given. Seconds are per call.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    failed: dict[str, Failed] = {}
    repeats: dict[str, int] = {}
    last_round: dict[str, int] = {}
    if progress is not None:
        progress.start(len(candidates) * (rounds + 1))
    try:
        for name, function in candidates.items():
            with _failing(name, failed, progress):
                repeats[name], estimate = _prepare(function, warmup, device, min_round_seconds)
                affordable = min(rounds, seconds_per_candidate / estimate)
                last_round[name] = max(1, int(affordable))
        for index in range(rounds):
            for name in _rotated(list(candidates), index):
                if name in failed or index >= last_round[name]:
                    continue
                with _failing(name, failed, progress):
                    seconds[name].append(_measure(candidates[name], repeats[name], device) / repeats[name])
    finally:
        if progress is not None:
            progress.stop()
    return {name: failed[name] if name in failed else Timing(name, tuple(seconds[name])) for name in candidates}


def _rotated(names: list[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return names[by:] + names[:by]


@contextmanager
def _failing(name: str, failed: dict[str, Failed], progress: Progress | None) -> Iterator[None]:
    """Record a candidate that raises, instead of ending the benchmark."""
    if progress is not None:
        progress.step(name)
    try:
        yield
    # Out of memory and failed compilations are RuntimeErrors; an implementation refuses a case with a ValueError.
    except (RuntimeError, ValueError) as error:
        failed[name] = Failed(name, describe_failure(error))
    if name in failed and torch.cuda.is_available():
        torch.cuda.empty_cache()  # what a failed candidate had taken, the next ones need


def describe_failure(error: BaseException, longest: int = 160) -> str:
    """The first sentence or so of an error's message, on one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = one_line(first)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _prepare(function: Candidate, warmup: int, device: torch.device, min_seconds: float) -> tuple[int, float]:
    """Warm up; return how often a measurement calls the function, and the seconds that such a measurement takes."""
    _measure(function, max(1, warmup), device)
    count = 1
    taken = _measure(function, count, device)
    while taken < min_seconds:
        count = max(2 * count, math.ceil(1.1 * count * min_seconds / max(taken, 1e-9)))
        taken = _measure(function, count, device)
    return count, taken


def _measure(function: Candidate, repeats: int, device: torch.device) -> float:
    """Seconds for ``repeats`` calls, without the garbage collector, on a GPU until it has finished."""
    with no_garbage_collection():
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize(device)
        return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
