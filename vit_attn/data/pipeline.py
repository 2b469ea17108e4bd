"""The pipeline that every data set shares: carve validation, cache or stream, shuffle, batch.

A new data set is one module with a subclass of :class:`ImageData` and one YAML in ``conf/data``: set the class
attributes, override ``find_classes``, ``load_train`` and ``load_test``, and ``prepare_data`` where it downloads.
"""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vit_attn.data.augment import Augment, AugmentOptions, Normalize
from vit_attn.data.checks import channel_values, choice, number, whole
from vit_attn.data.images import Images, MemoryImages
from vit_attn.data.samplers import EvalBatches, TrainBatches
from vit_attn.errors import UserError, one_line
from vit_attn.training.stopping import SIGNALS


def check_same_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other data than a run began with.

    Args:
        before, now: of :meth:`ImageData.describe`. What only one of them knows is not compared.

    Raises:
        UserError: the first difference.
    """
    for split, fingerprint in before.get("fingerprint", {}).items():
        other = now["fingerprint"].get(split, fingerprint)
        # Of other kinds where the data were read in another way: files are not always looked into.
        if fingerprint.split()[0] == other.split()[0] and fingerprint != other:
            sizes = f"{before['num_images'].get(split)} → {now['num_images'].get(split)} images"
            raise UserError(
                f"data: the {split} images are not those that this run began with ({sizes}, {fingerprint} → {other}); "
                "bring those back, choose another run_name=, or start anew with overwrite=true"
            )


def _ignore_stop_signals(worker: int) -> None:
    """A signal to all processes of a job would otherwise kill the next batch before the training has saved."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class ImageData(LightningDataModule):
    """Training, validation and test batches: uint8 (B, C, H, W) and int64 (B,).

    Attributes:
        class_names, num_classes, image_size (pixels per side), in_chans: known after :meth:`setup`.
        mean, std: per channel, of images in 0 to 1.
        num_skipped: split → number of broken images left out, for the splits loaded so far.
        start_epoch, start_batch: the epoch that the next training loader begins in, and the batches of it that it
            leaves out, once. Set them before ``fit`` to resume: Lightning starts the loader's workers before it knows
            where the run stood, and before any hook runs.

    Args:
        batch_size: training images per step and device.
        image_size: pixels per side; None: the data set's own.
        root: folder of the data; None: the data set's own.
        val_fraction: share of the training images that validation takes, per class.
        split_seed: which images those are.
        seed: the order of the training images.
        num_workers: processes that decode while the model trains, where images do not fit the cache.
        cache_budget: GiB, per process, for decoded images; what does not fit is streamed.
        on_error: "stop" at a broken image, or "skip" and count it.
        mean: None: the data set's own.
        std: None: the data set's own.
        augment: options that differ from the data set's own, see ``AugmentOptions``.
        eval_batch_size: None: twice ``batch_size``.
        progress: show a bar while images are read.

    Raises:
        UserError: a wrong value, at once; missing or broken data, in ``prepare_data`` or ``setup``.
    """

    default_image_size: ClassVar[int | None] = None
    default_root: ClassVar[str | None] = None
    default_mean: ClassVar[Sequence[float]]
    default_std: ClassVar[Sequence[float]]
    default_augment: ClassVar[Mapping[str, Any]] = {}

    class_names: list[str]
    image_size: int
    in_chans = 3

    def __init__(
        self,
        *,
        batch_size: int = 128,
        image_size: int | None = None,
        root: str | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        cache_budget: float = 4.0,
        on_error: str = "stop",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Mapping[str, Any] | None = None,
        eval_batch_size: int | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = whole("batch_size", batch_size, least=1)
        self.eval_batch_size = whole(
            "eval_batch_size", 2 * self.batch_size if eval_batch_size is None else eval_batch_size, least=1
        )
        self.requested_size = None if image_size is None else whole("image_size", image_size, least=1)
        chosen_root = self.default_root if root is None else str(root)
        self.root = None if chosen_root is None else Path(chosen_root).expanduser()
        self.val_fraction = number("val_fraction", val_fraction, least=0, below=1)
        if self.val_fraction == 0 and not self.has_val():
            raise UserError("data.val_fraction=0 leaves no validation images; give a share of the training images")
        self.split_seed = whole("split_seed", split_seed, least=0)
        self.seed = whole("seed", seed, least=0, prefix="")
        self.num_workers = whole("num_workers", num_workers, least=0)
        self.cache_left = int(number("cache_budget", cache_budget, least=0) * 2**30)
        self.on_error = choice("on_error", on_error, ("stop", "skip"))
        self.mean = channel_values("mean", self.default_mean if mean is None else mean)
        self.std = channel_values("std", self.default_std if std is None else std, positive=True)
        self.augment_options = {**self.default_augment, **(augment or {})}
        AugmentOptions.of(self.augment_options)
        self.progress = progress
        self.num_skipped: dict[str, int] = {}
        self.start_epoch = self.start_batch = 0
        self._loaders: list[DataLoader] = []
        self._train: Images | None = None
        self._val: Images | None = None
        self._test: Images | None = None

    # What a data set overrides

    def find_classes(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        raise NotImplementedError

    def find_image_size(self) -> int:
        """Pixels per side where the user asks for none."""
        assert self.default_image_size is not None
        return self.default_image_size

    def has_val(self) -> bool:
        """Whether the data set comes with validation images of its own; asked before :meth:`setup`."""
        return False

    def load_train(self) -> Images:
        """Training images, those that validation is carved from included."""
        raise NotImplementedError

    def load_val(self) -> Images:
        """Validation images; asked for only where :meth:`has_val`."""
        raise NotImplementedError

    def load_test(self) -> Images:
        """Test images."""
        raise NotImplementedError

    # What a data set uses

    def reserve_cache(self, num_images: int) -> bool:
        """Whether ``num_images`` decoded images fit into what is left of the cache; if so, take the room."""
        wanted = num_images * self.in_chans * self.image_size**2
        fits = wanted <= self.cache_left
        if fits:
            self.cache_left -= wanted
        return fits

    def in_memory(self, pixels: Tensor, labels: Tensor) -> Images:
        """Decoded images (N, C, H, W) and labels (N,), resized once where that fits the cache, else per batch."""
        images = MemoryImages(pixels, labels, size=self.image_size)
        return images.resized() if images.streams and self.reserve_cache(len(images)) else images

    # What Lightning and the training call

    def setup(self, stage: str | None = None) -> None:
        """Load the images that ``stage`` needs and are not loaded yet: "test" the test images, others all.

        Raises:
            UserError: missing or broken images, too few of them to carve validation.
        """
        stage = getattr(stage, "value", stage)
        if not hasattr(self, "image_size"):
            self.class_names = self.find_classes()
            self.image_size = self.requested_size or self.find_image_size()
        if stage != "test" and self._train is None:
            train = self.load_train()
            self._train, self._val = (train, self.load_val()) if self.has_val() else self._carve(train)
        if self._test is None:  # before training too, so that a broken test image is found in time
            self._test = self.load_test()

    @property
    def num_classes(self) -> int:
        """Length of ``class_names``."""
        return len(self.class_names)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, in plain containers."""
        splits = {"train": self._train, "val": self._val, "test": self._test}
        return {
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "in_chans": self.in_chans,
            "mean": list(self.mean),
            "std": list(self.std),
            "num_images": {name: len(images) for name, images in splits.items() if images is not None},
            "num_skipped": dict(self.num_skipped),
            "fingerprint": {name: images.fingerprint for name, images in splits.items() if images is not None},
        }

    def sample(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """Take up to ``count`` images of "train", "val" or "test", spread evenly: always the same ones.

        Returns:
            uint8 (count, C, H, W) and int64 (count,).
        """
        images = {"train": self._train, "val": self._val, "test": self._test}[split]
        assert images is not None, "setup() comes first"
        count = min(count, len(images))
        return images[[index * len(images) // count for index in range(count)]]

    def make_augment(self) -> Augment:
        """The augmentation of training batches; after :meth:`setup`."""
        return Augment(num_classes=self.num_classes, image_size=self.image_size, mean=self.mean, **self.augment_options)

    def make_normalize(self) -> Normalize:
        """The normalization of every batch."""
        return Normalize(self.mean, self.std)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of equal size; its ``sampler`` is a ``TrainBatches``."""
        assert self._train is not None, "setup('fit') comes first"
        batches = TrainBatches(len(self._train), self.batch_size, seed=self.seed, **self._place())
        batches.set_epoch(max(self.start_epoch, self.trainer.current_epoch if self.trainer is not None else 0))
        batches.start_batch = self.start_batch
        self.start_epoch = self.start_batch = 0
        return self._loader(self._train, batches)

    def val_dataloader(self) -> DataLoader:
        """Every validation image once, in order."""
        return self._eval_loader(self._val)

    def test_dataloader(self) -> DataLoader:
        """Every test image once, in order."""
        return self._eval_loader(self._test)

    def _eval_loader(self, images: Images | None) -> DataLoader:
        assert images is not None, "setup() comes first"
        return self._loader(images, EvalBatches(len(images), self.eval_batch_size, **self._place()))

    def _place(self) -> dict[str, int]:
        if self.trainer is None:
            return {}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _loader(self, images: Images, batches: TrainBatches | EvalBatches) -> DataLoader:
        workers = self.num_workers if images.streams else 0
        loader = DataLoader(
            images,
            sampler=batches,
            batch_size=None,  # the sampler's items are whole batches
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_stop_signals,
            generator=torch.Generator(),  # the workers' seeds: not out of the training's global stream
        )
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """End the processes that read images: they hear no signal, so nobody else can."""
        while self._loaders:
            iterator = self._loaders.pop()._iterator
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.kill()  # one that hangs in a read

    def on_exception(self, exception: BaseException) -> None:
        """The same, where a run fails."""
        self.teardown()

    def _carve(self, train: Images) -> tuple[Images, Images]:
        counts = torch.bincount(train.labels, minlength=self.num_classes)
        try:
            train_rows, val_rows = train_test_split(
                torch.arange(len(train)).numpy(),
                test_size=self.val_fraction,
                stratify=train.labels.numpy(),
                random_state=self.split_seed,
            )
        except ValueError as error:
            smallest = int(counts.argmin())
            raise UserError(
                f"data.val_fraction={self.val_fraction:g} cannot be carved from {len(train)} training images of "
                f"{self.num_classes} classes (fewest: {int(counts[smallest])} of "
                f"{self.class_names[smallest]!r}): {one_line(error)}"
            ) from error
        return train.subset(sorted(train_rows)), train.subset(sorted(val_rows))
