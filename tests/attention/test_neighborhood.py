"""neighborhood: NATTEN's rule by brute force, its published shares of zeros, and what does not fit a grid."""

import numpy as np
import pytest
import torch

from vit_attn.attention import attention, make_pattern

# Share of zeros in %, by grid and kernel, without prefix tokens.
ZEROS = {(8, 3): "85.9", (14, 7): "75.0", (16, 7): "80.9", (32, 7): "95.2", (64, 7): "98.8"}


def window(position: int, length: int, kernel: int, dilation: int) -> set[int]:
    """Of all runs of ``kernel`` members of the position's residue, the one that it stands nearest to the middle of.

    The middle of an even run is the place right of it, so that one more lies before than after.
    """
    members = list(range(position % dilation, length, dilation))
    place = members.index(position)
    starts = range(len(members) - kernel + 1)
    start = min(starts, key=lambda start: abs(start + kernel // 2 - place))
    return set(members[start : start + kernel])


def by_hand(height: int, width: int, kernel: int, dilation: int) -> np.ndarray:
    rows = [window(y, height, kernel, dilation) for y in range(height)]
    columns = [window(x, width, kernel, dilation) for x in range(width)]
    tokens = [(y, x) for y in range(height) for x in range(width)]
    return np.array([[j[0] in rows[i[0]] and j[1] in columns[i[1]] for j in tokens] for i in tokens])


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation"),
    [
        *(((6, 6), kernel, 1) for kernel in range(1, 7)),
        *(((7, 5), kernel, dilation) for kernel, dilation in ((2, 1), (3, 1), (5, 1), (2, 2), (1, 4))),
        *(((9, 11), kernel, dilation) for kernel, dilation in ((3, 2), (4, 2), (3, 3), (2, 4))),
        ((8, 16), 3, 2),
    ],
)
def test_every_query_sees_the_window_that_it_is_nearest_to_the_middle_of(grid, kernel, dilation):
    options = {"num_tokens": grid[0] * grid[1], "grid_size": grid, "kernel": kernel, "dilation": dilation}
    pattern = make_pattern("neighborhood", **options)
    allowed = pattern.allowed().numpy()
    np.testing.assert_array_equal(allowed, by_hand(*grid, kernel, dilation))
    assert (allowed.sum(1) == kernel**2).all()  # the window moves inwards at the edges, and does not shrink


def test_the_window_moves_inwards_at_the_edges_so_it_is_not_symmetric():
    allowed = make_pattern("neighborhood", num_tokens=25, kernel=3).allowed()
    corner, beside_middle = 0, 1 * 5 + 1
    assert allowed[corner].nonzero()[:, 0].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert allowed[beside_middle].nonzero()[:, 0].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert allowed[corner, 12]
    assert not allowed[12, corner]


@pytest.mark.parametrize(("case", "percent"), ZEROS.items())
def test_shares_of_zeros_are_the_published_ones(case, percent):
    side, kernel = case
    assert f"{100 * make_pattern('neighborhood', num_tokens=side**2, kernel=kernel).sparsity:.1f}" == percent


@pytest.mark.parametrize(
    ("grid", "options", "kernel"),
    [
        *(((14, 14), {}, 7), ((13, 20), {}, 3), ((32, 32), {}, 7), ((8, 8), {"dilation": 2}, 3)),
        *(((2, 2), {}, 2), ((1, 9), {}, 1), ((16, 16), {"dilation": 4}, 4), ((16, 16), {"kernel": 5}, 5)),
    ],
)
def test_the_kernel_is_7_and_3_on_small_grids(grid, options, kernel):
    pattern = make_pattern("neighborhood", num_tokens=grid[0] * grid[1], grid_size=grid, **options)
    assert pattern.kernel == kernel


def test_a_kernel_as_large_as_the_grid_is_full():
    assert make_pattern("neighborhood", num_tokens=36, kernel=6).sparsity == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernel": 9}, "kernel=9 with dilation=1 spans 9 tokens, more than a patch grid of 8x8"),
        ({"kernel": 3, "dilation": 3}, "kernel times dilation must be at most 8"),
        ({"kernel": 0}, "kernel must be a whole number of at least 1, not 0"),
        ({"dilation": 0}, "dilation must be a whole number of at least 1, not 0"),
        ({"num_tokens": 63}, "neighborhood: 63 tokens are no square grid: give grid_size="),
    ],
)
def test_what_does_not_fit_is_one_line(options, said):
    with pytest.raises(ValueError, match=said) as error:
        make_pattern("neighborhood", **{"num_tokens": 64} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("normalizer", ["softmax", "entmax15"])
def test_large_grids_are_tiles_of_a_few_keys_and_exact(normalizer):
    # Large enough that kernels are compiled where there is a compiler.
    pattern = make_pattern("neighborhood", num_tokens=20 * 24, grid_size=(20, 24), num_prefix_tokens=1, kernel=5)
    generator = torch.Generator().manual_seed(0)
    results = []
    for implementation in ("dense", "blocks"):
        generator.manual_seed(0)
        leaves = [torch.randn(2, 3, pattern.size, 16, generator=generator).requires_grad_() for _ in range(3)]
        out = attention(*leaves, normalizer, pattern, implementation=implementation)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)
