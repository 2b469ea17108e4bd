"""Maps over the patch grid, against rows picked out by hand."""

import numpy as np
import pytest
import torch

from vit_attn.explain.maps import patch_maps


def test_the_class_tokens_row_is_laid_out_in_raster_order():
    # A class token, a register, 2 x 3 patches. Only row 0 counts, and of it only the patches.
    weights = torch.full((1, 1, 8, 8), 9.0)
    weights[0, 0, 0] = torch.tensor([0.3, 0.1, 0.0, 0.1, 0.2, 0.05, 0.15, 0.1])
    maps = patch_maps(weights, num_prefix_tokens=2, has_class_token=True, grid_size=(2, 3))
    torch.testing.assert_close(maps, torch.tensor([[[[0.0, 0.1, 0.2], [0.05, 0.15, 0.1]]]]), rtol=0, atol=0)
    assert maps.sum() < 1  # what goes to prefix tokens is missing: not renormalized


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_without_a_class_token_patches_are_the_queries(num_prefix_tokens):
    size = num_prefix_tokens + 6
    weights = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).softmax(-1)
    maps = patch_maps(weights, num_prefix_tokens=num_prefix_tokens, has_class_token=False, grid_size=(3, 2))
    assert maps.shape == (2, 3, 3, 2)
    p = num_prefix_tokens
    expected = weights.numpy()[:, :, p:, p:].mean(axis=2).reshape(2, 3, 3, 2)
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "returned"), [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]
)
def test_half_precision_is_widened(given, returned):
    weights = torch.full((1, 1, 5, 5), 0.2, dtype=given)
    assert patch_maps(weights, num_prefix_tokens=1, has_class_token=True, grid_size=(2, 2)).dtype == returned


@pytest.mark.parametrize(
    ("shape", "prefix", "said"),
    [
        ((1, 1, 5, 5), 0, r"must be \(B, H, 4, 4\)"),
        ((1, 5, 5), 1, r"must be \(B, H, 5, 5\)"),
        ((1, 1, 5, 4), 1, r"must be \(B, H, 5, 5\)"),
        ((1, 1, 4, 4), 0, "a class token is a prefix token"),
    ],
)
def test_numbers_of_tokens_that_do_not_fit_are_refused(shape, prefix, said):
    with pytest.raises(ValueError, match=said):
        patch_maps(torch.zeros(shape), num_prefix_tokens=prefix, has_class_token=True, grid_size=(2, 2))
