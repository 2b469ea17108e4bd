"""Orders and curves, on probabilities that can be worked out by hand."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from vit_attn.explain.curves import (
    area_under_curve,
    blurred,
    deletion_and_insertion,
    patch_counts,
    patch_order,
    random_order,
)


def test_orders_begin_with_the_largest_value():
    values = np.array([[[0.1, 0.9, 0.3], [0.8, 0.0, 0.5]]])
    assert patch_order(values, seed=0).tolist() == [[1, 3, 5, 2, 0, 4]]


def test_equal_values_come_in_the_random_order_of_their_image():
    shuffled = random_order(2, 12, seed=3)
    assert np.array_equal(patch_order(np.zeros((2, 3, 4)), seed=3), shuffled)
    assert not np.array_equal(shuffled[0], shuffled[1])
    assert not np.array_equal(random_order(2, 12, seed=4), shuffled)
    assert np.array_equal(random_order(1, 12, seed=3)[0], shuffled[0])  # of its index alone
    sparse = np.zeros((2, 3, 4))
    sparse[:, 1, 2] = 1.0
    for order, by_chance in zip(patch_order(sparse, seed=3), shuffled, strict=True):
        assert order[0] == 6
        assert order[1:].tolist() == [patch for patch in by_chance if patch != 6]


@pytest.mark.parametrize(("patches", "steps", "counts"), [(3, None, [0, 1, 2, 3]), (10, 4, [0, 2, 5, 8, 10])])
def test_steps_take_from_no_patch_to_all(patches, steps, counts):
    assert patch_counts(patches, steps).tolist() == counts


def test_many_patches_are_taken_in_sixteen_steps():
    counts = patch_counts(64)
    assert len(counts) == 17
    assert (np.diff(counts) == 4).all()


def test_areas_by_hand():
    # Shares 0, 0.2, 0.5, 0.8, 1 of ten patches: 0.2 · 0.75 + 0.3 · 0.5 + 0.3 · 0.25 + 0.2 · 0.
    assert area_under_curve(np.array([1.0, 0.5, 0.5, 0.0, 0.0]), 10) == pytest.approx(0.15 + 0.15 + 0.075)
    assert area_under_curve(np.ones((3, 17)), 64) == pytest.approx(np.ones(3))


def test_the_blur_has_the_deviation_of_a_patch():
    spot = torch.zeros(1, 1, 41, 41)
    spot[0, 0, 20, 20] = 1.0
    found = blurred(spot, (2, 5))[0, 0].numpy()
    line = np.zeros(41)
    line[20] = 1
    expected = np.outer(gaussian_filter1d(line, 2.0), gaussian_filter1d(line, 5.0))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_curves_of_a_net_that_reads_one_patch(batch_size):
    """Probability of an image: what is left of its patch (row 1, column 2), on a grid that is not square."""
    images = torch.ones(2, 3, 5, 13) * torch.tensor([0.75, 0.25])[:, None, None, None]  # 5 x 13: one row, column over
    images[:, :, 4], images[:, :, :, 12] = 7.0, 7.0
    sizes = []

    def probability(batch, rows):
        sizes.append(len(batch))
        assert (batch[:, :, 4] == 7).all()  # what no patch covers stays
        patch = batch[:, 0, 2:4, 8:12].mean((1, 2))
        assert (patch[rows == 1] <= 0.25 + 1e-6).all()  # rows name the image of each
        return patch

    orders = {"first": np.array([[5, 0, 1, 2, 3, 4]] * 2), "last": np.array([[0, 1, 2, 3, 4, 5]] * 2)}
    kwargs = {"patch_size": (2, 4), "grid_size": (2, 3), "batch_size": batch_size, "steps": 3}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vit_attn.explain.curves.blurred", lambda images, patch_size: batch_like(images))
        deletion, insertion = deletion_and_insertion(probability, images, orders, **kwargs)
    np.testing.assert_allclose(deletion["first"], [[0.75, 0, 0, 0], [0.25, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(deletion["last"], [[0.75, 0.75, 0.75, 0], [0.25, 0.25, 0.25, 0]], atol=1e-6)
    np.testing.assert_allclose(insertion["first"], [[0.1, 0.75, 0.75, 0.75], [0.1, 0.25, 0.25, 0.25]], atol=1e-6)
    np.testing.assert_allclose(insertion["last"], [[0.1, 0.1, 0.1, 0.75], [0.1, 0.1, 0.1, 0.25]], atol=1e-6)
    assert max(sizes) == min(batch_size, 4)
    # Both ends once per curve, the two steps between once per order.
    assert sum(sizes) == 2 * (2 * 2 + 2 * 2 * 2)


def batch_like(images):
    """A "blurred" image: 0.1 wherever there is a patch."""
    soft = images.clone()
    soft[:, :, :4, :12] = 0.1
    return soft
