"""How sparse and how spread out attention is, in three numbers per layer."""

from collections import defaultdict

import torch
from torch import Tensor


def attention_statistics(weights: Tensor) -> dict[str, float]:
    """Summarize attention weights, averaged over images, heads and queries.

    - ``zeros``: share of the N x N entries that are exactly 0, those that the pattern forbids included.
    - ``entropy``: -Σ p log p over the keys of a query, in nats, with 0 log 0 = 0; log N where uniform.
    - ``support``: number of keys with a weight other than 0, per query.

    Args:
        weights: (B, H, N, N), each row sums to 1. Half precision is summed in fp32.

    Raises:
        ValueError: another shape, or nothing to average.
    """
    if weights.ndim != 4 or weights.numel() == 0:
        raise ValueError(f"weights must be (B, H, N, N) and not empty, not {tuple(weights.shape)}")
    weights = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    # Means over many queries are taken on the CPU, in fp64, which not every accelerator has.
    support = weights.count_nonzero(dim=-1).cpu().double().mean().item()
    entropy = torch.special.entr(weights).sum(dim=-1).cpu().double().mean().item()
    return {"zeros": 1.0 - support / weights.shape[-1], "entropy": entropy, "support": support}


class AttentionStatistics:
    """The means of :func:`attention_statistics` per layer, over any number of batches of any size."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._images: dict[int, int] = defaultdict(int)

    def update(self, layer: int, weights: Tensor) -> None:
        """Add one batch of one layer's weights, (B, H, N, N): each image counts the same."""
        statistics = attention_statistics(weights)
        batch_size = weights.shape[0]
        for name, value in statistics.items():
            self._sums[layer][name] += value * batch_size
        self._images[layer] += batch_size

    def compute(self) -> dict[int, dict[str, float]]:
        """Return the means so far by layer, in the order of the layers; empty before the first update."""
        return {
            layer: {name: total / self._images[layer] for name, total in self._sums[layer].items()}
            for layer in sorted(self._sums)
        }
