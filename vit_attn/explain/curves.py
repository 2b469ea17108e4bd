"""Is what a map calls important important? Deletion and insertion curves (Petsiuk et al., 2018, arXiv:1806.07421)."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from scipy.ndimage import gaussian_filter
from torch import Tensor

# Each step is a forward per image, method and curve; 16 draw the curve, more move its area by little.
STEPS = 16


def patch_order(values: NDArray, *, seed: int) -> NDArray:
    """Order the patches of each map from the most important one to the least.

    Patches with the same value come in a random order, the same for every map of an image: a sparse mechanism gives
    many patches exactly 0, and in raster order those at the top, mostly background, would come first and the object
    last, which would change the curves by something that is not in the map. A map that is constant thus gives the
    random order itself, :func:`random_order`.

    Args:
        values: (n, gh, gw).
        seed: of the order among equal ones.

    Returns:
        (n, gh * gw) int64, indices in raster order.
    """
    flat = values.reshape(len(values), -1)
    shuffled = random_order(*flat.shape, seed=seed)
    ranks = np.argsort(-np.take_along_axis(flat, shuffled, axis=1), axis=1, kind="stable")
    return np.take_along_axis(shuffled, ranks, axis=1)


def random_order(num_images: int, num_patches: int, *, seed: int) -> NDArray:
    """A random order of the patches of each image, (n, P) int64; that of an image depends on its index and ``seed``."""
    return np.stack([np.random.default_rng((seed, index)).permutation(num_patches) for index in range(num_images)])


def patch_counts(num_patches: int, steps: int | None = None) -> NDArray:
    """How many patches are changed after 0, 1, … steps: (steps + 1,), from none to all, as evenly as can be."""
    steps = min(STEPS, num_patches) if steps is None else steps
    return np.linspace(0, num_patches, steps + 1).round().astype(np.int64)


def area_under_curve(curve: NDArray, num_patches: int) -> NDArray:
    """Area under curves (…, steps + 1) over the share of patches in [0, 1], by the trapezoidal rule: (…)."""
    return trapezoid(curve, patch_counts(num_patches, curve.shape[-1] - 1) / num_patches, axis=-1)


def blurred(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Blur images (n, C, H, W) by a Gaussian whose deviation is a patch, so that no patch keeps its own detail."""
    soft = gaussian_filter(images.cpu().numpy(), sigma=(0, 0, *patch_size), mode="nearest")
    return torch.from_numpy(soft).to(images)


@torch.no_grad()
def deletion_and_insertion(
    probability: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    orders: Mapping[str, NDArray],
    *,
    patch_size: tuple[int, int],
    grid_size: tuple[int, int],
    batch_size: int,
    steps: int | None = None,
) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    """Change the patches of each image in some orders, and follow the probability of its class.

    Deletion sets patches to 0, the data's mean; a good map makes the curve fall early. Insertion starts from a
    blurred image and uncovers patches; a good map makes it rise early.

    Args:
        probability: (images (B, C, H, W), rows (B,)) to (B,): the probability of the class of image ``rows[b]``.
        images: (n, C, H, W), normalized, on the device that ``probability`` wants them on.
        orders: name → (n, gh * gw) patches in raster order, the first to change first.
        patch_size: (height, width) in pixels. What lies outside the patches, no network sees, and stays.
        grid_size: (gh, gw).
        batch_size: images that are scored at a time.
        steps: default: one per patch, at most 16.

    Returns:
        Deletion and insertion curves, name → (n, steps + 1) float32.
    """
    counts = patch_counts(grid_size[0] * grid_size[1], steps)
    device, count = images.device, len(images)
    soft, zero = blurred(images, patch_size), torch.zeros_like(images)
    rows = torch.arange(count, device=device)

    def scores(kind: Callable[[Tensor, Tensor], Tensor], ranks: Tensor, inner: Tensor) -> NDArray:
        """Probabilities (n, len(inner)) where the patches of rank < inner[k] are changed."""
        found = []
        for row, changed in zip(
            rows.repeat_interleave(len(inner)).split(batch_size), inner.repeat(count).split(batch_size), strict=True
        ):
            chosen = (ranks[row] < changed[:, None]).unflatten(1, grid_size)  # (B, gh, gw)
            found.append(probability(kind(_over_pixels(chosen, patch_size, images), row), row).float().cpu())
        return torch.cat(found).reshape(count, len(inner)).numpy()

    def deleted(mask: Tensor, row: Tensor) -> Tensor:
        return torch.where(mask, zero[row], images[row])

    def inserted(mask: Tensor, row: Tensor) -> Tensor:
        return torch.where(mask, images[row], soft[row])

    # The ends are the same in every order: they are scored once.
    place = torch.zeros(count, grid_size[0] * grid_size[1], dtype=torch.int64, device=device)
    ends = torch.tensor([0, counts[-1]], device=device)
    inner = torch.from_numpy(counts[1:-1]).to(device)
    curves: tuple[dict[str, NDArray], dict[str, NDArray]] = ({}, {})
    for kind, result in zip((deleted, inserted), curves, strict=True):
        first, last = scores(kind, place, ends).T[:, :, None]
        for name, order in orders.items():
            ranks = torch.from_numpy(np.argsort(order, axis=1)).to(device)
            between = [scores(kind, ranks, inner)] if len(inner) else []
            result[name] = np.concatenate([first, *between, last], axis=1)
    return curves


def _over_pixels(mask: Tensor, patch_size: tuple[int, int], images: Tensor) -> Tensor:
    """Patches (B, gh, gw) to the pixels of ``images``: (B, 1, H, W) bool; none outside the grid."""
    fine = mask.repeat_interleave(patch_size[0], 1).repeat_interleave(patch_size[1], 2)
    height, width = images.shape[2:]
    pixels = fine.new_zeros(len(mask), height, width)
    fine = fine[:, :height, :width]
    pixels[:, : fine.shape[1], : fine.shape[2]] = fine
    return pixels[:, None]
