"""Means, tests and their correction against SciPy and against brute force."""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from vit_attn.report.statistics import Estimate, against_itself, correct, estimate, holm, paired_test, pareto

NAN = math.nan
GROUP = {1: 0.93, 2: 0.951, 3: 0.944, 4: 0.962, 5: 0.939}
BASE = {1: 0.91, 2: 0.935, 3: 0.941, 4: 0.937, 5: 0.925}


@pytest.fixture(autouse=True)
def _no_warnings():
    """A division by zero would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def by_closed_testing(p):
    """A hypothesis is rejected where every set that holds it is, each set by Bonferroni's test of its members."""
    family = [index for index, each in enumerate(p) if not math.isnan(each)]
    subsets = [subset for size in range(1, len(family) + 1) for subset in itertools.combinations(family, size)]
    return [
        max(min(1.0, len(subset) * min(p[member] for member in subset)) for subset in subsets if index in subset)
        if index in family
        else NAN
        for index in range(len(p))
    ]


@pytest.mark.parametrize("n", [2, 3, 10])
def test_estimate_is_scipys(n):
    values = np.random.default_rng(n).normal(0.9, 0.02, n)
    found = estimate(values.tolist())
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert found.std == pytest.approx(stats.tstd(values), rel=1e-12)
    assert found.n == n


def test_estimate_of_nothing_and_of_one_value():
    assert estimate([]).n == 0
    assert math.isnan(estimate([]).mean)
    one = estimate([0.5])
    assert (one.mean, one.n) == (0.5, 1)
    assert all(math.isnan(each) for each in (one.std, one.low, one.high))


def test_estimate_of_a_constant_has_no_spread_at_all():
    assert estimate([0.1, 0.1, 0.1]) == Estimate(0.1, 0.0, 0.1, 0.1, 3)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_estimate_leaves_out_what_is_not_finite(bad):
    assert estimate([0.2, bad, 0.4, bad]) == estimate([0.2, 0.4])
    assert estimate([bad]).n == 0
    assert estimate([0.2, bad]).n == 1


def test_paired_test_is_scipys():
    found = paired_test(GROUP, BASE, better="higher")
    expected = stats.ttest_rel(list(GROUP.values()), list(BASE.values()))
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-10)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-10)
    assert found.difference == pytest.approx(np.mean([GROUP[seed] - BASE[seed] for seed in GROUP]), rel=1e-12)
    assert (found.n, found.reason) == (5, "")


def test_only_shared_seeds_are_tested():
    group, base = GROUP | {8: 0.1}, {9: 0.99} | dict(reversed(BASE.items()))
    assert paired_test(group, base, better="higher") == paired_test(GROUP, BASE, better="higher")
    del base[2], group[4]
    shared = [1, 3, 5]
    expected = stats.ttest_rel([GROUP[seed] for seed in shared], [BASE[seed] for seed in shared])
    found = paired_test(group, base, better="higher")
    assert (found.n, found.p) == (3, pytest.approx(expected.pvalue, rel=1e-10))


def test_a_seed_whose_score_is_not_a_number_is_not_tested():
    without = {seed: GROUP[seed] for seed in (1, 2, 4, 5)}
    found = paired_test(GROUP | {3: NAN}, BASE, better="higher")
    assert found == paired_test(without, BASE, better="higher")
    assert found.n == 4


@pytest.mark.parametrize(
    ("group", "base", "better", "verdict"),
    [
        (GROUP, BASE, "higher", "better"),
        (BASE, GROUP, "higher", "worse"),
        (GROUP, BASE, "lower", "worse"),
        (BASE, GROUP, "lower", "better"),
        (GROUP, GROUP | {1: 0.94, 2: 0.94}, "higher", "cannot tell"),
    ],
)
def test_verdict_follows_the_direction(group, base, better, verdict):
    assert paired_test(group, base, better=better).verdict == verdict


@pytest.mark.parametrize("shift", [0.0, 0.1, -0.05])
def test_the_same_difference_in_every_seed_cannot_be_tested(shift):
    group = {seed: score + shift for seed, score in BASE.items()}
    found = paired_test(group, BASE, better="higher")
    assert found.difference == pytest.approx(shift)
    assert math.isnan(found.p)
    assert math.isnan(found.p_adjusted)
    assert (found.verdict, found.n) == ("cannot tell", 5)
    assert "no spread" in found.reason


def test_scores_of_zero_cannot_be_tested():
    zeros = dict.fromkeys(BASE, 0.0)
    assert paired_test(zeros, zeros, better="lower").verdict == "cannot tell"


@pytest.mark.parametrize(("shared", "difference"), [({}, NAN), ({1: 0.9}, -0.01)])
def test_fewer_than_two_shared_seeds_cannot_be_tested(shared, difference):
    found = paired_test(shared | {7: 0.2}, BASE, better="higher")
    assert found.difference == pytest.approx(difference, nan_ok=True)
    assert all(math.isnan(each) for each in (found.p, found.low, found.high))
    assert (found.n, found.verdict) == (len(shared), "cannot tell")
    assert f"{len(shared)} shared seed" in found.reason


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_the_closed_test_of_bonferroni(seed):
    rng = np.random.default_rng(seed)
    p = (rng.random(rng.integers(1, 6)) ** 3).tolist()
    if seed % 2:
        p.insert(int(rng.integers(len(p))), NAN)
    if seed % 5 == 0:
        p.append(p[0])  # a tie, or a second NaN
    assert holm(p) == pytest.approx(by_closed_testing(p), rel=1e-12, nan_ok=True)


def test_holm_by_hand():
    # 3 · 0.01, 2 · 0.03, and 1 · 0.04 raised to what came before
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


def test_verdict_after_correction_is_of_the_adjusted_p():
    shifts = {"clear": 0.0, "alone": 0.004, "none": 0.0205}
    tests = [
        paired_test({seed: score - shift for seed, score in GROUP.items()}, BASE, better="higher")
        for shift in shifts.values()
    ]
    assert [test.verdict for test in tests] == ["better", "better", "cannot tell"]
    untestable = paired_test({}, BASE, better="higher")
    corrected = correct([*tests, untestable], better="higher")
    expected = by_closed_testing([test.p for test in tests])
    assert [test.p_adjusted for test in corrected[:3]] == pytest.approx(expected)
    assert [test.p for test in corrected[:3]] == [test.p for test in tests]
    assert expected[1] > 0.05 > tests[1].p
    assert [test.verdict for test in corrected] == ["better", "cannot tell", "cannot tell", "cannot tell"]
    assert math.isnan(corrected[3].p_adjusted)


def test_correction_keeps_the_direction():
    tests = [paired_test(GROUP, BASE, better="lower")]
    assert correct(tests, better="lower")[0].verdict == "worse"


def test_baseline_is_not_tested_against_itself():
    found = against_itself(4)
    assert (found.difference, found.verdict, found.n) == (0.0, "baseline", 4)
    assert math.isnan(found.p)


@pytest.mark.parametrize("seed", range(10))
def test_pareto_is_brute_force(seed):
    rng = np.random.default_rng(seed)
    costs, scores = (rng.integers(0, 6, 15).astype(float) for _ in range(2))  # few values: many ties
    costs[rng.integers(15)], scores[rng.integers(15)] = NAN, NAN
    expected = []
    for i in range(15):
        known = np.isfinite(costs[i]) and np.isfinite(scores[i])
        no_worse = (costs <= costs[i]) & (scores >= scores[i])
        strictly = (costs < costs[i]) | (scores > scores[i])
        expected.append(bool(known and not np.any(no_worse & strictly)))
    found = pareto(costs.tolist(), scores.tolist())
    assert found == expected
    assert any(found)


def test_equals_on_the_front_both_stay():
    assert pareto([1, 1, 2, 2], [5, 5, 5, 6]) == [True, True, False, True]
