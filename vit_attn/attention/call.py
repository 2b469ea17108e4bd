"""What all chunks of heads of one forward or backward pass of the engine share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vit_attn.attention import kernels
from vit_attn.attention.blocks import Plan, Regrouped, Rows
from vit_attn.attention.normalizers import working_dtype

# Scores of all heads that are in the works at a time: 2 MiB in fp32, so that they stay in the cores' caches.
_CHUNK_ENTRIES = 2**19

Chunk = tuple[slice, slice]


def _chunks(batch: int, heads: int, entries: int) -> Iterator[Chunk]:
    """Cut (B, H) into chunks of about ``_CHUNK_ENTRIES``, given the entries of one head."""
    together = max(1, _CHUNK_ENTRIES // entries)
    images, heads_at_once = max(1, together // heads), min(heads, together)
    for image in range(0, batch, images):
        for head in range(0, heads, heads_at_once):
            yield slice(image, image + images), slice(head, head + heads_at_once)


def wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(Cb, Ch, n, D) → (C, n, D) in the working dtype."""
    return x.to(dtype).flatten(0, 1)


class Call:
    """What all chunks of one forward or backward pass share.

    Args:
        q, k, v: (B, H, N, D).
        alpha: of every head, or ``alphas`` (H,) of each.
        dropout: probability; ``seed`` makes the same weights drop in the backward pass.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        alpha: float,
        alphas: Tensor | None,
        scale: float,
        dropout: float,
        seed: Tensor | None,
    ) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.plan = plan
        self.dtype = working_dtype(q.dtype)
        self.like = q.new_empty(0, dtype=self.dtype)
        self.alpha, self.alphas = alpha, alphas
        self.dropout = dropout
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(q.device).manual_seed(int(seed))

    def chunks(self, part: Regrouped | Rows) -> Iterator[Chunk]:
        """Heads that are computed together."""
        return _chunks(*self.q.shape[:2], part.scores)

    def alpha_of(self, chunk: Chunk, rows: int) -> float | Tensor:
        """The kernels' α for ``rows`` rows of each head of a chunk."""
        if self.alphas is None:
            return self.alpha
        images = len(range(self.q.shape[0])[chunk[0]])
        return self.alphas[chunk[1], None].expand(images, -1, rows).reshape(-1, 1)

    def keep(self, weights: Tensor) -> Tensor | None:
        """Draw what dropout leaves: 0 or 1 / (1 - p) for every weight."""
        if self.generator is None:
            return None
        return torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)

    def add_alpha_gradient(self, d_alphas: Tensor, chunk: Chunk, p: Tensor, g: Tensor, alpha: float | Tensor) -> None:
        """Add the gradients of a chunk's rows, see ``kernels.alpha_gradient``, to those of its heads (H,)."""
        assert isinstance(alpha, Tensor)
        images, heads = (len(range(size)[part]) for part, size in zip(chunk, self.q.shape[:2], strict=True))
        d_alphas[chunk[1]] += kernels.alpha_gradient(p, g, alpha).view(images, heads, -1).sum((0, 2))
