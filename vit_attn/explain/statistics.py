"""How sparse, how spread out and how far-reaching attention is, in four numbers per layer."""

from collections import defaultdict

import torch
from torch import Tensor


def attention_statistics(
    weights: Tensor, *, grid_size: tuple[int, int] | None = None, num_prefix_tokens: int = 0
) -> dict[str, float]:
    """Summarize attention weights, averaged over images, heads and queries.

    - ``zeros``: share of the N x N entries that are exactly 0, those that the pattern forbids included.
    - ``entropy``: -Σ p log p over the keys of a query, in nats, with 0 log 0 = 0; log N where uniform.
    - ``support``: number of keys with a weight other than 0, per query.
    - ``distance``: mean attention distance in patches, Σ w·d / Σ w over the patches that a patch attends to, d the
      Euclidean distance on the grid (Dosovitskiy et al., 2021, arXiv:2010.11929; Raghu et al., 2021,
      arXiv:2108.08810). Prefix tokens have no place on the grid and are left out, and so is a query that gives them
      all its weight. Missing without ``grid_size``, and where no query is left.

    Args:
        weights: (B, H, N, N), each row sums to 1. Half precision is summed in fp32.
        grid_size: (gh, gw), patches in raster order.
        num_prefix_tokens: tokens before the patch grid.

    Raises:
        ValueError: another shape, nothing to average, or a grid of another size.
    """
    totals = _totals(weights, grid_size, num_prefix_tokens)
    return {name: total / count for name, (total, count) in totals.items() if count}


def _totals(weights: Tensor, grid_size: tuple[int, int] | None, num_prefix_tokens: int) -> dict[str, tuple[float, int]]:
    """Sums over queries, and over how many of them: what batches of any size can be added up from."""
    if weights.ndim != 4 or weights.numel() == 0:
        raise ValueError(f"weights must be (B, H, N, N) and not empty, not {tuple(weights.shape)}")
    weights = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    support = weights.count_nonzero(dim=-1)  # (B, H, N)
    seen = _sum(support)
    queries, keys = support.numel(), weights.shape[-1]
    totals = {
        "zeros": (queries - seen / keys, queries),
        "entropy": (_sum(torch.special.entr(weights).sum(dim=-1)), queries),
        "support": (seen, queries),
    }
    if grid_size is not None:
        distances = _distances(weights, grid_size, num_prefix_tokens)
        totals["distance"] = _sum(distances), distances.numel()
    return totals


def _sum(values: Tensor) -> float:
    """Sums over many queries are taken on the CPU, in fp64, which not every accelerator has."""
    return values.cpu().double().sum().item()


def _distances(weights: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Mean distance in patches of each patch query that attends to patches at all: one dimension."""
    height, width = grid_size
    if weights.shape[-1] != num_prefix_tokens + height * width:
        raise ValueError(
            f"{num_prefix_tokens} prefix tokens and a grid of {height}x{width} make "
            f"{num_prefix_tokens + height * width} tokens, not {weights.shape[-1]}"
        )
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    between = (places[:, None] - places).to(weights).norm(dim=-1)  # (P, P)
    to_patches = weights[:, :, num_prefix_tokens:, num_prefix_tokens:]  # (B, H, P, P)
    far = torch.einsum("bhij,ij->bhi", to_patches, between)
    total = to_patches.sum(dim=-1)
    return far[total > 0] / total[total > 0]


class AttentionStatistics:
    """The means of :func:`attention_statistics` per layer, over any number of batches of any size."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, tuple[float, int]]] = defaultdict(dict)

    def update(
        self, layer: int, weights: Tensor, *, grid_size: tuple[int, int] | None = None, num_prefix_tokens: int = 0
    ) -> None:
        """Add one batch of one layer's weights, (B, H, N, N): each query counts the same."""
        sums = self._sums[layer]
        for name, (total, count) in _totals(weights, grid_size, num_prefix_tokens).items():
            before = sums.get(name, (0.0, 0))
            sums[name] = before[0] + total, before[1] + count

    def compute(self) -> dict[int, dict[str, float]]:
        """Return the means so far by layer, in the order of the layers; empty before the first update."""
        return {
            layer: {name: total / count for name, (total, count) in sums.items() if count}
            for layer, sums in sorted(self._sums.items())
        }
