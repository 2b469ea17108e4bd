"""Explanations of whole models: every method against autograd alone, curves against images changed by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from vit_attn.attention import NORMALIZERS, PATTERNS, entmax15
from vit_attn.explain.curves import random_order
from vit_attn.explain.explanations import METHOD_TITLES, METHODS, Explanations, agreement, explain_images

KINDS = {
    "class token": {},
    "pooled": {"class_token": False, "global_pool": "avg"},
    "pooled beside a class token": {"global_pool": "avg"},
    "registers, not square": {"reg_tokens": 2, "img_size": (16, 24)},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
}


def softmax(logits):
    return logits.softmax(1)


def explain(net, halve, images, **kwargs):
    return explain_images(net, halve, softmax, images, torch.arange(len(images)) % 3, **kwargs)


def maps_by_hand(net, images):
    """Attention, rollout and gradient × attention of the predicted class, from timm's own dense attention."""
    for block in net.blocks:
        block.attn.fused_attn = False  # the weights then pass through attn_drop
    kept = []
    hooks = [block.attn.attn_drop.register_forward_hook(lambda m, args, out: kept.append(out)) for block in net.blocks]
    logits = net(images.clone().requires_grad_())
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(logits.max(1).values.sum(), kept)
    eye = torch.eye(kept[0].shape[-1])
    rolled, relevance = eye, eye
    for weights, gradient in zip(kept, gradients, strict=True):
        rolled = (0.5 * weights.detach().mean(1) + 0.5 * eye) @ rolled
        relevance = relevance + (weights.detach() * gradient).clamp(min=0).mean(1) @ relevance
    prefix = net.num_prefix_tokens
    reads = net.has_class_token and net.global_pool == "token"

    def lay_out(tokens):
        rows = tokens[:, :1] if reads else tokens[:, prefix:]
        return rows[:, :, prefix:].mean(1).unflatten(1, net.patch_embed.grid_size).numpy()

    return {
        "attention": lay_out(kept[-1].detach().mean(1)),
        "rollout": lay_out(rolled),
        "gradient_attention": lay_out(relevance - eye),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["softmax", "entmax15+sliding_window"])
def test_maps_are_those_of_timms_attention(make_net, make_images, halve, kind, spec):
    net = make_net(spec, **KINDS[kind])
    images = make_images(3, *net.patch_embed.img_size)
    found = explain(net, halve, images)
    for method, expected in maps_by_hand(net, halve(images)).items():
        np.testing.assert_allclose(found.maps[method], expected, rtol=2e-3, atol=1e-5 * expected.max(), err_msg=method)
        assert np.ptp(expected, axis=(1, 2)).min() > 0
    assert found.maps.keys() == METHOD_TITLES.keys() == set(METHODS)
    logits = net(halve(images)).detach()
    np.testing.assert_array_equal(found.predictions, logits.argmax(1))
    np.testing.assert_allclose(found.confidences, logits.softmax(1).max(1).values, rtol=1e-5)
    np.testing.assert_array_equal(found.images, images.permute(0, 2, 3, 1))
    np.testing.assert_array_equal(found.labels, [0, 1, 2])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_mechanism_is_explained(make_net, make_images, halve, normalizer, pattern):
    options = {"learnable_alpha": True} if normalizer == "entmax" else {}
    net = make_net(f"{normalizer}+{pattern}", attention_options=options)
    found = explain(net, halve, make_images(1))
    for method, values in found.maps.items():
        assert values.shape == (1, 4, 4), method
        assert np.isfinite(values).all(), method
    assert {curve.shape for curve in [*found.deletion.values(), *found.insertion.values()]} == {(1, 17)}
    assert all(np.isfinite(curve).all() for curve in [*found.deletion.values(), *found.insertion.values()])


def test_curves_are_those_of_images_changed_by_hand(make_net, make_images, halve):
    net, images = make_net("strided", img_size=(16, 24)), make_images(2, 16, 24)
    found = explain_images(net, halve, entmax15, images, torch.zeros(2, dtype=torch.int64), seed=5)
    order = random_order(2, 24, seed=5)
    for image in range(2):
        changed = halve(images)[image].clone()
        curve = []
        for step in range(17):
            for patch in order[image][: round(step * 24 / 16)]:
                y, x = divmod(int(patch), 6)
                changed[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 0
            curve.append(entmax15(net(changed[None]).detach())[0, found.predictions[image]].item())
        np.testing.assert_allclose(found.deletion["random"][image], curve, atol=1e-5)
    for method in METHODS:
        np.testing.assert_allclose(found.deletion[method][:, 0], found.confidences, atol=1e-6)
        np.testing.assert_allclose(found.insertion[method][:, -1], found.confidences, atol=1e-6)


def test_batches_change_nothing(make_net, make_images, halve, monkeypatch):
    net, images = make_net("entmax15"), make_images(3)
    whole = explain(net, halve, images)
    sizes = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr("vit_attn.explain.explanations._MAX_ENTRIES", 2 * 2 * 2 * 17**2)  # two images at a time
    parts = explain(net, halve, images)
    assert max(sizes) <= 8
    for method in METHODS:
        np.testing.assert_allclose(parts.maps[method], whole.maps[method], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(parts.predictions, whole.predictions)


def test_a_compiled_training_network_is_left_as_it_was(make_net, make_images, halve):
    net, images = make_net("entmax15+strided", drop_rate=0.5), make_images(2)
    expected = explain(net, halve, images)
    net.train().compile()
    net.head.bias.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    with torch.inference_mode():
        found = explain(net, halve, images)
    for method in METHODS:
        np.testing.assert_allclose(found.maps[method], expected.maps[method], rtol=1e-4, atol=1e-7)
    assert all(module.training for module in net.modules())
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["head.weight"]
    assert (net.head.weight.grad == 1).all()
    assert all(block.attn.observer is None for block in net.blocks)


def test_no_images_are_refused(make_net, make_images, halve):
    with pytest.raises(ValueError, match="no images"):
        explain(make_net(), halve, make_images(0))


@pytest.fixture
def found(make_net, make_images, halve):
    return explain(make_net("strided"), halve, make_images(3))


def test_summary_holds_mean_areas(found):
    summary = found.summary()
    assert summary["images"] == 3
    assert list(summary["methods"]) == [*METHODS, "random"]
    curve = found.insertion["gradcam"].mean(0).astype(float)
    by_hand = sum((a + b) / 2 for a, b in pairwise(curve)) / 16
    assert summary["methods"]["gradcam"]["insertion_auc"] == pytest.approx(by_hand, rel=1e-6)


def test_what_is_saved_is_loaded(found, tmp_path):
    path = found.save(tmp_path / "new" / "explanations.npz")
    again = Explanations.load(path)
    assert list(path.parent.iterdir()) == [path]
    for name in ("images", "labels", "predictions", "confidences"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    for name in ("maps", "deletion", "insertion"):
        assert list(getattr(again, name)) == list(getattr(found, name))
        for key, values in getattr(found, name).items():
            np.testing.assert_array_equal(getattr(again, name)[key], values)
            assert values.dtype == np.float32


def spoil(kind, path):
    content = dict(np.load(path))
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "flipped":
        path.write_bytes(path.read_bytes().replace(b"\x00\x00\x00\x00", b"\x00\xff\x00\x00"))
    elif kind == "text":
        path.write_text("nothing of the kind")
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "missing":
        del content["maps/rollout"]
        np.savez(path, **content)
    elif kind == "shapes":
        np.savez(path, **content | {"maps/rollout": np.zeros((2, 4, 4), np.float32)})
    elif kind == "pickle":
        np.savez(path, **content | {"labels": np.array([{}, {}, {}], dtype=object)})


@pytest.mark.parametrize("kind", ["cut", "flipped", "text", "array", "missing", "shapes", "pickle"])
def test_a_broken_file_is_refused(found, tmp_path, kind):
    path = found.save(tmp_path / "explanations.npz")
    spoil(kind, path)
    with pytest.raises(ValueError, match=r"explanations\.npz: (broken|its arrays)"):
        Explanations.load(path)


def test_a_missing_file_is_no_broken_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        Explanations.load(tmp_path / "none.npz")


def test_agreement_is_the_mean_rank_correlation(make_net, make_images, halve, found):
    other = explain(make_net("softmax"), halve, make_images(3))
    values = agreement(found, other)
    for method in METHODS:
        pairs = zip(found.maps[method], other.maps[method], strict=True)
        # Spearman's is Pearson's correlation of the ranks.
        by_hand = [np.corrcoef(rankdata(a), rankdata(b))[0, 1] for a, b in pairs]
        assert values[method] == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert agreement(found, found) == pytest.approx(dict.fromkeys(METHODS, 1.0))


def test_constant_maps_have_no_order_and_are_left_out(found):
    flat = {**found.maps, "gradcam": np.zeros_like(found.maps["gradcam"]), "rollout": found.maps["rollout"].copy()}
    flat["rollout"][0] = 0.5
    other = Explanations(**{**vars(found), "maps": flat})
    values = agreement(found, other)
    assert np.isnan(values["gradcam"])
    assert values["rollout"] == pytest.approx(1.0)


def test_other_images_and_grids_do_not_compare(make_net, make_images, halve, found):
    other = Explanations(**{**vars(found), "images": found.images[::-1]})
    with pytest.raises(ValueError, match="different images"):
        agreement(found, other)
    coarse = explain(make_net("softmax", patch_size=8), halve, make_images(3))
    with pytest.raises(ValueError, match="different patch grids, 4x4 and 2x2"):
        agreement(found, coarse)
