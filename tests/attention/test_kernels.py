"""Row kernels on rows made to be hard, against a bisection in fp64 and the `entmax` package."""

import entmax as package
import pytest
import torch
from torch import Tensor

from vit_attn.attention.engine.plan import lowest as lowest_score
from vit_attn.attention.normalizers import entmax as kernels
from vit_attn.attention.normalizers.base import Parameter
from vit_attn.attention.normalizers.softmax import SoftmaxKernel

EXCESSES = (0.01, 0.3, 0.5, 0.8, 1.0)
SOFTMAX = SoftmaxKernel()
DTYPES = (torch.float32, torch.float64)
every_excess = pytest.mark.parametrize("e", EXCESSES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp64"])


def given(e: float, dtype: torch.dtype) -> Parameter:
    """An excess as the kernels are given it."""
    return (
        kernels.KERNEL.parameter(1 + e, torch.empty(0, dtype=dtype))
        if e in (0.5, 1.0)
        else torch.full((1, 1), e, dtype=dtype)
    )


def rows_gradient(p: Tensor, g: Tensor, e: Parameter) -> tuple[Tensor, Tensor]:
    """Gradients to scores and to α, empty where it is a number; an excess of 0 is softmax."""
    if isinstance(e, float) and e == 0:
        return SOFTMAX.scores_gradient(p, g, e), p.new_empty(0)
    return kernels.rows_gradient(p, g, e, to_alpha=isinstance(e, Tensor))


def bisection(x: Tensor, e: float) -> Tensor:
    """α-entmax of finite or forbidden scores (R, K) by halving τ's interval in fp64."""
    x = x.double()
    z = (x - x.amax(-1, keepdim=True)) * e
    low, high = torch.full_like(z[:, :1], -1.0), torch.zeros_like(z[:, :1])
    for _ in range(200):
        middle = (low + high) / 2
        over = (z - middle).clamp_min(0).pow(1 / e).sum(-1, keepdim=True) >= 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    p = (z - low).clamp_min(0).pow(1 / e)
    return p / p.sum(-1, keepdim=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def staircase(levels: int, ratio: int = 1) -> Tensor:
    """Scores of which sparsemax's rounds find one more step outside of the support each time, all but two in the end.

    Each step lies just below the τ of those above it, and holds ``ratio`` times as many scores as all of them.
    """
    scores, tau, drop = [0.0, -0.5], -0.75, 0.01
    for _ in range(levels):
        count = len(scores)
        scores += [tau - drop] * (ratio * count)
        tau -= drop * ratio / (ratio + 1)
        drop *= 1.05
    return torch.tensor([scores], dtype=torch.float64)


HARD = {
    "ties": (2 * draw(16, 40)).round(),
    "all equal": torch.full((2, 40), -7.5, dtype=torch.float64),
    "one huge": torch.eye(3, 40, dtype=torch.float64) * 1e30,
    "two huge": torch.eye(3, 40, dtype=torch.float64).roll(1, 1) * 1e6 + torch.eye(3, 40, dtype=torch.float64) * 1e6,
    "spread of 1e4": torch.linspace(-5e3, 5e3, 40, dtype=torch.float64).repeat(2, 1),
    "length 1": draw(4, 1),
    "length 2": draw(16, 2),
    "far below zero": draw(4, 40) - 64,
    "doubling": -(2.0 ** torch.arange(-30, 10, dtype=torch.float64)).repeat(2, 1),
    "harmonic": 1 / torch.arange(1, 200, dtype=torch.float64).repeat(2, 1),
    "staircase": staircase(12),
    "8192": draw(2, 8192),
    "8192, narrow": 1e-3 * draw(2, 8192),
    "8192, heavy tails": draw(2, 8192) / draw(2, 8192, seed=1),
}


@every_excess
@every_dtype
@pytest.mark.parametrize("rows", HARD)
def test_hard_rows_equal_the_bisection(rows, dtype, e):
    x = HARD[rows].to(dtype)
    p = kernels.normalize_rows(x, given(e, dtype))
    atol = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(p.double(), bisection(x, e), atol=atol, rtol=0)
    torch.testing.assert_close(p.sum(-1), torch.ones(len(x), dtype=dtype), atol=atol, rtol=0)


@pytest.mark.parametrize(("e", "expected"), [(0.5, package.entmax15), (1.0, package.sparsemax)])
@pytest.mark.parametrize("rows", HARD)
def test_hard_rows_equal_the_package_which_sorts(rows, e, expected):
    x = HARD[rows]
    torch.testing.assert_close(kernels.normalize_rows(x, e), expected(x, dim=-1), atol=1e-11, rtol=0)


@every_dtype
@pytest.mark.parametrize("e", [0.8, 1.0])
def test_where_the_first_attempt_falls_short_the_second_is_taken(e, dtype):
    x = (staircase(11) / e).to(dtype)
    first, *_, error = kernels.KERNEL.attempt(x, given(e, dtype))
    wanted = bisection(x, e)
    assert not kernels.converged(error)
    assert error > 0.01
    assert (first.double() - wanted).abs().max() > 1e-3
    p = kernels.normalize_rows(x, given(e, dtype))
    torch.testing.assert_close(p.double(), wanted, atol=1e-12 if dtype == torch.float64 else 2e-6, rtol=0)


@every_dtype
def test_a_row_of_nan_does_not_hide_that_another_has_not_converged(dtype):
    x = torch.cat([torch.full_like(staircase(11), float("nan")), staircase(11)]).to(dtype)
    p = kernels.normalize_rows(x, 1.0)
    assert p[0].isnan().all()
    torch.testing.assert_close(p[1:].double(), bisection(x[1:], 1.0), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("error", "done"), [(0.0, True), (1e-6, True), (1e-4, False), (float("nan"), False)])
def test_converged(error, done):
    assert kernels.converged(torch.tensor(error)) is done


@every_dtype
@pytest.mark.parametrize("e", [0.0, *EXCESSES])
def test_forbidden_entries_are_exactly_0_whichever_way_they_are_written(e, dtype):
    x = draw(8, 40).to(dtype)
    lowest, infinite = torch.zeros(8, 40, dtype=torch.bool), torch.zeros(8, 40, dtype=torch.bool)
    lowest[:, 1::3], infinite[:, 2::3] = True, True
    lowest[7], infinite[7] = True, False
    lowest[7, 4] = False  # a row of one allowed entry
    forbidden = lowest | infinite
    written = x.masked_fill(lowest, lowest_score(dtype)).masked_fill(infinite, float("-inf"))
    form = 0.0 if e == 0 else given(e, dtype)
    p = SOFTMAX.attempt(written, form)[0] if e == 0 else kernels.normalize_rows(written, form)
    assert (p[forbidden] == 0).all()
    for row in range(8):
        alone = x[row][~forbidden[row]][None]
        wanted = alone.double().softmax(-1) if e == 0 else bisection(alone, e)
        torch.testing.assert_close(p[row][~forbidden[row]].double(), wanted[0], atol=2e-6, rtol=0)
    g = draw(8, 40, seed=1).to(dtype)
    d_x, d_alpha = rows_gradient(p, g, form)
    assert (d_x[forbidden] == 0).all()
    assert d_x.isfinite().all()
    assert d_alpha.isfinite().all()
    torch.testing.assert_close(d_x.sum(-1), torch.zeros(8, dtype=dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("e", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_gradients_equal_central_differences(e):
    x, g = draw(6, 12), draw(6, 12, seed=1)
    form = 0.0 if e == 0 else given(e, torch.float64)

    def loss(x: Tensor, excess: float) -> Tensor:
        return (g * (x.softmax(-1) if excess == 0 else bisection(x, excess))).sum(-1, keepdim=True)

    to_alpha = isinstance(form, Tensor)
    p = x.softmax(-1) if e == 0 else kernels.normalize_rows(x, form)
    d_x, d_alpha = rows_gradient(p, g, form)
    step = 1e-6
    for column in range(12):
        nudge = step * torch.eye(12, dtype=torch.float64)[column]
        slope = (loss(x + nudge, e) - loss(x - nudge, e)) / (2 * step)
        torch.testing.assert_close(d_x[:, column, None], slope, atol=1e-7, rtol=0)
    if to_alpha:
        slope = (loss(x, e + step) - loss(x, e - step)) / (2 * step)
        torch.testing.assert_close(d_alpha, slope, atol=1e-7, rtol=0)
    else:
        assert d_alpha.numel() == 0


def test_each_row_may_have_its_own_excess():
    x, e = draw(5, 40), torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    p = kernels.normalize_rows(x, e[:, None])
    for row in range(5):
        torch.testing.assert_close(p[row, None], bisection(x[row, None], float(e[row])), atol=1e-12, rtol=0)
