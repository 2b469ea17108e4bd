"""Which images make up which batch: a function of (seed, epoch, rank) and of nothing else."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from vit_attn.errors import UserError


class TrainBatches(Sampler[list[int]]):
    """Shuffled batches of equal size; each epoch's order depends on ``seed`` and the epoch alone.

    One global batch is ``batch_size * world_size`` consecutive images of that order, and rank r takes the
    r-th slice of it. The images that do not fill a last batch sit the epoch out; a set smaller than one
    global batch makes one smaller batch, of equal size on each rank.

    Attributes:
        start_batch: batches that the next iteration leaves out at its start, once: resuming inside an
            epoch. The length stays that of the whole epoch.

    Args:
        num_images: images in the set.
        batch_size: images per batch and rank.

    Raises:
        UserError: fewer images than ranks.
    """

    def __init__(self, num_images: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        _check_enough(num_images, world_size, "training")
        self.num_images, self.seed, self.rank, self.world_size = num_images, seed, rank, world_size
        self.batch_size = min(batch_size, num_images // world_size)
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        first, self.start_batch = self.start_batch, 0
        for batch in range(first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()


class EvalBatches(Sampler[list[int]]):
    """Batches in order; rank r takes every ``world_size``-th image. None is dropped, none is repeated.

    Every rank has the same number of batches, none of them empty: ranks that compute a sharded model wait for one
    another in each. So the last one may be smaller, or, where ``batch_size`` is 1, larger by one.

    Args:
        num_images: images in the set.
        batch_size: images per batch and rank.

    Raises:
        UserError: fewer images than ranks.
    """

    def __init__(self, num_images: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        _check_enough(num_images, world_size, "evaluation")
        self.indices = range(rank, num_images, world_size)
        self.batch_size = batch_size
        most, fewest = -(-num_images // world_size), num_images // world_size  # images of a rank
        self.batches = min(-(-most // batch_size), fewest)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for later in reversed(range(self.batches)):  # batches that still come, each of which needs an image
            end = min(start + self.batch_size, len(self.indices) - later) if later else len(self.indices)
            yield list(self.indices[start:end])
            start = end


def _check_enough(num_images: int, world_size: int, kind: str) -> None:
    if num_images < world_size:
        raise UserError(
            f"{num_images} {kind} images cannot be shared by {world_size} processes; use at most {num_images} devices"
        )
