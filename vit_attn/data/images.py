"""Labelled images, read a whole batch at a time: from memory, or from files as they are needed."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from vit_attn.data.decode import decode_image


class Images(Dataset, ABC):
    """``images[indices]`` → (uint8 (B, C, H, W), int64 (B,)).

    ``labels`` int64 (N,); ``streams``: reading a batch is work that ``DataLoader`` workers can take over.
    """

    streams: bool

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self._rows = torch.arange(len(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self._read(self._rows[chosen]), self.labels[chosen]

    @property
    def rows(self) -> Tensor:
        """Which of the unsplit whole these are: int64 (N,), in the order of its files."""
        return self._rows

    def subset(self, indices: Sequence[int] | Tensor) -> Self:
        """The images at ``indices``, in that order; pixels are shared, not copied."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        part = copy.copy(self)
        part.labels, part._rows = self.labels[chosen], self._rows[chosen]
        return part

    @abstractmethod
    def _read(self, rows: Tensor) -> Tensor:
        """Pixels uint8 (B, C, H, W) of ``rows`` (B,), which count from the unsplit whole."""


class MemoryImages(Images):
    """Images that are already decoded.

    Args:
        pixels: uint8 (N, C, H, W).
        labels: int64 (N,).
        size: resize each batch to this many pixels per side as it is read; None: as they are.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, *, size: int | None = None) -> None:
        super().__init__(labels)
        self._pixels = pixels
        self._size = None if size == pixels.shape[-1] else size
        self.streams = self._size is not None

    def _read(self, rows: Tensor) -> Tensor:
        pixels = self._pixels.index_select(0, rows)
        return pixels if self._size is None else resize(pixels, self._size)

    def resized(self) -> "MemoryImages":
        """The same images with the resizing done now, once, instead of per batch."""
        if self._size is None:
            return self
        pixels = self._pixels.new_empty(*self._pixels.shape[:2], self._size, self._size)
        for start in range(0, len(pixels), 1024):  # resize makes float copies: bound them
            part = slice(start, start + 1024)
            pixels[part] = resize(self._pixels[part], self._size)
        whole = MemoryImages(pixels, self.labels)
        whole._rows = self._rows
        return whole


class FileImages(Images):
    """Image files that are decoded each time a batch asks for them; a broken one raises ``BrokenImageError``.

    Args:
        paths: N files.
        labels: int64 (N,).
        size: pixels per side of what is read.
    """

    streams = True

    def __init__(self, paths: Sequence[str], labels: Tensor, *, size: int) -> None:
        super().__init__(labels)
        # one array, not N strings: forked workers then share its memory instead of copying it
        self._paths = np.array([path.encode("utf-8", "surrogateescape") for path in paths])
        self._size = size

    def _read(self, rows: Tensor) -> Tensor:
        paths = [path.decode("utf-8", "surrogateescape") for path in self._paths[rows.numpy()]]
        return torch.from_numpy(np.stack([decode_image(path, self._size) for path in paths]))


def resize(pixels: Tensor, size: int) -> Tensor:
    """Bilinear, antialiased: (B, C, H, W) → (B, C, size, size)."""
    return F.resize(pixels, [size, size], antialias=True)
