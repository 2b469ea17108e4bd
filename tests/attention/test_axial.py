"""axial: the row and the column of a query, token by token."""

import numpy as np
import pytest
import torch

from vit_attn.attention import attention, make_pattern
from vit_attn.explain.figures import mask_figure
from vit_attn.masks import main

# Share of zeros in %, by side of the grid, without prefix tokens.
ZEROS = {8: "76.6", 14: "86.2", 16: "87.9", 32: "93.8", 64: "96.9"}


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (6, 1), (8, 16)])
def test_a_query_sees_its_row_and_its_column(grid):
    height, width = grid
    tokens = [(y, x) for y in range(height) for x in range(width)]
    expected = np.array(
        [[1 if i == j else 2 if i[0] == j[0] else 3 if i[1] == j[1] else 0 for j in tokens] for i in tokens]
    )
    pattern = make_pattern("axial", num_tokens=height * width, grid_size=grid)
    np.testing.assert_array_equal(pattern.labels().numpy(), expected)
    assert (pattern.allowed().sum(1) == height + width - 1).all()


@pytest.mark.parametrize(("side", "percent"), ZEROS.items())
def test_shares_of_zeros(side, percent):
    sparsity = make_pattern("axial", num_tokens=side**2).sparsity
    assert sparsity == pytest.approx(1 - (2 * side - 1) / side**2)
    assert f"{100 * sparsity:.1f}" == percent


def test_its_picture_says_row_and_column():
    legend = mask_figure(make_pattern("axial", num_tokens=16)).legends[0]
    assert {"row", "column", "self"} <= {text.get_text() for text in legend.get_texts()}


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="axial: 60 tokens are no square grid: give grid_size="):
        make_pattern("axial", num_tokens=60)


def test_large_grids_are_exact():
    # Large enough that kernels are compiled where there is a compiler.
    pattern = make_pattern("axial", num_tokens=20 * 28, num_prefix_tokens=1, grid_size=(20, 28))
    results = []
    for implementation in ("dense", "blocks"):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(2, 3, pattern.size, 16, generator=generator).requires_grad_() for _ in range(3)]
        out = attention(*leaves, "entmax15", pattern, implementation=implementation)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)


def test_masks_asks_for_a_grid(tmp_path, capsys):
    assert main(["--size", "60", "--patterns", "axial", "--out", str(tmp_path)]) == 2
    assert "--size 60 is no square grid to take a width from: give --grid, or a square" in capsys.readouterr().err
    assert main(["--grid", "6x10", "--patterns", "axial", "--out", str(tmp_path)]) == 0
