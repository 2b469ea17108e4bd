"""What all chunks of heads of one forward or backward pass of the engine share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vit_attn.attention import kernels
from vit_attn.attention.blocks import Plan
from vit_attn.attention.normalizers import working_dtype

# Scores of all heads that are in the works at a time: 2 MiB in fp32, so that they stay in the cores' caches.
_CHUNK_ENTRIES = 2**19

Chunk = tuple[slice, slice]


def _chunks(batch: int, heads: int, entries: int) -> Iterator[Chunk]:
    """Cut (B, H) into chunks of about ``_CHUNK_ENTRIES``, given the entries of one head.

    All have the same size, so that one compiled kernel does for them, but for the last where B is no multiple.
    """
    together = max(1, _CHUNK_ENTRIES // entries)
    images, step = 1, heads
    if together >= heads:
        images = min(batch, together // heads)
    else:
        step = max(size for size in range(1, together + 1) if heads % size == 0)
    for image in range(0, batch, images):
        for head in range(0, heads, step):
            yield slice(image, image + images), slice(head, head + step)


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

    def chunks(self, entries: int) -> Iterator[Chunk]:
        """Heads that are computed together, given the entries of one."""
        return _chunks(self.q.shape[0], self.q.shape[1], entries)

    def excess(self, chunk: Chunk, rows: int | None = None) -> kernels.Excess:
        """The normalizer of a chunk's heads: (C, 1, 1), or (C · rows, 1) for ``rows`` rows of each."""
        if self.alphas is None:
            return kernels.excess(self.alpha, self.like)
        images = len(range(self.q.shape[0])[chunk[0]])
        e = kernels.excess(self.alphas[chunk[1]], self.like)
        assert isinstance(e, Tensor)
        e = e.repeat(images)
        return e[:, None, None] if rows is None else e[:, None].expand(-1, rows).reshape(-1, 1)

    def keep(self, *shape: int) -> Tensor | None:
        """Draw what dropout leaves: 0 or 1 / (1 - p) for every weight."""
        if self.generator is None:
            return None
        return self.like.new_empty(shape).bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)

    def add_alpha_gradient(self, d_alphas: Tensor, chunk: Chunk, d_rows: Tensor) -> None:
        """Add the gradients to α of a chunk's rows to those of its heads (H,)."""
        images, heads = (len(range(size)[part]) for part, size in zip(chunk, self.q.shape[:2], strict=True))
        d_alphas[chunk[1]] += d_rows.view(images, heads, -1).sum((0, 2))
