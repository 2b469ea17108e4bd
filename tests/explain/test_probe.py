"""``look`` against weights worked out from the layer's inputs, with the `entmax` package and a mask by hand."""

import entmax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from vit_attn.explain.probe import default_layers, look, write_masks, write_panels
from vit_attn.models import create_vit

NORMALIZERS = {"softmax": torch.softmax, "sparsemax": entmax.sparsemax, "entmax15": entmax.entmax15}
GRID = 4


class Halve(nn.Module):
    """A normalization that a test can tell from none."""

    def forward(self, images):
        return images.float() / 255 - 0.5


def tiny(attention="entmax15", depth=2, **kwargs):
    torch.manual_seed(0)
    net = create_vit(
        *("vit_tiny_patch16_224",),
        attention=attention,
        **{
            "img_size": 16,
            "patch_size": 4,
            "embed_dim": 16,
            "depth": depth,
            "num_heads": 2,
            "num_classes": 3,
            **kwargs,
        },
    )
    with torch.no_grad():  # scores large enough for some weights to be exactly zero
        for block in net.blocks:
            block.attn.qkv.weight *= 20
    return net


def some_images(count):
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def weights_by_hand(net, images, normalizer, allowed=None):
    """The weights (B, H, N, N) of each layer, from what its qkv puts out."""
    seen = []
    hooks = [block.attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out)) for block in net.blocks]
    net.eval()
    with torch.no_grad():
        net(Halve()(images))
    for hook in hooks:
        hook.remove()
    result = []
    for out in seen:
        q, k, _ = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in out.chunk(3, dim=-1))  # (B, H, N, D)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        result.append(NORMALIZERS[normalizer](scores, dim=-1))
    return result


def distance_by_hand(weights):
    """Mean distance on the grid that the patches look over, for one prefix token."""
    y, x = np.divmod(np.arange(GRID**2), GRID)
    between = np.hypot(y[:, None] - y, x[:, None] - x)
    patches = weights[:, :, 1:, 1:]
    total = patches.sum(-1)
    return ((patches * between).sum(-1)[total > 0] / total[total > 0]).mean()


def strided_by_hand(prefix):
    """Itself, the four before it and its column above, on a 4 x 4 grid; prefix tokens see and are seen by all."""
    size = prefix + GRID**2
    rows, columns = np.indices((size, size)) - prefix
    gap = rows - columns
    allowed = (gap >= 0) & ((gap <= GRID) | (gap % GRID == 0)) | (rows < 0) | (columns < 0)
    return torch.from_numpy(allowed)


CASES = [
    *(("softmax", "softmax", None), ("sparsemax", "sparsemax", None), ("entmax15", "entmax15", None)),
    *(("strided", "softmax", strided_by_hand), ("entmax15+strided", "entmax15", strided_by_hand)),
]


@pytest.mark.parametrize(("spec", "normalizer", "mask"), CASES)
@pytest.mark.parametrize("at_a_time", [1, 3, 7])
def test_statistics_of_every_layer_are_those_of_the_weights(monkeypatch, spec, normalizer, mask, at_a_time):
    net, images = tiny(spec), some_images(7)
    monkeypatch.setattr("vit_attn.explain.probe._MAX_ENTRIES", at_a_time * 2 * 17**2)
    by_hand = weights_by_hand(net, images, normalizer, mask and mask(1))
    seen = look(net, Halve(), images, layers=[])
    assert list(seen.statistics) == [0, 1]
    for layer, weights in enumerate(by_hand):
        weights = weights.double().numpy()
        entropy = -np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1)), 0).sum(-1).mean()
        values = seen.statistics[layer]
        assert values["zeros"] == pytest.approx((weights == 0).mean(), abs=1e-3)
        assert values["support"] == pytest.approx((weights > 0).sum(-1).mean(), abs=0.02)
        assert values["entropy"] == pytest.approx(entropy, abs=1e-4)
        assert values["distance"] == pytest.approx(distance_by_hand(weights), abs=1e-3)
    if mask:
        forbidden = (~mask(1)).float().mean().item()
        assert values["zeros"] >= forbidden - 1e-9
    elif normalizer != "softmax":
        assert values["zeros"] > 0.1  # the case has zeros to count


def test_maps_show_what_the_class_token_sees(monkeypatch):
    net, images = tiny(), some_images(5)
    monkeypatch.setattr("vit_attn.explain.probe._MAX_ENTRIES", 2 * 2 * 17**2)
    by_hand = weights_by_hand(net, images, "entmax15")
    seen = look(net, Halve(), images, layers=[1])
    assert seen.query == "from the class token"
    assert list(seen.maps) == [1]
    torch.testing.assert_close(seen.maps[1], by_hand[1][:, :, 0, 1:].unflatten(-1, (GRID, GRID)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("class_token", [False, True])
def test_maps_of_a_model_that_pools_its_patches_are_the_mean_over_patches(class_token):
    net, images = tiny(class_token=class_token, global_pool="avg"), some_images(3)
    by_hand = weights_by_hand(net, images, "entmax15")
    seen = look(net, Halve(), images, layers=[0, 1])
    assert seen.query == "mean over all patches"
    for layer in (0, 1):
        patches = slice(int(class_token), None)  # what the class token sees, where there is one, no prediction reads
        expected = by_hand[layer][:, :, patches, patches].mean(2).unflatten(-1, (GRID, GRID))
        torch.testing.assert_close(seen.maps[layer], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("bound", "largest"), [(2**26, 32), (5 * 2 * 17**2, 5), (1, 1)])
def test_the_weights_held_at_a_time_are_bounded(monkeypatch, bound, largest):
    monkeypatch.setattr("vit_attn.explain.probe._MAX_ENTRIES", bound)
    net, batches = tiny(), []
    net.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    look(net, Halve(), some_images(40), layers=[])
    assert max(batches) == largest
    assert sum(batches) == 40


def test_looking_leaves_mode_gradients_and_outputs_alone():
    net, images = tiny("softmax", drop_rate=0.5), some_images(2)
    net.train()
    look(net, Halve(), images, layers=[0])
    assert net.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(block.attn.observer is None for block in net.blocks)


def test_metric_names_hold_layers_of_two_digits_and_learned_alphas():
    plain = look(tiny(), Halve(), some_images(1), layers=[]).metrics()
    kinds = ("zeros", "entropy", "support", "distance")
    assert plain.keys() == {f"attention/{kind}/layer_{layer}" for kind in kinds for layer in ("00", "01")}
    net = tiny(["entmax", "softmax"], attention_options={"learnable_alpha": True, "alpha": 1.7})
    learned = look(net, Halve(), some_images(1), layers=[]).metrics()
    assert learned.keys() - plain.keys() == {f"attention/alpha/layer_00/head_{head}" for head in (0, 1)}
    assert learned["attention/alpha/layer_00/head_1"] == pytest.approx(1.7, abs=1e-5)


@pytest.mark.parametrize(("depth", "layers"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (12, [0, 6, 11])])
def test_default_layers_are_first_middle_and_last(depth, layers):
    assert default_layers(tiny(depth=depth, embed_dim=8)) == layers


def test_panels_pair_each_image_with_its_maps_and_caption(tmp_path, monkeypatch):
    drawn = {}

    def draw(pictures, maps, **options):
        drawn.update(pictures=pictures, maps=maps, captions=options["captions"])
        return plt.figure()

    monkeypatch.setattr("vit_attn.explain.probe.attention_panel", draw)
    images = some_images(6)
    seen = look(tiny(), Halve(), images, layers=[1])
    write_panels(seen, images, tmp_path, count=3, note="", captions=list("abcdef"))
    assert drawn["captions"] == ["a", "c", "e"]  # spread evenly
    assert torch.equal(drawn["pictures"], images[[0, 2, 4]].permute(0, 2, 3, 1))
    assert torch.equal(drawn["maps"], seen.maps[1][[0, 2, 4]])


def test_panels_and_masks_are_written_once_per_layer_and_pattern(tmp_path):
    net, images = tiny(["strided", "full", "entmax+strided"], depth=3), some_images(3)
    seen = look(net, Halve(), images, layers=[0, 2])
    paths = write_panels(seen, images, tmp_path, count=2, note="epoch 3", suffix="_test", captions=["a", "b", "c"])
    assert paths == {layer: tmp_path / f"layer_{layer:02d}_test.png" for layer in (0, 2)}
    masks = write_masks(net, tmp_path)
    assert masks == [tmp_path / "mask_full.png", tmp_path / "mask_strided.png"]
    assert sorted(tmp_path.iterdir()) == sorted([*paths.values(), *masks])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
