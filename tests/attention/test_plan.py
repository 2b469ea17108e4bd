"""Plans against the labels of their patterns: every allowed entry once, in the component that it belongs to."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from registered import draw, patterns
from torch import Tensor

from vit_attn.attention import PATTERNS, Pattern, Tokens, attention, make_pattern
from vit_attn.attention.engine import Plan, make_plan, whole_plan
from vit_attn.attention.patterns import Band, Blocks, Classes, Columns, Component, Places, Tiles

CPU = torch.device("cpu")
TOKENS = (1, 2, 5, 16, 31, 64, 100)
WINDOWS, STRIDES, DILATIONS = (1, 2, 5, 8, 40), (1, 3, 8, 33), (1, 2, 3)
PREFIXES = (0, 1, 3)
SPARSE = ("strided", "fixed", "sliding_window", "dilated_sliding_window")


def cases(name: str) -> list[Pattern]:
    """Every combination of what a pattern over raster order reads; prefixes take turns."""
    own = PATTERNS[name].options()
    options = [
        WINDOWS if "window" in own else (None,),
        STRIDES if "stride" in own else (None,),
        DILATIONS if "dilation" in own else (None,),
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
    if plan.patches is not None:
        _, entries = plan.patches.entries
        seen.index_add_(0, entries, torch.ones_like(entries))
    seen = seen.view(size, size)
    for rows in plan.rows:
        seen[rows.start : rows.stop, : rows.width] += 1
        if rows.forbidden is not None:
            seen[rows.start : rows.stop, rows.first : rows.width] -= rows.forbidden.long()
    return seen


def check_plan(pattern: Pattern) -> None:
    """Every allowed entry once, and nothing else."""
    plan = fresh(pattern)
    assert torch.equal(scattered(plan, pattern.size), pattern.allowed().long()), pattern.key
    rows = plan.patches
    if rows is None:
        return
    ends = [part.start + part.width for part in rows.parts]
    assert [part.start for part in rows.parts] == [0, *ends[:-1]]
    assert ends[-1] == rows.pitch
    assert pattern.entries <= plan.scores


@pytest.mark.parametrize("name", [*SPARSE, "full", "causal"])
def test_a_plan_covers_every_allowed_entry_once_and_nothing_else(name):
    for pattern in cases(name):
        check_plan(pattern)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_registered_pattern_has_a_plan_over_every_grid(name):
    found = patterns(name)
    assert len(found) >= 8
    for pattern in found:
        check_plan(pattern)


def test_the_sparse_patterns_have_components():
    assert all(fresh(cases(name)[0]).patches is not None for name in SPARSE)
    assert {pattern.num_prefix_tokens for name in SPARSE for pattern in cases(name)} == set(PREFIXES)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SPARSE)
def test_bounds_are_positive_where_allowed_and_the_lowest_score_elsewhere(name, causal):
    pattern = make_pattern(name, num_tokens=31, num_prefix_tokens=1, window=5, stride=8, causal=causal)
    rows = fresh(pattern).patches
    bounds = rows.bounds(torch.float32)
    places, _ = rows.entries
    allowed = torch.zeros(bounds.numel(), dtype=torch.bool)
    allowed[places] = True
    assert bounds.shape == (rows.length, rows.pitch)
    assert (bounds.flatten()[allowed] > 0).all()
    assert (bounds.flatten()[~allowed] < -1e37).all()
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


def blocks_of_four(tokens: int) -> Tensor:
    """The tokens counted backwards, in blocks of four, the last one with empty places."""
    order = torch.arange(tokens).flip(0)
    return torch.nn.functional.pad(order, (0, -tokens % 4), value=-1).view(-1, 4)


@dataclass(frozen=True, kw_only=True)
class Parity(Pattern):
    """Keys as even or odd as the query; it says nothing of components."""

    name = "parity"

    def local(self, q: Places, k: Places) -> Tensor:
        return (q.token - k.token) % 2 == 0


@dataclass(frozen=True, kw_only=True)
class Union(Pattern):
    """Whatever components: ``local`` and ``second`` must say the same."""

    name = "union"

    kind: str = ""  # no option: a field without its mark

    def local(self, q: Places, k: Places) -> Tensor:
        d = q.token - k.token
        last = self.num_tokens - 1
        near = {
            "band": d.abs() <= 3,
            "band of every other": (d.abs() <= 4) & (d % 2 == 0),
            "blocks": q.token // 5 == k.token // 5,
            "blocks in another order": (last - q.token) // 4 == (last - k.token) // 4,
            "tiles": (q.token // 3 == k.token // 3) | (k.token == (7 * (q.token // 3)) % self.num_tokens),
            "nothing": d == 0,
        }
        return near[self.kind.partition(" + ")[0]]

    def second(self, q: Places, k: Places) -> Tensor | None:
        d = q.token - k.token
        far = {
            "classes": d % 6 == 0,
            "columns": (k.token == 2) | (k.token == 11),
            "blocks": q.token // 8 == k.token // 8,
            "tiles": (q.token // 3 == k.token // 3) | (k.token == (7 * (q.token // 3)) % self.num_tokens),
            "": None,
        }
        found = [far[name] for name in self.kind.split(" + ")[1:]] or [None]
        return found[0] if len(found) == 1 else found[0] | found[1]

    def _tiles(self) -> tuple[Tensor, Tensor]:
        queries = torch.arange(self.num_tokens + -self.num_tokens % 3).view(-1, 3)
        queries = torch.where(queries < self.num_tokens, queries, -1)
        other = (7 * torch.arange(len(queries))[:, None]) % self.num_tokens
        same = (queries == other).any(1, keepdim=True)
        return queries, torch.cat([queries, torch.where(same, -1, other)], 1)

    def components(self) -> list[Component]:
        first, *rest = self.kind.split(" + ")
        queries, keys = self._tiles()
        near = {
            "band": Band(before=3, after=3),
            "band of every other": Band(before=2, after=2, step=2),
            "blocks": Blocks(size=5),
            "blocks in another order": Blocks(tokens=blocks_of_four(self.num_tokens)),
            "tiles": Tiles(queries=queries, keys=keys),
        }
        far = {
            "classes": Classes(step=6),
            "columns": Columns(tokens=(2, 11)),
            "blocks": Blocks(size=8),
            "tiles": Tiles(queries=queries, keys=keys),
        }
        return [near[first] for first in [first] if first in near] + [far[name] for name in rest]


UNIONS = [
    *(
        "band",
        "band + classes",
        "band + classes + tiles",
        "band + blocks + columns",
        "band + columns",
        "band + classes + columns",
        "band + blocks",
        "band + tiles",
    ),
    *("band of every other + classes", "band of every other + columns", "band of every other + tiles"),
    *("blocks + classes", "blocks + columns", "blocks in another order + classes", "blocks in another order + blocks"),
    *("blocks in another order + tiles", "tiles + classes", "tiles + columns", "tiles + blocks", "nothing + classes"),
]


def close_to_dense(pattern: Pattern, normalizer: str = "entmax15") -> None:
    """Outputs, weights and gradients of the engine are those of masked scores."""
    found = []
    for implementation in ("dense", "blocks"):
        leaves = [(2 * draw(2, 2, pattern.size, 4, seed=seed)).requires_grad_() for seed in range(3)]
        out, weights = attention(*leaves, normalizer, pattern, implementation=implementation, return_weights=True)
        grads = torch.autograd.grad((out * draw(*out.shape, seed=4)).sum(), leaves)
        found.append([out, weights, *grads])
    torch.testing.assert_close(found[1], found[0], atol=1e-11, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", UNIONS)
def test_any_union_of_components_runs_under_one_normalizer(kind, causal):
    for tokens in (Tokens((5, 8), 1), Tokens((4, 6), 0)):
        pattern = Union(kind=kind, causal=causal).on(tokens)
        check_plan(pattern)
        close_to_dense(pattern)


@pytest.mark.parametrize("causal", [True, False])
def test_a_pattern_without_components_is_computed_over_whole_rows(causal):
    pattern = Parity(causal=causal).on(Tokens((5, 8), 1))
    assert fresh(pattern).patches is None
    check_plan(pattern)
    close_to_dense(pattern)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
def test_every_registered_pattern_is_computed_as_masked_scores_are(name, normalizer):
    for pattern in patterns(name):
        close_to_dense(pattern, normalizer)


def test_two_bands_are_refused():
    class Two(Union):
        def components(self) -> list[Component]:
            return [Band(before=1, after=1), Band(before=9, after=9)]

    with pytest.raises(ValueError, match="a pattern has one band"):
        fresh(Two(kind="band").on(Tokens((4, 4))))
