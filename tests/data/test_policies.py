"""Policies against torchvision's: the same draws, the same pixels."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vit_attn.data.policies import AutoAugment, RandAugment, sharpen

POLICIES = [
    (RandAugment, v2.RandAugment, (2, 9)),
    (RandAugment, v2.RandAugment, (3, 30)),
    (AutoAugment, v2.AutoAugment, (v2.AutoAugmentPolicy.CIFAR10,)),
    (AutoAugment, v2.AutoAugment, (v2.AutoAugmentPolicy.IMAGENET,)),
]


@pytest.mark.parametrize("shape", [(12, 12), (33, 20), (2, 2)])
@pytest.mark.parametrize(("mine", "theirs", "arguments"), POLICIES)
def test_policies_are_torchvisions_bit_for_bit(mine, theirs, arguments, shape):
    images = torch.randint(0, 256, (4, 3, *shape), dtype=torch.uint8)
    before = images.clone()
    mine, theirs = mine(*arguments), theirs(*arguments)
    for seed in range(150):
        torch.manual_seed(seed)
        expected, rest = theirs(images), torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(mine(images), expected), seed
        assert torch.equal(torch.rand(1), rest), "drew more, or less"
    assert torch.equal(images, before)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.73, 1.0, 1.27, 1.9])
def test_sharpening_is_torchvisions_bit_for_bit(factor):
    images = torch.randint(0, 256, (8, 3, 40, 31), dtype=torch.uint8)
    images[0] = 255
    assert torch.equal(sharpen(images, factor), F.adjust_sharpness(images, factor))
