"""CIFAR-10: 50,000 training and 10,000 test photographs of 32×32 pixels in 10 classes.

Source: https://www.cs.toronto.edu/~kriz/cifar.html. torchvision downloads it and checks its MD5 sums.
"""

import torch
from torchvision.datasets import CIFAR10

from vit_attn.data.images import Images
from vit_attn.data.pipeline import ImageData
from vit_attn.errors import UserError, one_line

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Cifar10(ImageData):
    """``root`` holds ``cifar-10-batches-py/`` or its archive, or is where they go."""

    default_root = "data"
    default_image_size = 32
    default_mean = (0.4914, 0.4822, 0.4465)
    default_std = (0.2470, 0.2435, 0.2616)

    def prepare_data(self) -> None:
        """Download what is missing and verify it; raises ``UserError`` where that fails."""
        assert self.root is not None
        try:
            CIFAR10(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"CIFAR-10 cannot be had from {CIFAR10.url}: {one_line(error).rstrip('.')}. Put "
                f"{CIFAR10.filename} (MD5 {CIFAR10.tgz_md5}) into data.root={self.root}, "
                "or use data=digits, which needs no download"
            ) from error

    def find_classes(self) -> list[str]:
        """The ten of the paper, in its order."""
        return list(_CLASSES)

    def load_train(self) -> Images:
        """50,000 images."""
        return self._load(train=True)

    def load_test(self) -> Images:
        """10,000 images."""
        return self._load(train=False)

    def _load(self, *, train: bool) -> Images:
        assert self.root is not None
        try:
            cifar = CIFAR10(self.root, train=train)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"CIFAR-10 is missing or damaged in data.root={self.root}: delete {CIFAR10.base_folder} there, "
                f"so that it is downloaded again, or use data=digits"
            ) from error
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()  # (N, H, W, C) → (N, C, H, W)
        return self.in_memory(pixels, torch.tensor(cifar.targets))
