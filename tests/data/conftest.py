"""Small image folders."""

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def _seeded():
    """Tests that draw would otherwise fail now and then."""
    torch.manual_seed(0)


@pytest.fixture
def make_folder(tmp_path):
    """``make_folder(train=6, test=2)`` → a root with that many 16×16 images per class, all different."""

    def make(classes=("cat", "dog"), size=16, suffix="png", **per_split):
        rng = np.random.default_rng(0)
        for split, count in per_split.items():
            for name in classes:
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number:03}.{suffix}")
        return tmp_path / "images"

    return make


@pytest.fixture
def truncate():
    """Cut the last third off a file."""

    def cut(path):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])

    return cut
