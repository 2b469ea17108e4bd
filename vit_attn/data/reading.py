"""Read every file of a split once, on all CPU cores: to keep its pixels, or to find the broken ones."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vit_attn.data.decode import BrokenImageError, decode_image
from vit_attn.data.images import FileImages, Images, MemoryImages, file_state, files_fingerprint
from vit_attn.errors import UserError

_CHUNK_BYTES = 2 << 20  # of pixels per message between processes: /dev/shm is 64 MiB in a container
_MAX_WORKERS = 8


def read_files(
    paths: Sequence[str],
    labels: Tensor,
    *,
    size: int,
    keep_pixels: bool,
    on_error: str,
    progress: bool = False,
    title: str = "images",
) -> tuple[Images, int]:
    """Decode all files, stop at or leave out the broken ones.

    Args:
        paths: N files.
        labels: int64 (N,).
        size: pixels per side.
        keep_pixels: True keeps the pixels, N·3·size² bytes; False forgets them, to stream them later.
        on_error: "stop" raises at the first broken file, in the order of ``paths``; "skip" leaves it out.
        progress: show a bar named ``title`` on stderr.

    Returns:
        the readable images, in order, and the number of those left out.

    Raises:
        UserError: names the broken file, or says that all of them are.
    """
    pixels = torch.empty((len(paths), 3, size, size), dtype=torch.uint8) if keep_pixels else None
    readable = torch.ones(len(paths), dtype=torch.bool)
    states = torch.zeros((len(paths), 2), dtype=torch.int64)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(f"reading {title}", total=len(paths))
        for rows, part, part_states, broken in _chunks(paths, size, keep_pixels):
            for row, message in broken:
                if on_error == "stop":
                    raise UserError(f"{message}. Repair or remove it, or leave such images out with data.on_error=skip")
                readable[row] = False
            states[rows[0] : rows[-1] + 1] = part_states
            if pixels is not None:
                pixels[rows[0] : rows[-1] + 1] = part
            bar.advance(task, len(rows))
    if not readable.any():
        raise UserError(f"none of the {len(paths)} {title} can be read; the first: {paths[0]}")
    images: Images
    if pixels is None:
        images = FileImages(paths, labels, size=size, states=states)
    else:
        images = MemoryImages(pixels, labels, fingerprint=files_fingerprint(paths, labels, states))
    skipped = int((~readable).sum())
    return (images.subset(readable.nonzero().flatten()) if skipped else images), skipped


def _chunks(paths: Sequence[str], size: int, keep_pixels: bool) -> Iterator[tuple]:
    length = min(256, max(1, _CHUNK_BYTES // (3 * size * size)))
    chunks = [range(start, min(start + length, len(paths))) for start in range(0, len(paths), length)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # processes, not threads: at 32×32 half of the time is Python's (4 s against 10 s for 50,000 JPEGs, 2 cores)
    workers = min(_MAX_WORKERS, cores) if len(paths) >= 64 else 0
    reader = _Reader(paths, size, keep_pixels)
    # own generator: DataLoader draws a seed for its workers, and the global stream is the training's
    return iter(
        DataLoader(
            reader, sampler=chunks, batch_size=None, num_workers=workers, collate_fn=_as_is, generator=torch.Generator()
        )
    )


class _Reader(Dataset):
    """rows → (rows, uint8 (B, 3, size, size) or None, their states (B, 2), [(row, what is wrong with it), …])."""

    def __init__(self, paths: Sequence[str], size: int, keep_pixels: bool) -> None:
        self.paths, self.size, self.keep_pixels = paths, size, keep_pixels

    def __getitem__(self, rows: range) -> tuple[range, Tensor | None, Tensor, list[tuple[int, str]]]:
        pixels = np.zeros((len(rows), 3, self.size, self.size), dtype=np.uint8) if self.keep_pixels else None
        states = torch.zeros((len(rows), 2), dtype=torch.int64)
        broken = []
        for place, row in enumerate(rows):
            try:
                states[place] = torch.tensor(file_state(self.paths[row]))
                image = decode_image(self.paths[row], self.size)
            except BrokenImageError as error:
                broken.append((row, str(error)))
                continue
            if pixels is not None:
                pixels[place] = image
        return rows, None if pixels is None else torch.from_numpy(pixels), states, broken


def _as_is(chunk: Any) -> Any:
    return chunk
