"""Plans against the labels of their patterns: every allowed entry once, in the component that it belongs to."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from vit_attn.attention import PATTERNS, Pattern, attention, make_pattern
from vit_attn.attention.blocks import Plan, make_plan, whole_plan
from vit_attn.attention.patterns import GLOBAL, LOCAL, SECOND, SELF, Layout

CPU = torch.device("cpu")
TOKENS = (1, 2, 5, 16, 31, 64, 100)
WINDOWS, STRIDES, DILATIONS = (1, 2, 5, 8, 40), (1, 3, 8, 33), (1, 2, 3)
PREFIXES = (0, 1, 3)
SPARSE = ("strided", "fixed", "sliding_window", "dilated_sliding_window")


def cases(name: str) -> list[Pattern]:
    """Every combination of what the pattern reads; prefixes take turns."""
    cls = PATTERNS[name]
    fields = cls.__dataclass_fields__
    options = [
        WINDOWS if "window" in fields else (None,),
        STRIDES if "stride" in fields else (None,),
        DILATIONS if "dilation" in fields else (None,),
    ]
    found = []
    for index, (tokens, window, stride, dilation, causal) in enumerate(product(TOKENS, *options, (True, False))):
        for prefix in PREFIXES if name in ("full", "causal", "fixed") else (PREFIXES[index % 3],):
            sizes = {"num_tokens": tokens, "num_prefix_tokens": prefix}
            given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
            found.append(make_pattern(name, **sizes, **given))
    return found


def fresh(pattern: Pattern) -> Plan:
    return make_plan.__wrapped__(pattern, CPU)  # leaves the cache alone


def scattered(plan: Plan, size: int) -> Tensor:
    """(N, N): how often the plan computes each entry."""
    seen = torch.zeros(size * size, dtype=torch.int64)
    if plan.regrouped is not None:
        _, entries = plan.regrouped.entries
        seen.index_add_(0, entries, torch.ones_like(entries))
    seen = seen.view(size, size)
    for rows in plan.rows:
        seen[rows.start : rows.stop, : rows.width] += 1
        if rows.forbidden is not None:
            seen[rows.start : rows.stop, rows.first : rows.width] -= rows.forbidden.long()
    return seen


@pytest.mark.parametrize("name", PATTERNS)
def test_a_plan_covers_every_allowed_entry_once_and_nothing_else(name):
    for pattern in cases(name):
        labels = pattern.labels()
        plan = fresh(pattern)
        assert torch.equal(scattered(plan, pattern.size), (labels != 0).long()), pattern
        part = plan.regrouped
        if part is None:
            continue
        places, entries = part.entries
        place, label = places % part.pitch, labels.flatten()[entries]
        in_classes = place < part.class_columns.stop
        in_columns = (place >= part.key_columns.start) & (place < part.key_columns.stop)
        in_band = place >= part.band_start
        assert (in_classes.int() + in_columns.int() + in_band.int() == 1).all(), pattern
        assert (label[in_classes] == SECOND).all(), pattern
        assert ((label[in_columns] == SECOND) | (label[in_columns] == GLOBAL)).all(), pattern
        assert ((label[in_band] == SELF) | (label[in_band] == LOCAL)).all(), pattern
        assert part.classes == bool(in_classes.any()), pattern


def test_every_pattern_has_cases_and_the_sparse_ones_have_a_layout():
    assert {name for name in PATTERNS if fresh(cases(name)[0]).regrouped is not None} == set(SPARSE)
    assert min(len(cases(name)) for name in PATTERNS) >= 14
    assert {pattern.num_prefix_tokens for name in SPARSE for pattern in cases(name)} == set(PREFIXES)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SPARSE)
def test_bounds_are_none_where_allowed_and_the_lowest_score_elsewhere(name, causal):
    pattern = make_pattern(name, num_tokens=31, num_prefix_tokens=1, window=5, stride=8, causal=causal)
    part = fresh(pattern).regrouped
    bounds = part.bounds(torch.float32)
    places, _ = part.entries
    unbounded = torch.zeros(bounds.numel(), dtype=torch.bool)
    unbounded[places] = True
    assert bounds.shape == (part.length, part.pitch)
    assert (bounds.flatten()[unbounded] == torch.finfo(torch.float32).max).all()
    assert (bounds.flatten()[~unbounded] < -1e37).all()
    assert bounds.isfinite().all()


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("name", SPARSE)
def test_scores_stay_near_the_allowed_entries(name, prefix):
    pattern = make_pattern(name, num_tokens=1024, num_prefix_tokens=prefix)
    scores = fresh(pattern).scores
    assert pattern.entries <= scores < 2.1 * pattern.entries
    assert pattern.size**2 / scores > 10


def test_scores_by_hand():
    # Two blocks of 8 reach 10 tokens back: 16 + 8 keys and one column, for 104 rows and 16 empty ones; 10 classes of
    # 10; the prefix token's row of all 101.
    pattern = make_pattern("strided", num_tokens=100, num_prefix_tokens=1, window=10, stride=10)
    assert fresh(pattern).scores == 120 * (16 + 8 + 1) + 10 * 10**2 + 101
    # 10 blocks of 10, in which all 100 see the 10 block ends and the prefix token.
    pattern = make_pattern("fixed", num_tokens=100, num_prefix_tokens=1, window=10)
    assert fresh(pattern).scores == 100 * (10 + 10 + 1) + 101
    # The triangle in whole rows, all at a time at this size.
    assert fresh(make_pattern("causal", num_tokens=100)).scores == 100**2
    assert whole_plan(7, 30).scores == 7 * 30


def test_whole_rows_are_cut_where_a_head_is_large_and_a_triangle_leaves_keys_out():
    plan = fresh(make_pattern("causal", num_tokens=2048))
    assert [(rows.start, rows.stop) for rows in plan.rows] == [(at, at + 256) for at in range(0, 2048, 256)]
    assert [rows.width for rows in plan.rows] == [512, 512, 1024, 1024, 1536, 1536, 2048, 2048]
    assert all(rows.first == rows.start + 1 for rows in plan.rows)


@dataclass(frozen=True, kw_only=True)
class Parity(Pattern):
    """Keys as even or odd as the query."""

    name = "parity"

    def local(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j) % 2 == 0


@dataclass(frozen=True, kw_only=True)
class Neighbours(Pattern):
    """The three keys on each side, with a layout."""

    name = "neighbours"

    def local(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= 3

    def layout(self) -> Layout:
        return Layout(before=3, after=3)


@pytest.mark.parametrize(("cls", "regrouped"), [(Parity, False), (Neighbours, True)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_pattern_of_the_users_own_is_computed_with_a_layout_and_without(cls, regrouped, causal):
    pattern = cls(num_tokens=40, num_prefix_tokens=1, causal=causal)
    plan = fresh(pattern)
    assert (plan.regrouped is not None) is regrouped
    assert torch.equal(scattered(plan, 41), pattern.allowed().long())
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 41, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    scores = (q @ k.mT / 2).masked_fill(~pattern.allowed(), float("-inf"))
    out = attention(q, k, v, "softmax", pattern, implementation="blocks")
    torch.testing.assert_close(out, scores.softmax(-1) @ v, atol=1e-12, rtol=0)
