"""Your own images: one folder per split, in it one folder per class.

    root/train/<class>/*.jpg    root/test/<class>/*.jpg, or root/val/…, or both

With both, val/ is the validation set and nothing is carved from train/; with one of them, it is the test set.
"""

from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from vit_attn.data.decode import BrokenImageError, natural_size
from vit_attn.data.images import FileImages, Images
from vit_attn.data.pipeline import ImageData
from vit_attn.data.reading import read_files
from vit_attn.errors import UserError, user_errors

_SMALL = 64  # pixels: square images up to this size are trained as they are
_PHOTO = 224


class ImageFolder(ImageData):
    """Images of any size and mode that PIL reads, see ``decode_image``.

    ``image_size=None``: that of the first readable image if it is square and at most 64 pixels, else 224.

    Args:
        check_images: decode images that are streamed once before training, so that a broken one is found
            then. Without it a broken one stops the run where it is met, whatever ``on_error`` says.
        settings: see :class:`ImageData`.
    """

    default_mean = IMAGENET_DEFAULT_MEAN
    default_std = IMAGENET_DEFAULT_STD

    def __init__(self, *, check_images: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.check_images = check_images
        if self.root is None:
            raise UserError("data=imagefolder needs data.root=<folder with train/ and test/ or val/>")
        if not self._split("train").is_dir():
            raise UserError(f"data.root={self.root} has no folder train/ with one folder of images per class")
        if not self._split(self._test_folder).is_dir():
            raise UserError(f"data.root={self.root} has neither test/ nor val/ with one folder of images per class")

    def find_classes(self) -> list[str]:
        """Folders in train/, by name."""
        with user_errors(f"data.root={self.root}"):
            names = find_classes(self._split("train"))[0]
        strange = [name for name in names if not name.isprintable()]
        if strange:
            raise UserError(f"data.root={self.root}: the class {strange[0]!r} has a name that is no text: rename it")
        return names

    def find_image_size(self) -> int:
        """By the first image that can be opened; broken ones are for the loading to name."""
        paths = self._files("train", allow_empty=True)[0] + self._files(self._test_folder, allow_empty=True)[0]
        for path in paths:
            try:
                width, height = natural_size(path)
            except BrokenImageError:
                continue
            return width if width == height <= _SMALL else _PHOTO
        return _PHOTO

    def has_val(self) -> bool:
        """Both val/ and test/ exist."""
        return self.root is not None and self._test_folder == "test" and self._split("val").is_dir()

    def load_train(self) -> Images:
        """Images in train/."""
        images = self._load("train", "train")
        missing = set(range(self.num_classes)) - set(images.labels.tolist())
        if missing:
            names = ", ".join(self.class_names[label] for label in sorted(missing))
            raise UserError(f"no image of {names} in {self._split('train')} can be read")
        return images

    def load_val(self) -> Images:
        """Images in val/."""
        return self._load("val", "val")

    def load_test(self) -> Images:
        """Images in test/, or in val/ where there is no test/."""
        return self._load("test", self._test_folder)

    @property
    def _test_folder(self) -> str:
        return "test" if self._split("test").is_dir() else "val"

    def _split(self, folder: str) -> Path:
        assert self.root is not None
        return self.root / folder

    def _load(self, split: str, folder: str) -> Images:
        paths, labels = self._files(folder, allow_empty=folder != "train")
        if not paths:
            raise UserError(f"no images in {self._split(folder)}; extensions read: {' '.join(IMG_EXTENSIONS)}")
        cached = self.reserve_cache(len(paths))
        self.num_skipped[split] = 0
        if not cached and not self.check_images:
            return FileImages(paths, torch.tensor(labels), size=self.image_size)
        images, self.num_skipped[split] = read_files(
            paths,
            torch.tensor(labels),
            size=self.image_size,
            keep_pixels=cached,
            on_error=self.on_error,
            progress=self.progress,
            title=f"{split} images",
        )
        return images

    def _files(self, folder: str, *, allow_empty: bool) -> tuple[list[str], list[int]]:
        place = self._split(folder)
        label_of = {name: label for label, name in enumerate(self.class_names)}
        with user_errors(f"data.root={self.root}"):
            unknown = sorted(set(find_classes(place)[0]) - set(label_of))
            if unknown:
                raise UserError(
                    f"{place} has classes that {self._split('train')} does not: {', '.join(map(repr, unknown[:5]))}"
                )
            samples = make_dataset(place, label_of, IMG_EXTENSIONS, allow_empty=allow_empty)
        return [path for path, _ in samples], [label for _, label in samples]
