"""``python -m vit_attn.bench data``: all loaders deliver the same images, and the command says what it found."""

import json

import pytest
import torch

from vit_attn.bench import data as suite
from vit_attn.bench.data import Setting, make_folder, our_batches, torchvision_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), images=48, size=48, seed=0)


@pytest.fixture
def plain_pixels(monkeypatch):
    """Leave the random changes out, so that images can be compared."""
    settings = {"crop": "none", "flip": False}
    imagefolder = suite.imagefolder.ImageFolder
    monkeypatch.setattr(
        suite.imagefolder, "ImageFolder", lambda augment, **rest: imagefolder(augment={**augment, **settings}, **rest)
    )
    for name in ("RandomCrop", "RandomHorizontalFlip"):
        monkeypatch.setattr(suite.v2, name, lambda *args, **kwargs: torch.nn.Identity())


def epoch(batches):
    images, labels = zip(*batches(), strict=True)
    return torch.cat(images), torch.cat(labels)


def all_loaders(setting):
    ours = [our_batches(setting, in_memory=memory) for memory in (True, False)]
    return ours + [torchvision_batches(setting, pil=pil) for pil in (True, False)]


def test_all_loaders_deliver_the_same_images_and_labels(folder, plain_pixels):
    # 43 training images in one batch: none of them sits the epoch out
    setting = Setting(folder, size=32, policy="none", batch_size=43, workers=1, seed=0)
    found = []
    for batches in all_loaders(setting):
        images, labels = epoch(batches)
        assert (images.dtype, images.shape) == (torch.float32, (43, 3, 32, 32))
        found.append((images, labels))
    images, labels = found[0]
    for others, their_labels in found[1:]:
        partner = torch.cdist(images.flatten(1), others.flatten(1)).argmin(1)
        assert len(partner.unique()) == 43
        assert torch.equal(labels, their_labels[partner])
        # A grey level is 4/255: PIL's and torch's resizing round differently.
        torch.testing.assert_close(images, others[partner], atol=3 * 4 / 255, rtol=0)


@pytest.mark.parametrize("policy", ["none", "rand_augment"])
def test_augmented_pixels_have_the_same_statistics(folder, policy):
    setting = Setting(folder, size=32, policy=policy, batch_size=16, workers=1, seed=0)
    torch.manual_seed(0)
    seen = []
    for batches in all_loaders(setting):
        images = torch.cat([epoch(batches)[0] for _ in range(6)])
        assert len(images) == 6 * 32
        seen.append((images.mean().item(), images.std().item()))
    # A group of eight images shares a draw here, hence the width.
    width = 0.05 if policy == "none" else 0.35
    for mean, std in seen[1:]:
        assert mean == pytest.approx(seen[0][0], abs=width)
        assert std == pytest.approx(seen[0][1], abs=width)


def test_pictures_follow_the_seed(tmp_path):
    def content(name, seed):
        root = make_folder(tmp_path / name, images=4, size=16, seed=seed)
        return [path.read_bytes() for path in sorted(root.rglob("*.jpg"))]

    assert len(content("a", 1)) == 8
    assert content("a", 1) == content("b", 1) != content("c", 2)


def test_the_command_measures_and_judges(bench, tmp_path):
    found = bench("data", "--quick", "--rounds", "1", "--augment", "default", "--json", str(tmp_path / "d.json"))
    assert found.status == 0, found.err
    rows = json.loads((tmp_path / "d.json").read_text())["tables"][0]["rows"]
    assert [row["loader"] for row in rows] == ["torchvision, PIL", "torchvision, tensors", "memory", "stream"]
    rival = min(row["seconds"][row["loader"]][0] for row in rows[:2])
    for row, target in zip(rows[2:], (10, 1), strict=True):
        (seconds,) = row["seconds"][row["loader"]]
        assert row["speed"]["median"] == pytest.approx(48 / seconds)  # 57 for training: three batches of 16
        assert row["times rival"]["median"] == pytest.approx(rival / seconds)
        assert row["target"] == target
        assert row["met"] == ("yes" if rival / seconds >= target else "no")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--root", "/nowhere"], "/nowhere"),
        (["--sizes", "32,large"], "large"),
        (["--augment", "rand_augmnt"], "rand_augment"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(bench, arguments, named):
    found = bench("data", "--quick", *arguments)
    assert found.status == 2
    assert named in found.err
    assert len([line for line in found.err.splitlines() if not line.startswith("measuring")]) == 1
