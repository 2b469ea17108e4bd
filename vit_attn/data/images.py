"""Labelled images, read a whole batch at a time: from memory, or from files as they are needed."""

import copy
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from vit_attn.data.decode import BrokenImageError, decode_image


class Images(Dataset, ABC):
    """``images[indices]`` → (uint8 (B, C, H, W), int64 (B,)).

    ``labels`` int64 (N,); ``streams``: reading a batch is work that ``DataLoader`` workers can take over;
    ``fingerprint``: differs where the unsplit whole does.
    """

    streams: bool

    def __init__(self, labels: Tensor, fingerprint: str) -> None:
        self.labels = labels
        self.fingerprint = fingerprint
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
        fingerprint: of where they come from; None: of the pixels themselves.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, *, size: int | None = None, fingerprint: str | None = None
    ) -> None:
        super().__init__(labels, fingerprint or f"pixels {_checksum(pixels.numpy(), labels.numpy())}")
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
        whole = MemoryImages(pixels, self.labels, fingerprint=self.fingerprint)
        whole._rows = self._rows
        return whole


class FileImages(Images):
    """Image files that are decoded each time a batch asks for them.

    A broken one, or one that is not what it was, raises ``BrokenImageError``.

    Args:
        paths: N files.
        labels: int64 (N,).
        size: pixels per side of what is read.
        states: int64 (N, 2), see :func:`file_state`: of the files as they were checked; None: they were not.
    """

    streams = True

    def __init__(self, paths: Sequence[str], labels: Tensor, *, size: int, states: Tensor | None = None) -> None:
        super().__init__(labels, files_fingerprint(paths, labels, states))
        # one array, not N strings: forked workers then share its memory instead of copying it
        self._paths = np.array([path.encode("utf-8", "surrogateescape") for path in paths])
        self._size = size
        self._states = states

    def _read(self, rows: Tensor) -> Tensor:
        paths = [path.decode("utf-8", "surrogateescape") for path in self._paths[rows.numpy()]]
        if self._states is not None:
            for path, before in zip(paths, self._states[rows].tolist(), strict=True):
                _check_unchanged(path, before)
        return torch.from_numpy(np.stack([decode_image(path, self._size) for path in paths]))


def file_state(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns, which a file that is replaced or cut short does not keep.

    Raises:
        BrokenImageError: it is gone.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise BrokenImageError(f"cannot read image {path}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def _check_unchanged(path: str, before: list[int]) -> None:
    if list(file_state(path)) != before:
        raise BrokenImageError(
            f"image {path} has changed since it was read before training: put the old one back, and the same command "
            "goes on from the last checkpoint"
        )


def files_fingerprint(paths: Sequence[str], labels: Tensor, states: Tensor | None) -> str:
    """Of the files' names below the folder that they share, their sizes where these are known, and the labels."""
    top = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = "\0".join(os.path.relpath(path, top) for path in paths).encode("utf-8", "surrogateescape")
    parts = [np.frombuffer(names, dtype=np.uint8), labels.numpy()]
    kind = "names" if states is None else "files"
    return f"{kind} {_checksum(*parts, *([] if states is None else [states[:, 0].contiguous().numpy()]))}"


def _checksum(*arrays: np.ndarray) -> str:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return f"{value:08x}"


def resize(pixels: Tensor, size: int) -> Tensor:
    """Bilinear, antialiased: (B, C, H, W) → (B, C, size, size)."""
    return F.resize(pixels, [size, size], antialias=True)
