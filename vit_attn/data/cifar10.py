"""CIFAR-10: 50,000 training and 10,000 test photographs of 32×32 pixels in 10 classes.

Source: https://www.cs.toronto.edu/~kriz/cifar.html. It comes as pickled files in a tar archive. Both are read as what
they should be and as nothing else: the archive by the names of its files, each of which has to have the MD5 sum that
torchvision knows, and the pickles without calling anything but what makes a NumPy array.
"""

import hashlib
import io
import pickle
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url

from vit_attn.data.images import Images
from vit_attn.data.pipeline import ImageData
from vit_attn.errors import UserError, one_line
from vit_attn.files import whole_file

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MOST_BYTES = 64 * 2**20  # of one file: the largest has 31 million
# All that a pickled array of bytes is made by, under its names of NumPy 1 and 2.
_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class Cifar10(ImageData):
    """``root`` holds ``cifar-10-batches-py/`` or its archive, or is where they go."""

    default_root = "data"
    default_image_size = 32
    default_mean = (0.4914, 0.4822, 0.4465)
    default_std = (0.2470, 0.2435, 0.2616)

    def prepare_data(self) -> None:
        """Download what is missing and verify it; raises ``UserError`` where that fails."""
        assert self.root is not None
        if all(check_integrity(str(self._folder / name), md5) for name, md5 in _files()):
            return
        new = [path for path in (self._folder, self.root, *self.root.parents) if not path.exists()]
        try:
            # It takes the archive that is there, if it is the right one.
            download_url(CIFAR10.url, str(self.root), CIFAR10.filename, CIFAR10.tgz_md5)
            _unpack(self.root / CIFAR10.filename, self.root)
        except (OSError, RuntimeError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
            for path in new:
                with suppress(OSError):
                    path.rmdir()  # of those that are empty, nothing shall be left
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
        return self._load(CIFAR10.train_list)

    def load_test(self) -> Images:
        """10,000 images."""
        return self._load(CIFAR10.test_list)

    @property
    def _folder(self) -> Path:
        assert self.root is not None
        return self.root / CIFAR10.base_folder

    def _load(self, files: list[list[str]]) -> Images:
        try:
            parts = [_read(self._folder / name, md5) for name, md5 in files]
        except (OSError, ValueError) as error:
            raise UserError(
                f"CIFAR-10 is missing or damaged in data.root={self.root} ({one_line(error)}): delete "
                f"{CIFAR10.base_folder} there, so that it is downloaded again, or use data=digits"
            ) from error
        pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in parts])).view(-1, 3, 32, 32)
        return self.in_memory(pixels, torch.tensor([label for _, labels in parts for label in labels]))


def _files() -> list[list[str]]:
    """[name, MD5] of each."""
    return [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]


def _unpack(archive: Path, root: Path) -> None:
    """Take the files that there should be out of ``archive``: whatever else is in it stays there.

    Raises:
        ValueError: one of them is missing, is a link or too large, or has another MD5 sum.
    """
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:gz") as tar:
        for name, md5 in _files():
            try:
                member = tar.getmember(f"{CIFAR10.base_folder}/{name}")
            except KeyError:
                raise ValueError(f"{archive} lacks {name}") from None
            file = tar.extractfile(member) if member.isreg() and member.size <= _MOST_BYTES else None
            content = file.read() if file is not None else b""
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise ValueError(f"{name} in {archive} is not the file that it should be")
            with whole_file(folder / name, "wb") as written:
                written.write(content)


class _ArrayUnpickler(pickle.Unpickler):
    """Makes plain containers and NumPy arrays; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _read(path: Path, md5: str) -> tuple[np.ndarray, list[int]]:
    """Read one file: uint8 (N, 3072) and N labels.

    Raises:
        ValueError: it is not what it should be.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path.name} has another MD5 sum")
    try:
        entry = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()  # of bytes whose sum is known
        pixels, labels = np.asarray(entry["data"]), [int(label) for label in entry["labels"]]
    except Exception as error:  # a pickle raises what it likes
        raise ValueError(f"{path.name}: {one_line(error)}") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072) or not set(labels) <= set(range(len(_CLASSES))):
        raise ValueError(f"{path.name}: no labelled images of 32×32 pixels")
    return pixels, labels
