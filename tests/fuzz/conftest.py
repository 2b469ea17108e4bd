"""Generated bad input: no network, and a folder of its own for every input."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> None:
    """Whatever is asked for, nothing is downloaded and no picture drawn."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """``place()`` → a new, empty folder, which is the working one from then on; the last one is removed."""
    top = Path(tempfile.mkdtemp(prefix="fuzz")).resolve()
    before = Path.cwd()
    count = 0

    def new() -> Path:
        nonlocal count
        os.chdir(before)
        shutil.rmtree(top / str(count), ignore_errors=True)
        count += 1
        (top / str(count)).mkdir()
        os.chdir(top / str(count))
        return top / str(count)

    yield new
    os.chdir(before)
    shutil.rmtree(top, ignore_errors=True)
