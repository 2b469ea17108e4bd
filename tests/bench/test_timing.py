"""Candidates take turns, and failures stay where they happen."""

import gc
import math

import pytest
import torch

from vit_attn.bench import timing
from vit_attn.bench.timing import Failed, Timing, describe_failure, interleave, ratio

CPU = torch.device("cpu")


class Clock:
    """A clock that only candidates move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def candidate(self, seconds, calls=None, name=""):
        def function():
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds
            if calls is not None:
                calls.append(name)

        return function


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_timing_gives_median_and_quartiles():
    measured = Timing("a", (5.0, 1.0, 2.0, 4.0, 3.0))
    assert (measured.median, measured.low, measured.high) == (3.0, 2.0, 4.0)


def test_a_ratio_is_taken_round_by_round_and_not_between_medians():
    # A machine twice as slow in the second round, and four times in the third: the ratio does not notice.
    a, b = Timing("a", (2.0, 4.0, 8.0)), Timing("b", (1.0, 2.0, 4.0))
    assert ratio(a, b) == (2.0, 2.0, 2.0)
    a, b = Timing("a", (1.0, 6.0, 3.0)), Timing("b", (1.0, 2.0, 3.0))
    assert ratio(a, b) == (1.0, 1.0, 2.0)  # the medians' ratio would be 1.5


def test_a_ratio_uses_the_rounds_in_which_both_were_measured():
    assert ratio(Timing("a", (6.0,)), Timing("b", (2.0, 100.0, 100.0))) == (3.0, 3.0, 3.0)


def test_each_round_starts_with_the_next_candidate(clock):
    calls: list[str] = []
    candidates = {name: clock.candidate(1.0, calls, name) for name in "abc"}
    interleave(candidates, rounds=4, warmup=2, device=CPU)
    # Two to warm up, one that tells how long a call takes, then the rounds.
    assert "".join(calls) == "aaabbbccc" + "abc" + "bca" + "cab" + "abc"


def test_short_candidates_are_repeated_and_reported_per_call(clock):
    calls: list[str] = []
    candidates = {"short": clock.candidate(0.001, calls, "s"), "long": clock.candidate(0.5, calls, "l")}
    results = interleave(candidates, rounds=1, device=CPU, min_round_seconds=0.02)
    in_round = "".join(calls).split("l")[0][-1:] + "".join(calls)[-1:]
    assert in_round == "sl"
    assert "".join(calls).endswith("s" * 20 + "l")
    assert results["short"].median == pytest.approx(0.001)
    assert results["long"].median == pytest.approx(0.5)


def test_a_long_first_call_does_not_make_a_candidate_slow(clock):
    compiled = clock.candidate(iter([60.0, *[0.1] * 50]))
    results = interleave({"compiled": compiled}, rounds=5, warmup=0, device=CPU, seconds_per_candidate=10)
    assert results["compiled"].seconds == pytest.approx((0.1,) * 5)


def test_a_slow_candidate_gets_the_first_rounds_and_at_least_one(clock):
    candidates = {"fast": clock.candidate(1.0), "slow": clock.candidate(4.0), "endless": clock.candidate(100.0)}
    results = interleave(candidates, rounds=9, device=CPU, seconds_per_candidate=13)
    assert {name: len(result.seconds) for name, result in results.items()} == {"fast": 9, "slow": 3, "endless": 1}


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, NotImplementedError, ValueError])
def test_a_failing_candidate_is_reported_and_the_others_go_on(clock, fails_at, error):
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        clock.now += 1
        if calls >= fails_at:
            raise error("no such kernel\n  Hint: buy another machine")

    results = interleave({"good": clock.candidate(1.0), "bad": failing}, rounds=3, device=CPU)
    assert results["bad"] == Failed("bad", "no such kernel")
    assert results["good"].seconds == (1.0, 1.0, 1.0)
    assert calls == fails_at
    assert list(results) == ["good", "bad"]


def test_a_bug_is_no_failing_candidate(clock):
    def buggy():
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        interleave({"buggy": buggy}, rounds=1, device=CPU)


def test_the_garbage_collector_rests_while_the_clock_runs_and_wakes_again():
    seen = []
    gc.enable()
    interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=2, device=CPU, min_round_seconds=0)
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        interleave({}, rounds=0, device=CPU)


def test_progress_is_told_of_every_step_and_stopped_even_by_a_bug(clock):
    told: list[object] = []

    class Listener:
        start = step = staticmethod(told.append)

        @staticmethod
        def stop():
            told.append("stop")

    interleave({"a": clock.candidate(1.0), "b": clock.candidate(1.0)}, rounds=2, device=CPU, progress=Listener())
    assert told == [6, "a", "b", "a", "b", "b", "a", "stop"]
    told.clear()
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, rounds=1, device=CPU, progress=Listener())
    assert told[-1] == "stop"


def test_a_failure_is_one_line_of_limited_length():
    assert describe_failure(RuntimeError("\n  first   line \nsecond")) == "first line"
    assert describe_failure(RuntimeError()) == "RuntimeError"
    assert len(describe_failure(RuntimeError("x" * 1000), longest=80)) == 80


def test_seconds_are_finite_numbers_on_the_real_clock():
    results = interleave({"sum": lambda: sum(range(100))}, rounds=2, device=CPU, min_round_seconds=1e-4)
    assert all(0 < seconds < math.inf for seconds in results["sum"].seconds)
    assert len(results["sum"].seconds) == 2
