"""Handwritten digits that come with scikit-learn: 1,797 images of 8×8 pixels, no download, seconds to train.

Source: https://archive.ics.uci.edu/dataset/80. Enlarged to 32×32 and repeated over three channels.
"""

from typing import ClassVar

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from vit_attn.data.images import Images
from vit_attn.data.pipeline import ImageData

_SPLIT_SEED = 0  # of train and test: part of what this data set is, not a setting


class Digits(ImageData):
    """1,437 training and 360 test images, split once by class; ``root`` is not used."""

    default_image_size = 32
    # of the 1,437 training images at 32×32
    default_mean = (0.3123, 0.3123, 0.3123)
    default_std = (0.3561, 0.3561, 0.3561)
    default_augment: ClassVar[dict] = {"crop_padding": 3, "flip": False}  # a mirrored digit is another sign

    def find_classes(self) -> list[str]:
        """0 to 9."""
        return [str(digit) for digit in range(10)]

    def load_train(self) -> Images:
        """1,437 images."""
        return self._load(train=True)

    def load_test(self) -> Images:
        """360 images."""
        return self._load(train=False)

    def _load(self, *, train: bool) -> Images:
        grey, labels = load_digits(return_X_y=True)
        parts = train_test_split(grey, labels, test_size=0.2, stratify=labels, random_state=_SPLIT_SEED)
        grey, labels = parts[0::2] if train else parts[1::2]
        pixels = _enlarge(torch.from_numpy(grey).float().view(-1, 1, 8, 8))
        return self.in_memory(pixels, torch.from_numpy(labels).long())


def _enlarge(grey: Tensor) -> Tensor:
    """0 to 16 (N, 1, 8, 8) → uint8 (N, 3, 32, 32); bicubic keeps strokes smooth."""
    large = F.interpolate(grey * (255 / 16), size=(32, 32), mode="bicubic")
    return large.round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
