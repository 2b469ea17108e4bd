"""Tiny networks and images that the tests of this folder share."""

from typing import Any

import pytest
import torch
from torch import nn

from vit_attn.models import create_vit


class Halve(nn.Module):
    """A normalization that a test can tell from none."""

    def forward(self, images):
        return images.float() / 255 - 0.5


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Networks this small spend more time on handing work to threads than on the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _make(attention="entmax15", name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    net = create_vit(name, attention=attention, **{**sizes, **kwargs})
    with torch.no_grad():  # scores large enough for some weights to be exactly zero, and classes that differ
        for block in net.blocks:
            block.attn.qkv.weight *= 20
            block.mlp.fc2.weight *= 5
        net.head.weight.normal_()
    return net.eval()


@pytest.fixture
def make_net() -> Any:
    """``make_net(attention, name=, **timm_kwargs)``: two layers over 4 x 4 patches and 3 classes."""
    return _make


@pytest.fixture
def halve() -> nn.Module:
    return Halve()


@pytest.fixture
def make_images() -> Any:
    """``make_images(count, height, width)``: uint8 (count, 3, height, width)."""

    def make(count, height=16, width=16):
        generator = torch.Generator().manual_seed(1)
        return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator)

    return make
