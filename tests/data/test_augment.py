"""Augmentation against plain slicing, its randomness, its targets and its option names."""

import random

import numpy as np
import pytest
import torch

from vit_attn.data import Augment, Normalize
from vit_attn.data.augment import flip, pad_crop
from vit_attn.errors import UserError


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(1, 256, (24, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return images, torch.arange(24) % 5


def augment(**options):
    return Augment(num_classes=5, image_size=12, **{"crop": "none", "flip": False, **options})


def test_pad_crop_takes_windows_of_the_zero_padded_images(batch):
    images, _ = batch
    cropped = pad_crop(images, 2).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    places = []
    for number in range(24):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (padded[number, :, top : top + 12, left : left + 12] == cropped[number]).all()
        ]
        assert len(found) == 1
        places += found
    assert len(set(places)) > 5, "one place for the whole batch"
    assert {top for top, _ in places} == {left for _, left in places} == set(range(5))


def test_flip_mirrors_about_half_of_the_images(batch):
    images, _ = batch
    flipped = flip(images).numpy()
    mirrored = [(new == old[:, :, ::-1]).all() for new, old in zip(flipped, images.numpy(), strict=True)]
    kept = [(new == old).all() for new, old in zip(flipped, images.numpy(), strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 4 <= sum(mirrored) <= 20


RECIPES = [
    {"crop": "pad", "flip": True},
    {"crop": "resized"},
    {"policy": "rand_augment"},
    {"policy": "auto_augment"},
    {"erasing": 0.5},
    {"mixup": 0.8},
    {"cutmix": 1.0},
    {"mixup": 0.8, "cutmix": 1.0},
]


@pytest.mark.parametrize("options", RECIPES, ids=str)
def test_all_randomness_is_torchs_global_seed(batch, options):
    module = augment(**options)

    def run(seed, other):
        torch.manual_seed(seed)
        random.seed(other)
        np.random.seed(other)
        return module(*batch)

    first, again = run(1, other=1), run(1, other=2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert any(not torch.equal(first[0], run(seed, other=1)[0]) for seed in (2, 3, 4))
    assert first[0].shape == batch[0].shape


@pytest.mark.parametrize("options", RECIPES, ids=str)
def test_each_processs_share_comes_out_as_it_does_in_the_whole_batch(batch, options, monkeypatch):
    module = augment(**options, group_size=5)  # groups that reach over the ends of the shares
    torch.manual_seed(3)
    images, targets = module(*batch)
    told, now = {}, {}

    def all_gather(found, mine):
        now["call"] += 1
        told[now["call"], now["rank"]] = mine.clone()
        for rank, place in enumerate(found):
            place.copy_(told.get((now["call"], rank), mine))

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    for _ in range(2):  # in the first round, each process only tells the others
        shares = []
        for rank in range(3):
            now |= {"rank": rank, "call": 0}
            torch.manual_seed(3)
            share = slice(8 * rank, 8 * rank + 8)
            shares.append(module(batch[0][share], batch[1][share], rank=rank, world_size=3))
    assert torch.equal(torch.cat([share[0] for share in shares]), images)
    torch.testing.assert_close(torch.cat([share[1] for share in shares]), targets)
    assert not torch.equal(images, batch[0])


def test_input_is_left_as_it_was(batch):
    before = batch[0].clone(), batch[1].clone()
    augment(crop="pad", flip=True, policy="rand_augment", erasing=0.5, mixup=0.5, cutmix=0.5)(*batch)
    assert torch.equal(batch[0], before[0])
    assert torch.equal(batch[1], before[1])


def test_groups_draw_for_themselves():
    same = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8).expand(16, -1, -1, -1)
    torch.manual_seed(0)
    images, _ = augment(crop="resized", group_size=4)(same, torch.zeros(16, dtype=torch.int64))
    groups = images.split(4)
    assert all((group == group[0]).all() for group in groups)
    assert len({group[0].numpy().tobytes() for group in groups}) == 4


def test_erased_rectangles_have_the_mean_colour(batch):
    module = Augment(num_classes=5, image_size=12, mean=(0.2, 0.4, 0.6), crop="none", flip=False, erasing=1.0)
    images, _ = module(*batch)
    changed = (images != batch[0]).any(1)  # (B, H, W)
    assert changed.flatten(1).any(1).all()
    colours = images.permute(0, 2, 3, 1)[changed]
    assert (colours == torch.tensor([51, 102, 153])).all()


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
def test_mixing_gives_soft_targets_that_sum_to_one(batch, options):
    for seed in range(5):
        torch.manual_seed(seed)
        images, targets = augment(**options)(*batch)
        assert targets.shape == (24, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(24))
        assert images.min() >= 0
        assert images.max() <= 255


def test_mixup_blends_pixels_as_it_blends_targets():
    images = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    mixed, targets = Augment(num_classes=2, image_size=4, crop="none", flip=False, mixup=1.0)(
        images, torch.tensor([0, 1])
    )
    torch.testing.assert_close(mixed[:, 0, 0, 0], 200 * targets[:, 1])


def test_nothing_to_do_and_eval_mode_change_nothing(batch):
    for module in (augment(), augment(crop="pad", flip=True, mixup=1.0).eval()):
        images, targets = module(*batch)
        assert torch.equal(images, batch[0])
        assert torch.equal(targets, batch[1])


def test_normalize_is_the_textbook_formula(batch):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = (batch[0].numpy() / 255.0 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    for images in (batch[0], batch[0].float()):
        normal = Normalize(mean, std)(images)
        assert normal.dtype == torch.float32
        np.testing.assert_allclose(normal.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not Normalize(mean, std).state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixpu": 1.0}, "unknown option of data.augment 'mixpu'. Did you mean 'mixup'?"),
        ({"crop": "padd"}, "unknown data.augment.crop 'padd'. Did you mean 'pad'?"),
        ({"policy": "randaugment"}, "Did you mean 'rand_augment'?"),
        ({"crop_padding": -1}, "data.augment.crop_padding must be a whole number of at least 0, not -1"),
        ({"rand_augment_magnitude": 31}, "must be a whole number from 0 to 30, not 31"),
        ({"erasing": 1.5}, "data.augment.erasing must be a number from 0 to 1, not 1.5"),
        ({"mixup": "a lot"}, "data.augment.mixup must be a number of at least 0, not 'a lot'"),
        ({"flip": "yes"}, "data.augment.flip must be true or false, not 'yes'"),
        ({"crop_scale": 0.5}, "data.augment.crop_scale must be"),
        ({"crop_scale": [0.5, 2]}, "data.augment.crop_scale must be"),
        ({"group_size": 0}, "data.augment.group_size must be a whole number of at least 1, not 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError) as error:
        Augment(num_classes=5, image_size=12, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_photographs_are_cropped_and_flipped_as_small_images_are(monkeypatch):
    images = torch.randint(0, 256, (20, 3, 70, 66), dtype=torch.uint8)
    for change in (lambda: pad_crop(images, 3), lambda: flip(images)):
        torch.manual_seed(1)
        one_by_one = change()
        with monkeypatch.context() as patch:
            patch.setattr("vit_attn.data.augment._PHOTOGRAPH", float("inf"))
            torch.manual_seed(1)
            assert torch.equal(change(), one_by_one)
        assert not torch.equal(images, one_by_one)
