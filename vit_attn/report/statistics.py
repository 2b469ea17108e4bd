"""Means with their uncertainty, paired tests over shared seeds, and the front of a trade-off."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

Better = Literal["higher", "lower"]
Verdict = Literal["better", "worse", "cannot tell", "baseline"]

LEVEL = 0.05  # of the tests; intervals are at 1 - LEVEL
# Scores come from fp32: differences that agree to this share of the scores are the same difference.
_RESOLUTION = 1e-6


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; std with n - 1, 95 % interval from Student's t. Where n = 1 all but the mean are NaN."""

    mean: float
    std: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedTest:
    """A group against the baseline, over the seeds that both have.

    Args:
        difference: mean of group - baseline.
        low, high: 95 % interval of that difference, not corrected for the number of groups; NaN without a test.
        p: of the paired t-test, two-sided; NaN where nothing can be tested.
        p_adjusted: by Holm's method over the groups of the comparison.
        n: shared seeds.
        verdict: "better" and "worse" only where p_adjusted < 0.05.
        reason: why nothing could be tested; empty otherwise.
    """

    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    n: int
    verdict: Verdict
    reason: str = ""


def estimate(values: Iterable[float]) -> Estimate:
    """Estimate a mean from independent values; those that are not finite are left out, and ``n`` says so."""
    finite = np.array([value for value in values if math.isfinite(value)], dtype=float)
    n = len(finite)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    if n == 1:
        return Estimate(float(finite[0]), math.nan, math.nan, math.nan, 1)
    if np.ptp(finite) == 0:  # rounding would give a mean beside the value, and a spread of 1e-17
        value = float(finite[0])
        return Estimate(value, 0.0, value, value, n)
    mean, std = float(finite.mean()), float(finite.std(ddof=1))
    half = _half_width(std, n)
    return Estimate(mean, std, mean - half, mean + half, n)


def _half_width(std: float, n: int) -> float:
    return float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * std / math.sqrt(n)


def paired_test(values: Mapping[int, float], baseline: Mapping[int, float], *, better: Better) -> PairedTest:
    """Test a group against the baseline by Student's paired t-test, two-sided, on its own.

    Two runs of one seed share their split, their order of the data and, where the shapes agree, their first weights:
    the difference within a seed is what varies least.

    Args:
        values: seed → score of the group.
        baseline: seed → score of the baseline.
        better: the direction of the score.

    Returns:
        The test as if it were the only one: :func:`correct` accounts for several.
    """
    seeds = sorted(values.keys() & baseline.keys())
    pairs = np.array([(values[seed], baseline[seed]) for seed in seeds], dtype=float).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    differences, n = pairs[:, 0] - pairs[:, 1], len(pairs)
    mean = float(differences.mean()) if n else math.nan
    reason = ""
    if n < 2:
        reason = f"{n} shared seed{'s' * (n != 1)}: nothing can be tested"
    elif np.ptp(differences) <= _RESOLUTION * np.abs(pairs).max():
        reason = "the same difference in every seed: no spread to test against"
    if reason:
        return PairedTest(mean, math.nan, math.nan, math.nan, math.nan, n, "cannot tell", reason)
    std = float(differences.std(ddof=1))
    p = float(2 * stats.t.sf(abs(mean) / (std / math.sqrt(n)), n - 1))
    half = _half_width(std, n)
    return PairedTest(mean, mean - half, mean + half, p, p, n, _verdict(mean, p, better))


def against_itself(n: int) -> PairedTest:
    """Stand where the baseline's own test would stand."""
    return PairedTest(0.0, math.nan, math.nan, math.nan, math.nan, n, "baseline")


def correct(tests: Sequence[PairedTest], *, better: Better) -> list[PairedTest]:
    """Adjust the p of several tests of one question by Holm's method, and judge by the adjusted ones."""
    adjusted = holm([test.p for test in tests])
    return [
        replace(test, p_adjusted=p, verdict=_verdict(test.difference, p, better))
        for test, p in zip(tests, adjusted, strict=True)
    ]


def _verdict(difference: float, p: float, better: Better) -> Verdict:
    if not p < LEVEL:  # NaN included
        return "cannot tell"
    return "better" if (difference > 0) == (better == "higher") else "worse"


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values so that the chance of any false rejection stays below the level (Holm, 1979).

    Args:
        p: NaN is no member of the family, and stays NaN.
    """
    order = sorted((index for index, value in enumerate(p) if not math.isnan(value)), key=lambda index: p[index])
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def pareto(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Tell who is on the front: no other costs at most as much and scores at least as high, and is not its equal.

    Args:
        costs: lower is better; NaN is never on the front.
        scores: higher is better; likewise.
    """
    points = list(zip(costs, scores, strict=True))

    def beaten(cost: float, score: float) -> bool:
        return any(c <= cost and s >= score and (c < cost or s > score) for c, s in points)

    return [not (math.isnan(cost) or math.isnan(score) or beaten(cost, score)) for cost, score in points]
