"""Images per second that reach the training step: this project's pipeline against torchvision's usual one.

    python -m vit_attn.bench data                                    # JPEGs that it makes itself, 32 and 256 pixels
    python -m vit_attn.bench data --root photos --sizes 64,224       # photos/train/<class>/*.jpg and photos/test/…

The rival is ``torchvision.datasets.ImageFolder`` with v2 transforms per image (the faster of PIL and tensors) in a
``DataLoader`` with persistent workers. Every candidate delivers normalized float32 batches of the same images.
A measurement is one epoch; workers have been started by the epoch before, which is not counted.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from vit_attn.arguments import whole
from vit_attn.bench.options import names
from vit_attn.bench.output import Column, ConsoleProgress, Spread, Table, per_second, reason
from vit_attn.bench.timing import Failed, Timing, interleave, ratio
from vit_attn.data import imagefolder

QUICK = {"images": 64, "sizes": [32], "batch_size": 16}
TARGETS = {"memory": 10.0, "stream": 1.0}
_POLICIES = {"default": "none", "rand_augment": "rand_augment"}
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_PADDING = 4
_SMALL, _LARGE = 32, 256  # pixels per side of the pictures that are made for training at up to 32, and above

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Setting:
    """What all candidates of one comparison share.

    Args:
        root: an image folder with train/ and test/.
        size: pixels per side of a training image.
        policy: ``data.augment.policy``.
        workers: processes of the rival and of the streaming path.
    """

    root: Path
    size: int
    policy: str
    batch_size: int
    workers: int
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--root", type=Path, help="an image folder with train/ and test/ (default: one is made)")
    parser.add_argument("--sizes", type=_sizes, default=[32, 64, 224], help="pixels per side (default: 32,64,224)")
    known = ",".join(_POLICIES)
    parser.add_argument("--augment", type=names("augmentation", _POLICIES), default=list(_POLICIES), help=known)
    parser.add_argument("--images", type=whole(8, 100_000), default=1024, help="to make, for training")
    parser.add_argument("--batch-size", type=whole(1, 4096), default=128)
    parser.add_argument("--workers", type=whole(1, 64), default=2, help="of rival and streaming path")


def _sizes(text: str) -> list[int]:
    return list(dict.fromkeys(whole(8, 1024)(size.strip()) for size in text.split(",")))


def run(args: argparse.Namespace) -> list[Table]:
    """Measure every size and augmentation.

    Raises:
        UserError: ``--root`` is no image folder, or too small to carve validation images from.
    """
    workers = f"{args.workers} workers"
    table = Table(
        f"input pipeline: batches of {args.batch_size}, rival: ImageFolder + v2 + DataLoader ({workers})",
        (
            *(Column("loader", words=True), Column("augmentation", words=True), Column("size", "pixels")),
            *(Column("speed", "images/s"), Column("times rival"), Column("target"), Column("met", words=True)),
        ),
    )
    table.note("An epoch per measurement, workers already running. Padded crop, flip and normalization are in both.")
    table.note("RandAugment: the rival draws per image, this project once per group of 8 images (augment.group_size).")
    with ExitStack() as stack:
        made: dict[int, Path] = {}
        for size in args.sizes:
            pixels = _SMALL if size <= _SMALL else _LARGE
            if args.root is None and pixels not in made:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vit_attn_bench_")))
                made[pixels] = make_folder(folder, images=args.images, size=pixels, seed=args.seed)
            for name in args.augment:
                root = args.root or made[pixels]
                setting = Setting(root, size, _POLICIES[name], args.batch_size, args.workers, args.seed)
                _compare(table, setting, name, args)
    return [table]


def _compare(table: Table, setting: Setting, augmentation: str, args: argparse.Namespace) -> None:
    loaders = {
        "torchvision, PIL": torchvision_batches(setting, pil=True),
        "torchvision, tensors": torchvision_batches(setting, pil=False),
        "memory": our_batches(setting, in_memory=True),
        "stream": our_batches(setting, in_memory=False),
    }
    progress = ConsoleProgress(f"{augmentation} {setting.size} pixels")
    epochs = {name: _epoch(batches) for name, batches in loaders.items()}
    results = interleave(epochs, rounds=args.rounds, device=torch.device("cpu"), progress=progress)
    rivals = [result for name, result in results.items() if name not in TARGETS and isinstance(result, Timing)]
    best = min(rivals, key=lambda timing: timing.median, default=None)
    count = epochs["memory"]()  # the same for all: full batches of the same images
    for name, result in results.items():
        cells: dict = {"loader": name, "augmentation": augmentation, "size": setting.size}
        if isinstance(result, Failed):
            table.add({**cells, "met": reason(result)})
            continue
        cells["speed"] = per_second(result, count)
        if name in TARGETS and best is not None:
            faster = Spread(*ratio(best, result))
            cells |= {"times rival": faster, "target": TARGETS[name]}
            cells["met"] = "yes" if faster.median >= TARGETS[name] else "no"
        table.add(cells, [result])


def our_batches(setting: Setting, *, in_memory: bool) -> Batches:
    """What ``train.py``'s training step computes with: the project's loader, augmentation and normalization."""
    data = _data(setting, in_memory=in_memory)
    loader, augment, normalize = data.train_dataloader(), data.make_augment(), data.make_normalize()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            images, targets = augment(images, labels)
            yield normalize(images), targets

    return batches


def torchvision_batches(setting: Setting, *, pil: bool) -> Batches:
    """What is usual: decode, augment and normalize image by image, in worker processes; the same images.

    Args:
        pil: transform PIL images, and make tensors last; False: tensors first.
    """
    images: Any = _data(setting, in_memory=False).train_dataloader().dataset
    rows = images.rows.tolist()
    files = ImageFolder(str(setting.root / "train"), _transforms(setting, pil=pil))
    loader = DataLoader(
        Subset(files, rows),
        batch_size=min(setting.batch_size, len(rows)),
        shuffle=True,
        drop_last=True,
        num_workers=setting.workers,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(setting.seed),
    )
    return lambda: iter(loader)


def _data(setting: Setting, *, in_memory: bool) -> imagefolder.ImageFolder:
    data = imagefolder.ImageFolder(
        root=str(setting.root),
        image_size=setting.size,
        batch_size=setting.batch_size,
        seed=setting.seed,
        num_workers=setting.workers,
        cache_budget=64.0 if in_memory else 0.0,
        check_images=False,
        mean=_MEAN,
        std=_STD,
        augment={"policy": setting.policy, "crop_padding": _PADDING},
    )
    data.setup("fit")
    return data


def _transforms(setting: Setting, *, pil: bool) -> v2.Compose:
    steps: list[torch.nn.Module] = [] if pil else [v2.ToImage()]
    # without effect on images that have the size
    steps += [v2.Resize(setting.size, InterpolationMode.BICUBIC), v2.CenterCrop(setting.size)]
    steps += [v2.RandomCrop(setting.size, padding=_PADDING), v2.RandomHorizontalFlip()]
    steps += [v2.RandAugment()] if setting.policy == "rand_augment" else []
    steps += [v2.ToImage()] if pil else []
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)])


def make_folder(folder: Path, *, images: int, size: int, seed: int) -> Path:
    """Write smooth random pictures with a little noise, as JPEGs of ``size`` pixels per side, in four classes.

    Args:
        folder: gets train/<class>/ with ``images`` files in all, and test/<class>/ with one per class.

    Returns:
        the folder.
    """
    rng = np.random.default_rng(seed)
    for split, count in (("train", images), ("test", 4)):
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
            pixels = (smooth + rng.integers(-8, 9, (size, size, 1))).clip(0, 255).astype(np.uint8)
            place = folder / split / f"class{number % 4}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number:06}.jpg", quality=90)
    return folder


def _epoch(batches: Batches) -> Callable[[], int]:
    return lambda: sum(len(images) for images, _ in batches())
