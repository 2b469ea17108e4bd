"""block_local: the windows of timm's Swin Transformer, shifted and not, and blocks that do not divide a grid."""

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_partition

from vit_attn.attention import PATTERNS, attention, make_pattern
from vit_attn.masks import main


def windows_of_swin(grid: tuple[int, int], block: int, shift: int) -> np.ndarray:
    """(L, L) bool: which tokens meet in timm's shifted windows and are not masked there."""
    swin = SwinTransformerBlock(8, grid, num_heads=1, window_size=block, shift_size=shift)
    ids = torch.arange(grid[0] * grid[1]).view(1, *grid, 1)
    rolled = ids.roll([-size for size in swin.shift_size], dims=(1, 2))
    members = window_partition(rolled.float(), swin.window_size).long().flatten(1)  # (windows, block²)
    masks = swin.attn_mask
    allowed = np.zeros((ids.numel(),) * 2, dtype=bool)
    for index, window in enumerate(members.numpy()):
        free = np.ones((len(window),) * 2, dtype=bool) if masks is None else masks[index].numpy() == 0
        allowed[np.ix_(window, window)] = free
    return allowed


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("grid", "block"), [((8, 8), 4), ((8, 8), 2), ((6, 6), 3), ((14, 14), 7), ((9, 12), 3), ((4, 8), 4), ((8, 16), 8)]
)
def test_blocks_are_the_windows_of_swin(grid, block, shift):
    pattern = make_pattern("block_local", num_tokens=grid[0] * grid[1], grid_size=grid, block=block, shift=shift)
    np.testing.assert_array_equal(pattern.allowed().numpy(), windows_of_swin(grid, block, block // 2 if shift else 0))


@pytest.mark.parametrize(
    ("grid", "block"),
    [((8, 8), 4), ((14, 14), 7), ((16, 16), 8), ((32, 32), 8), ((28, 28), 7), ((7, 7), 7), ((12, 18), 6), ((5, 5), 5)],
)
def test_the_default_block_is_7_or_the_largest_up_to_8_that_divides(grid, block):
    assert make_pattern("block_local", num_tokens=grid[0] * grid[1], grid_size=grid).block == block


@pytest.mark.parametrize(("side", "block", "percent"), [(8, 4, 75.0), (14, 7, 75.0), (32, 8, 93.75)])
def test_shares_of_zeros(side, block, percent):
    assert 100 * make_pattern("block_local", num_tokens=side**2, block=block).sparsity == percent


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block": 3}, "block=3 does not divide a patch grid of 8x8: one of 1, 2, 4, 8"),
        ({"block": 16}, "block=16 does not divide a patch grid of 8x8: one of 1, 2, 4, 8"),
        ({"block": 4, "num_tokens": 48, "grid_size": (6, 8)}, "block=4 does not divide .* 6x8: one of 1, 2"),
        ({"num_tokens": 169}, "no block of 2 to 8 tokens divides a patch grid of 13x13: give block="),
        ({"shift": 1}, "shift must be true or false, not 1"),
        ({"num_tokens": 63}, "block_local: 63 tokens are no square grid: give grid_size="),
    ],
)
def test_what_does_not_fit_is_one_line(options, said):
    with pytest.raises(ValueError, match=said) as error:
        make_pattern("block_local", **{"num_tokens": 64} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shift", [False, True])
def test_large_grids_are_exact(shift):
    # Large enough that kernels are compiled where there is a compiler.
    pattern = make_pattern("block_local", num_tokens=24**2, num_prefix_tokens=1, block=8, shift=shift)
    results = []
    for implementation in ("dense", "blocks"):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(2, 3, pattern.size, 16, generator=generator).requires_grad_() for _ in range(3)]
        out = attention(*leaves, "softmax", pattern, implementation=implementation)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)


def test_masks_leaves_it_out_of_all_where_no_block_divides_the_grid(tmp_path, capsys):
    assert main(["--grid", "3x7", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "left out block_local: no block of 2 to 8 tokens divides a patch grid of 3x7: give block=" in out
    assert {path.stem for path in tmp_path.iterdir()} == {*PATTERNS, "all"} - {"block_local"}
    assert main(["--patterns", "block_local", "--block", "3", "--out", str(tmp_path)]) == 2
    assert "error: block=3 does not divide a patch grid of 8x8" in capsys.readouterr().err
