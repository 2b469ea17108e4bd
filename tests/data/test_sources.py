"""CIFAR-10, digits and image folders."""

import functools
import hashlib
import io
import itertools
import pickle
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from vit_attn.data.cifar10 import Cifar10
from vit_attn.data.digits import Digits
from vit_attn.data.imagefolder import ImageFolder
from vit_attn.errors import UserError


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Requests are not the tests' output."""


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """An archive in CIFAR-10's format with 40 + 10 images, on a web server of this machine."""
    rng = np.random.default_rng(0)
    contents = {}
    for name, count in (("data_batch_1", 20), ("data_batch_2", 20), ("test_batch", 10)):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": [number % 10 for number in range(count)]}
    contents["batches.meta"] = {"label_names": list("abcdefghij")}
    files = {name: pickle.dumps(content) for name, content in contents.items()}
    archive = tmp_path / "served" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    def listed(*names):
        return [[name, hashlib.md5(files[name]).hexdigest()] for name in names]

    handler = functools.partial(QuietHandler, directory=archive.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", listed("data_batch_1", "data_batch_2"))
    monkeypatch.setattr(CIFAR10, "test_list", listed("test_batch"))
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": listed("batches.meta")[0][1]})
    yield archive, contents
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_and_read(fake_cifar, tmp_path):
    archive, contents = fake_cifar
    data = Cifar10(root=tmp_path / "data", val_fraction=0.25)
    data.prepare_data()
    archive.unlink()
    data.prepare_data()  # there already: nothing is fetched
    data.setup("fit")
    assert data.describe()["num_images"] == {"train": 30, "val": 10, "test": 10}
    images, labels = next(iter(data.test_dataloader()))
    assert (images.numpy().reshape(10, 3072) == contents["test_batch"]["data"]).all()
    assert labels.tolist() == contents["test_batch"]["labels"]


def test_cifar10_corrupt_download_is_refused(fake_cifar, tmp_path):
    archive, _ = fake_cifar
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"corrupted.*data.root=.*data=digits") as error:
        Cifar10(root=tmp_path / "data").prepare_data()
    assert "\n" not in str(error.value)


def test_cifar10_unreachable(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")  # nothing listens there
    with pytest.raises(UserError, match=r"Connection refused.*data.root=.*data=digits") as error:
        Cifar10(root=tmp_path / "data" / "of mine").prepare_data()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_cifar10_altered_after_download_is_not_unpickled(fake_cifar, tmp_path):
    data = Cifar10(root=tmp_path / "data")
    data.prepare_data()
    (tmp_path / "data" / CIFAR10.base_folder / "data_batch_1").write_bytes(b"evil")
    with pytest.raises(UserError, match="missing or damaged"):
        data.setup("fit")


def test_digits():
    data = Digits()
    data.setup("fit")
    assert data.describe()["num_images"] == {"train": 1293, "val": 144, "test": 360}
    assert data.class_names == [str(digit) for digit in range(10)]
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (144, 3, 32, 32)
    assert torch.bincount(labels, minlength=10).min() >= 13

    train = data.load_train()
    pixels = train[range(len(train))][0] / 255.0
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(data.mean), atol=1e-3, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(data.std), atol=1e-3, rtol=0)


def test_digits_are_the_originals_enlarged():
    grey, digits = load_digits(return_X_y=True)
    data = Digits()
    data.setup("test")
    images, labels = map(torch.cat, zip(*data.test_dataloader(), strict=True))
    # the middle 2×2 of each 4×4 block lies nearest to the original pixel
    small = images[:, 0].unfold(1, 4, 4).unfold(2, 4, 4)[..., 1:3, 1:3].float().mean((-1, -2)) * 16 / 255  # (B, 8, 8)
    distances = torch.cdist(small.flatten(1), torch.from_numpy(grey).float())
    nearest = distances.argmin(1)
    assert len(set(nearest.tolist())) >= 358  # two pairs of digits may look alike
    assert (torch.from_numpy(digits)[nearest] == labels).all()


def batches(data):
    data.setup("fit")
    return [list(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]


def test_imagefolder_streams_what_it_would_cache(make_folder):
    root = make_folder(train=36, test=3, size=20)  # enough files for reading in worker processes
    kinds = [{"cache_budget": 1.0}] + [{"cache_budget": 0, "num_workers": workers} for workers in (0, 2)]
    kinds.append({"cache_budget": 0, "check_images": False})
    expected, *others = [batches(ImageFolder(root=root, image_size=16, batch_size=8, **kind)) for kind in kinds]
    for other in others:
        for expected_split, split in zip(expected, other, strict=True):
            for (images, labels), (same_images, same_labels) in zip(expected_split, split, strict=True):
                assert torch.equal(images, same_images)
                assert torch.equal(labels, same_labels)


def test_imagefolder_pixels_and_labels(make_folder):
    root = make_folder(train=4, test=3)
    data = ImageFolder(root=root, val_fraction=0.25)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    files = [root / "test" / name / f"{number:03}.png" for name in ("cat", "dog") for number in range(3)]
    expected = np.stack([np.asarray(Image.open(file)) for file in files])
    assert (images.permute(0, 2, 3, 1).numpy() == expected).all()
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.describe()["num_images"] == {"test": 6}


@pytest.mark.parametrize(("size", "expected"), [(16, 16), (64, 64), (65, 224)])
def test_imagefolder_size_of_its_own(make_folder, size, expected):
    data = ImageFolder(root=make_folder(train=2, test=1, size=size))
    data.setup("test")
    assert data.image_size == expected


def test_imagefolder_val_folder_is_validation_beside_test(make_folder):
    data = ImageFolder(root=make_folder(train=5, val=3, test=2), val_fraction=0)
    data.setup("fit")
    assert data.describe()["num_images"] == {"train": 10, "val": 6, "test": 4}


def test_imagefolder_val_folder_alone_is_the_test_set(make_folder):
    data = ImageFolder(root=make_folder(train=10, val=3), val_fraction=0.2)
    data.setup("fit")
    assert data.describe()["num_images"] == {"train": 16, "val": 4, "test": 6}


@pytest.mark.parametrize("budget", [1.0, 0.0])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_broken_image_stops_or_is_skipped(make_folder, truncate, budget, split, kind):
    root = make_folder(train=6, test=3, suffix="jpg")
    bad = root / split / "dog" / "001.jpg"
    truncate(bad) if kind == "truncated" else bad.write_bytes(b"text" if kind == "text" else b"")
    settings = {"root": root, "cache_budget": budget, "val_fraction": 0.2}
    with pytest.raises(UserError) as error:
        ImageFolder(**settings).setup("fit")
    assert str(bad) in str(error.value)
    assert "data.on_error=skip" in str(error.value)
    assert "\n" not in str(error.value)

    data = ImageFolder(on_error="skip", **settings)
    data.setup("fit")
    assert data.num_skipped == {"train": int(split == "train"), "test": int(split == "test")}
    left = data.describe()["num_images"]
    assert left["train"] + left["val"] == 12 - data.num_skipped["train"]
    assert left["test"] == 6 - data.num_skipped["test"]
    names = [f"{split}/{name}/{n:03}.jpg" for name in ("cat", "dog") for n in range(6 if split == "train" else 3)]
    kept = [root / name for name in names if root / name != bad]
    whole = data.load_train() if split == "train" else data.load_test()
    expected = np.stack([np.asarray(Image.open(file)) for file in kept])
    assert (whole[range(len(whole))][0].permute(0, 2, 3, 1).numpy() == expected).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_unchecked_broken_image_is_named_where_it_is_met(make_folder, truncate, workers):
    root = make_folder(train=6, test=2, suffix="jpg")
    bad = root / "train" / "cat" / "002.jpg"
    truncate(bad)
    data = ImageFolder(
        root=root, cache_budget=0, check_images=False, num_workers=workers, batch_size=3, val_fraction=0.2
    )
    data.setup("fit")
    with pytest.raises(UserError) as error:
        list(itertools.chain(data.train_dataloader(), data.val_dataloader()))
    assert str(error.value).startswith(f"cannot read image {bad}: ")
    assert "\n" not in str(error.value)


def test_class_without_a_readable_image(make_folder):
    root = make_folder(train=2, test=1)
    for path in (root / "train" / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no image of dog in .* can be read"):
        ImageFolder(root=root, on_error="skip").setup("fit")


def test_cache_is_shared_by_the_splits(make_folder):
    root = make_folder(train=10, test=10)
    room = 30 * 3 * 16 * 16 / 2**30
    data = ImageFolder(root=root, cache_budget=room)
    data.setup("fit")
    assert (data._train.streams, data._test.streams) == (False, True)


def test_imagefolder_says_what_is_missing(make_folder, tmp_path):
    with pytest.raises(UserError, match=r"needs data.root=<folder with train/ and test/ or val/>"):
        ImageFolder()
    with pytest.raises(UserError, match=r"has no folder train/"):
        ImageFolder(root=tmp_path)
    root = make_folder(train=2)
    with pytest.raises(UserError, match=r"neither test/ nor val/"):
        ImageFolder(root=root)
    make_folder(classes=("cat", "emu"), test=1)
    with pytest.raises(UserError, match=r"test has classes that .*train does not: 'emu'"):
        ImageFolder(root=root).setup("test")


def test_imagefolder_without_images(make_folder):
    root = make_folder(train=2, test=0)
    with pytest.raises(UserError, match=r"no images in .*test; extensions read: \.jpg"):
        ImageFolder(root=root).setup("test")
    (root / "train" / "emu").mkdir()
    with pytest.raises(UserError, match=r"no valid file for the classes emu"):
        ImageFolder(root=root).setup("fit")


# CIFAR-10 by somebody else: the right sums, and more than images


def repack(archive, monkeypatch, change):
    """Write the archive anew, each member as ``change(member, content)`` has it, and know it by its new MD5 sum."""
    with tarfile.open(archive) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(archive, "w:gz") as tar:
        for member, content in [pair for old in members for pair in change(*old)]:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, str(target)
    return member


@pytest.mark.parametrize(
    "name", ["../evil", "/evil-of-the-tests", "cifar-10-batches-py/../../evil", "cifar-10-batches-py/evil"]
)
def test_cifar10_strangers_in_the_archive_stay_there(fake_cifar, tmp_path, monkeypatch, name):
    repack(
        fake_cifar[0],
        monkeypatch,
        lambda member, content: [(tarfile.TarInfo(name), b"evil"), (member, content)],
    )
    data = Cifar10(root=tmp_path / "data", val_fraction=0.25)
    data.prepare_data()
    data.setup("fit")
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {CIFAR10.filename, "data_batch_1", "data_batch_2", "test_batch", "batches.meta"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_cifar10_links_in_the_archive_are_refused(fake_cifar, tmp_path, monkeypatch, kind):
    (tmp_path / "outside").write_text("precious")

    def change(member, content):
        if not member.name.endswith("data_batch_1"):
            return [(member, content)]
        return [(link(member.name, tmp_path / "outside", kind), b"")]

    repack(fake_cifar[0], monkeypatch, change)
    with pytest.raises(UserError, match="data_batch_1"):
        Cifar10(root=tmp_path / "data").prepare_data()
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "data" / CIFAR10.base_folder / "data_batch_1").exists()


class MakesFolder:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


def test_cifar10_code_with_the_right_sum_is_not_run(fake_cifar, tmp_path, monkeypatch):
    """MD5 sums can be forged, and lists of them replaced: the reading itself refuses."""
    Cifar10(root=tmp_path / "data").prepare_data()
    content = pickle.dumps({"data": MakesFolder(tmp_path / "owned"), "labels": []})
    (tmp_path / "data" / CIFAR10.base_folder / "test_batch").write_bytes(content)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", hashlib.md5(content).hexdigest()]])
    with pytest.raises(UserError, match=r"it asks for (posix|nt)\.mkdir"):
        Cifar10(root=tmp_path / "data").setup("test")
    assert not (tmp_path / "owned").exists()
    pickle.loads(content)  # noqa: S301  # the payload is a live one
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("labels", [[0, 1, 99], [0], ["x"] * 3])
def test_cifar10_of_other_content_is_refused(fake_cifar, tmp_path, monkeypatch, labels):
    Cifar10(root=tmp_path / "data").prepare_data()
    content = pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": labels})
    (tmp_path / "data" / CIFAR10.base_folder / "test_batch").write_bytes(content)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", hashlib.md5(content).hexdigest()]])
    with pytest.raises(UserError, match="missing or damaged"):
        Cifar10(root=tmp_path / "data").setup("test")
