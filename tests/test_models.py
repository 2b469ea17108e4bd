"""create_vit(): stock timm under softmax, patterns over the right grid, weights of any source, refusals by name."""

import math
import os
import pickle
import socket
import urllib.request

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vit_attn.attention import attention_layers, make_pattern, observe_attention
from vit_attn.errors import UserError
from vit_attn.models import create_vit

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
HYBRID = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
# What is special about each: prefix tokens, pooling, norms, blocks, stem. All fit in a few milliseconds.
VARIANTS = {
    "vit_tiny_patch16_224": TINY,
    "test_vit": TINY,  # dynamic_img_size
    "test_vit3": TINY,  # a register, no class token, attention pooling
    "test_vit4": TINY,  # RMS norm
    "deit_tiny_distilled_patch16_224": TINY,  # two prefix tokens, two heads
    "deit3_small_patch16_224": TINY,  # layer scale, no position for the class token
    "vit_base_patch14_reg4_dinov2": TINY,  # class token and four registers
    "vit_medium_patch16_gap_240": TINY,  # no prefix token
    "vit_base_patch16_siglip_224": TINY,  # attention pooling
    "vit_xsmall_patch16_clip_224": TINY,  # pre-norm
    "vit_base_patch16_rpn_224": TINY,  # residual post-norm blocks
    "beit3_base_patch16_224": TINY,  # norm of the attention's output
    "aimv2_large_patch14_224": TINY,  # SwiGLU
    "flexivit_small": TINY,
    "vit_tiny_r_s16_p8_224": HYBRID,  # convolutional stem
}
NAME = "vit_tiny_patch16_224"
every_variant = pytest.mark.parametrize(("name", "kwargs"), VARIANTS.items(), ids=VARIANTS)


def seeded(create, name: str, seed: int = 0, **kwargs) -> VisionTransformer:
    torch.manual_seed(seed)
    return create(name, **kwargs).eval()


def images(height: int = 32, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def look(model: VisionTransformer, x: Tensor) -> dict[int, Tensor]:
    seen: dict[int, Tensor] = {}
    with observe_attention(model, seen.__setitem__), torch.no_grad():
        model(x)
    return seen


def assert_same_tensors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    assert [name for name in got if not torch.equal(got[name], wanted[name])] == []


@pytest.fixture
def offline(monkeypatch):
    """Neither a network nor a cache, whatever this machine has."""

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)


# What comes out


@every_variant
def test_softmax_is_stock_timm_bit_for_bit_from_the_same_seed(name, kwargs):
    stock, swapped = seeded(timm.create_model, name, **kwargs), seeded(create_vit, name, **kwargs)
    assert type(swapped) is type(stock)
    assert len(attention_layers(swapped)) == kwargs["depth"]
    assert_same_tensors(swapped.state_dict(), stock.state_dict())
    x = images(kwargs["img_size"])
    assert torch.equal(swapped(x), stock(x))
    assert torch.equal(swapped.forward_features(x), stock.forward_features(x))
    torch.manual_seed(2)
    wanted = stock.train()(x)
    torch.manual_seed(2)
    assert torch.equal(torch.stack([*swapped.train()(x)]), torch.stack([*wanted]))


@every_variant
@pytest.mark.parametrize("spec", ["strided", "entmax+sliding_window"])
def test_a_pattern_forbids_exactly_what_it_should_in_every_layer(name, kwargs, spec):
    model = seeded(create_vit, name, attention=spec, **kwargs)
    assert_same_tensors(model.state_dict(), seeded(timm.create_model, name, **kwargs).state_dict())
    height, width = model.patch_embed.grid_size
    prefix = model.num_prefix_tokens
    pattern = spec.split("+")[-1]
    allowed = make_pattern(pattern, num_tokens=height * width, num_prefix_tokens=prefix, window=width).allowed()
    weights = look(model, images(kwargs["img_size"]))
    assert list(weights) == [0, 1]
    for seen in weights.values():
        assert (seen[..., ~allowed] == 0).all()
        assert (seen[..., allowed] > 0).all() or spec.startswith("entmax")
        torch.testing.assert_close(seen.sum(-1), torch.ones(seen.shape[:-1]))


def test_dropout_and_drop_path_stay_those_of_timm():
    kwargs = {**TINY, "drop_rate": 0.1, "drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.2}
    stock, swapped = seeded(timm.create_model, NAME, **kwargs).train(), seeded(create_vit, NAME, **kwargs).train()
    torch.manual_seed(2)
    wanted = stock(images())
    torch.manual_seed(2)
    assert torch.equal(swapped(images()), wanted)


def test_a_list_of_specs_cycles_through_the_depth():
    model = create_vit(NAME, attention=["strided", "entmax", "full"], **TINY | {"depth": 7})
    specs = ["softmax+strided", "entmax+full", "softmax+full"]
    assert [str(layer.mechanism) for layer in attention_layers(model)] == (3 * specs)[:7]
    weights = look(model.eval(), images())
    assert [bool((seen[..., 1, 2:] == 0).all()) for seen in weights.values()] == [True, False, False] * 2 + [True]


def test_options_reach_every_layer():
    options = {"alpha": 1.7, "learnable_alpha": True, "window": 2, "causal": False}
    model = create_vit(NAME, attention="entmax+fixed", attention_options=options, **TINY)
    expected = make_pattern("fixed", num_tokens=16, num_prefix_tokens=1, window=2, causal=False)
    for layer in attention_layers(model):
        assert layer.pattern() == expected
        torch.testing.assert_close(layer.core.normalizer.number(), torch.full((3,), 1.7))
    extra = [name for name, _ in model.named_parameters() if name not in timm.create_model(NAME, **TINY).state_dict()]
    assert extra == [f"blocks.{layer}.attn.core.normalizer.alpha_logit" for layer in (0, 1)]


# Positions


@pytest.mark.parametrize("size", [(48, 48), (16, 48), (48, 32)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spec", ["strided", "softmax"])
def test_the_pattern_follows_set_input_size(size, dynamic, spec):
    model = seeded(create_vit, NAME, attention=spec, dynamic_img_size=dynamic, **TINY)
    stock = seeded(timm.create_model, NAME, dynamic_img_size=dynamic, **TINY)
    model(images())
    for changed in (model, stock):
        changed.set_input_size(img_size=size)
    grid = size[0] // 8, size[1] // 8
    expected = make_pattern(
        "full" if spec == "softmax" else spec, num_tokens=math.prod(grid), num_prefix_tokens=1, grid_size=grid
    )
    for seen in look(model, images(*size)).values():
        assert torch.equal(seen.amin(dim=(0, 1)) > 0, expected.allowed())
    assert attention_layers(model)[0].pattern() == expected
    if spec == "softmax":
        assert torch.equal(model(images(*size)), stock(images(*size)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_pattern_is_that_of_the_new_grid_before_the_next_forward(dynamic):
    model = create_vit(NAME, attention="strided", dynamic_img_size=dynamic, **TINY)
    model.set_input_size(img_size=48)
    assert attention_layers(model)[0].pattern() == make_pattern("strided", num_tokens=36, num_prefix_tokens=1)


def test_the_pattern_follows_a_change_of_patch_size():
    model = create_vit(NAME, attention="strided", **TINY)
    model.set_input_size(patch_size=4)
    assert attention_layers(model)[0].pattern() == make_pattern("strided", num_tokens=64, num_prefix_tokens=1)


@pytest.mark.parametrize("name", [NAME, "test_vit3", "vit_base_patch14_reg4_dinov2", "vit_tiny_r_s16_p8_224"])
def test_the_pattern_follows_every_image_where_the_size_is_dynamic(name):
    kwargs = VARIANTS[name]
    model = seeded(create_vit, name, attention="strided", dynamic_img_size=True, **kwargs)
    stock = seeded(timm.create_model, name, dynamic_img_size=True, **kwargs)
    soft = seeded(create_vit, name, dynamic_img_size=True, **kwargs)
    side = kwargs["img_size"] // model.patch_embed.grid_size[0]  # pixels per patch
    for height, width in ((4, 4), (2, 5), (5, 2), (4, 4)):
        x = images(side * height, side * width)
        grid = {"num_tokens": height * width, "grid_size": (height, width)}
        expected = make_pattern("strided", num_prefix_tokens=model.num_prefix_tokens, **grid).allowed()
        for seen in look(model, x).values():
            assert torch.equal(seen.amin(dim=(0, 1)) > 0, expected)
        assert torch.equal(soft(x), stock(x))


@pytest.mark.parametrize("spec", ["strided", "entmax+causal", ["softmax", "fixed"]])
def test_patch_dropout_is_refused_with_a_pattern(spec):
    with pytest.raises(UserError, match="patch_drop_rate"):
        create_vit(NAME, attention=spec, patch_drop_rate=0.25, **TINY)


@pytest.mark.parametrize("spec", ["softmax", "entmax15"])
def test_patch_dropout_works_over_all_keys(spec):
    model = seeded(create_vit, NAME, attention=spec, patch_drop_rate=0.25, **TINY).train()
    assert {seen.shape[-1] for seen in look(model, images()).values()} == {1 + 12}


def test_causal_attention_of_a_full_pattern_is_refused_with_patch_dropout():
    with pytest.raises(UserError, match="patch_drop_rate"):
        create_vit(NAME, attention="full", attention_options={"causal": True}, patch_drop_rate=0.25, **TINY)


# Position embedding


def sine_cosine(height: int, width: int, dim: int) -> np.ndarray:
    """The 2-D embedding of MoCo v3: a quarter each of sin y, sin x, cos y, cos x, wavelengths 2π to 10000 · 2π."""
    table = np.zeros((height, width, dim))
    quarter = dim // 4
    for y in range(height):
        for x in range(width):
            for band in range(quarter):
                omega = 10000 ** (-band / quarter)
                angles = math.sin(y * omega), math.sin(x * omega), math.cos(y * omega), math.cos(x * omega)
                table[y, x, band::quarter] = angles
    return table.reshape(height * width, dim)


@pytest.mark.parametrize(("size", "grid"), [(32, (4, 4)), ((16, 40), (2, 5))])
@pytest.mark.parametrize(
    ("name", "prefix"),
    [(NAME, 1), ("deit_tiny_distilled_patch16_224", 2), ("deit3_small_patch16_224", 0), ("test_vit3", 1)],
)
def test_sinusoidal_positions_are_the_formula_and_are_not_trained(name, prefix, size, grid):
    model = create_vit(name, attention="strided", pos_embed="sinusoidal", **TINY | {"img_size": size})
    assert model.pos_embed.shape == (1, prefix + math.prod(grid), 24)
    assert (model.pos_embed[:, :prefix] == 0).all()
    np.testing.assert_allclose(model.pos_embed[0, prefix:].detach(), sine_cosine(*grid, 24), atol=1e-6)
    assert model.pos_embed.requires_grad is False
    before = model.pos_embed.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    torch.stack([*model(images(16, 40) if size != 32 else images())]).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.pos_embed, before)
    model.set_input_size(img_size=48)
    assert model.pos_embed.requires_grad is False


def test_no_positions_is_timm_s_own():
    model = seeded(create_vit, NAME, pos_embed="none", **TINY)
    assert model.pos_embed is None
    assert torch.equal(model(images()), seeded(timm.create_model, NAME, pos_embed="none", **TINY)(images()))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"pos_embed": "sinus"}, "unknown model.pos_embed 'sinus'. Did you mean 'sinusoidal'?"),
        ({"pos_embed": "sinusoidal", "embed_dim": 30}, "embed_dim divisible by 4, not 30"),
    ],
)
def test_wrong_positions_are_refused(kwargs, said):
    with pytest.raises(UserError, match=said):
        create_vit(NAME, **TINY | kwargs)


# Refusals


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("eva02_tiny_patch14_224", "Eva"),
        ("beit_base_patch16_224", "Beit"),
        ("pit_ti_224", "PoolingVisionTransformer"),
        ("crossvit_tiny_240", "CrossVit"),
        ("xcit_nano_12_p16_224", "Xcit"),
        ("mobilevit_xxs", "ByobNet"),
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_dlittle_patch16_reg1_gap_256", "DiffAttention"),
        ("vit_small_patch16_rope_224", "Eva"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("naflexvit_base_patch16_gap", "NaFlexVit"),
        ("resnet18", "ResNet"),
    ],
)
def test_a_model_whose_attention_cannot_be_swapped_is_refused_by_name(name, why):
    with torch.device("meta"):
        for kwargs in ({}, {"img_size": 32, "patch_size": 4, "embed_dim": 240}):
            with pytest.raises(UserError, match=f"^model {name}: its attention cannot be swapped: .*{why}") as error:
                create_vit(name, attention="strided", **kwargs)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_tny_patch16_224", "unknown model.name 'vit_tny_patch16_224'. Did you mean 'vit_tiny_patch16_224'?"),
        ("deit_tini_patch16_224", "Did you mean 'deit_tiny_patch16_224'?"),
        ("qqq", "unknown model.name 'qqq'"),
        ("vit_tiny_patch16_224.nope", "vit_tiny_patch16_224.nope: Invalid pretrained tag"),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_an_unknown_model_is_refused_with_the_nearest_name(name, said, pretrained, offline):
    with pytest.raises(UserError, match=said) as error:
        create_vit(name, pretrained=pretrained)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"attention": "strdied"}, "Did you mean 'strided'?"),
        ({"attention_options": {"windw": 3}}, "Did you mean 'window'?"),
        ({"attention": "strided", "attention_options": {"window": 0}}, "window must be .* not 0"),
        ({"attention": ["strided", "full", "fixed"]}, "3 specs for 2 layers"),
        ({"num_heads": 5}, "model vit_tiny_patch16_224: dim should be divisible by num_heads"),
        ({"bogus": 1}, "model vit_tiny_patch16_224: .*bogus"),
        ({"weights": "x.pth", "pretrained": True}, "exclude each other"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(kwargs, said):
    with pytest.raises(UserError, match=said) as error:
        create_vit(NAME, **TINY | kwargs)
    assert "\n" not in str(error.value)


# Weights


def as_safetensors(state, path):
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_timm_checkpoint(state, path):
    torch.save({"epoch": 3, "arch": NAME, "state_dict": state, "metric": 0.5}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def as_wrapped_checkpoint(state, path):
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def as_lightning_checkpoint(state, path):
    state = {f"net.{key}": value for key, value in state.items()} | {"criterion.weight": torch.ones(5)}
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


WRITERS = [as_safetensors, as_timm_checkpoint, as_wrapped_checkpoint, as_lightning_checkpoint]


@pytest.mark.parametrize("name", [NAME, "deit_tiny_distilled_patch16_224", "vit_base_patch14_reg4_dinov2", "test_vit3"])
@pytest.mark.parametrize("write", WRITERS)
def test_weights_of_a_local_file_are_loaded_whole(tmp_path, write, name):
    source = seeded(timm.create_model, name, **TINY)
    path = write(source.state_dict(), tmp_path / "weights")
    model = seeded(create_vit, name, seed=5, attention="entmax+strided", weights=path, **TINY)
    assert_same_tensors(model.state_dict(), source.state_dict())
    soft = seeded(create_vit, name, seed=5, weights=str(path), **TINY)
    assert torch.equal(soft(images()), source(images()))


@pytest.mark.parametrize("name", [NAME, "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("of_file", "asked"), [(5, 7), (5, 1000), (1000, 5), (0, 5), (0, 1000)])
def test_another_number_of_classes_gets_a_new_head_and_the_rest_of_the_file(tmp_path, write, name, of_file, asked):
    source = seeded(timm.create_model, name, **TINY | {"num_classes": of_file}).state_dict()
    path = write(source, tmp_path / "weights")
    new, loaded = (
        seeded(create_vit, name, seed=5, attention="strided", **TINY | {"num_classes": asked} | weights).state_dict()
        for weights in ({}, {"weights": path})
    )
    heads = [key for key in loaded if key.startswith("head")]
    assert heads
    wanted = source | {key: new[key] for key in heads}
    assert_same_tensors(loaded, {key: wanted[key] for key in loaded})


def test_positions_are_resampled_to_another_image_size(tmp_path):
    source = seeded(timm.create_model, NAME, **TINY)
    path = as_safetensors(source.state_dict(), tmp_path / "weights")
    model = create_vit(NAME, weights=path, **TINY | {"img_size": 48}).eval()
    source.set_input_size(img_size=48)
    torch.testing.assert_close(model(images(48)), source(images(48)), rtol=0, atol=1e-5)


def test_learned_alphas_are_restored_from_a_checkpoint_of_this_project(tmp_path):
    kwargs = {"attention": "entmax+strided", "attention_options": {"learnable_alpha": True}, **TINY}
    source = seeded(create_vit, NAME, **kwargs)
    for depth, layer in enumerate(attention_layers(source)):
        torch.nn.init.constant_(layer.core.normalizer.alpha_logit, depth - 1.5)
    path = as_lightning_checkpoint(source.state_dict(), tmp_path / "weights")
    assert_same_tensors(seeded(create_vit, NAME, seed=5, weights=path, **kwargs).state_dict(), source.state_dict())
    older = {key.replace("core.normalizer.", ""): value for key, value in source.state_dict().items()}
    old = as_lightning_checkpoint(older, tmp_path / "older")  # α was the layer's own
    assert_same_tensors(seeded(create_vit, NAME, seed=5, weights=old, **kwargs).state_dict(), source.state_dict())
    loaded = seeded(create_vit, NAME, seed=5, **kwargs)
    loaded.load_state_dict(older)
    assert_same_tensors(loaded.state_dict(), source.state_dict())
    # A mechanism without a learned α has no place for them, and takes the rest.
    other = create_vit(NAME, weights=path, **TINY)
    assert torch.equal(other.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_sinusoidal_positions_replace_those_of_the_file(tmp_path):
    path = as_safetensors(seeded(timm.create_model, NAME, **TINY).state_dict(), tmp_path / "weights")
    model = create_vit(NAME, weights=path, pos_embed="sinusoidal", **TINY)
    np.testing.assert_allclose(model.pos_embed[0, 1:], sine_cosine(4, 4, 24), atol=1e-6)


def refused(path, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        create_vit(NAME, attention="strided", weights=path, **TINY | kwargs)
    message = str(error.value)
    assert message.startswith(f"model.weights={path}: ")
    assert "\n" not in message
    return message


def test_a_missing_file_is_refused(tmp_path):
    assert refused(tmp_path / "none.pth").endswith("no such file")
    assert refused(tmp_path).endswith("no such file")


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("keep", [0, 1, 100, -1000])
def test_a_file_cut_short_is_refused(tmp_path, write, keep):
    path = write(seeded(timm.create_model, NAME, **TINY).state_dict(), tmp_path / "weights")
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut short" in refused(path)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>not found</html>", b"\x89PNG\r\n\x1a\n", b"hello", b"{}"])
def test_a_file_of_another_kind_is_not_taken_for_a_dangerous_one(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    assert "no weights file" in refused(tmp_path / "weights.pth")


class Payload:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["alone", "beside the weights", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path, where):
    trap, path = Payload(tmp_path / "owned"), tmp_path / "weights.pth"
    state = timm.create_model(NAME, **TINY).state_dict()
    if where == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": trap}, protocol=2))
    else:
        torch.save(trap if where == "alone" else {"state_dict": state, "hyper_parameters": trap}, path)
    said = refused(path)
    assert where == "pickle" or "could run code" in said
    assert not trap.path.exists()
    torch.load(path, weights_only=False) if where != "pickle" else pickle.loads(path.read_bytes())  # noqa: S301
    assert trap.path.exists()  # so the trap was a live one


@pytest.mark.parametrize(
    "content", [{}, {"state_dict": {}}, {"state_dict": {"epoch": 3}}, [torch.ones(2)], torch.ones(2)]
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert "state dict" in refused(tmp_path / "weights.pth") or "no weights file" in refused(tmp_path / "weights.pth")


@pytest.mark.parametrize("num_classes", [5, 7, 1000])
@pytest.mark.parametrize("other", [{"depth": 1}, {"depth": 3}, {"embed_dim": 48}, {"qkv_bias": False}])
def test_weights_of_another_architecture_are_refused_whatever_the_number_of_classes(tmp_path, other, num_classes):
    path = as_safetensors(seeded(timm.create_model, NAME, **TINY | other).state_dict(), tmp_path / "weights")
    assert len(refused(path, num_classes=num_classes)) < 600


@pytest.mark.parametrize("num_classes", [5, 1000])
def test_weights_of_something_else_are_refused(tmp_path, num_classes):
    torch.save({"layer1.conv.weight": torch.ones(3, 3)}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", num_classes=num_classes)


def test_pretrained_without_network_or_cache_is_refused_with_advice(offline):
    with pytest.raises(UserError, match=r"not in the local cache .* cannot be reached \(no route to host\)") as error:
        create_vit(NAME, attention="strided", pretrained=True)
    assert "model.weights=<file>" in str(error.value)
    assert "\n" not in str(error.value)


def test_pretrained_of_a_model_that_has_no_weights_is_refused(offline):
    with pytest.raises(UserError, match="timm has no weights for vit_small_patch16_36x1_224"):
        create_vit("vit_small_patch16_36x1_224", pretrained=True)


def test_pretrained_loads_timm_s_weights_of_that_name(monkeypatch, tmp_path):
    # What the hub would send, put where timm's download would put it.
    source = seeded(timm.create_model, NAME, num_classes=1000)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: str(tmp_path))
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download",
        lambda repo_id, *args, **kwargs: asked.append(repo_id) or str(tmp_path / "model.safetensors"),
    )
    model = seeded(create_vit, NAME, seed=5, attention="entmax+strided", pretrained=True, num_classes=3)
    assert set(asked) == {timm.get_pretrained_cfg(NAME).hf_hub_id}
    heads = {"head.weight", "head.bias"}
    new = seeded(timm.create_model, NAME, seed=5, num_classes=3).state_dict()
    assert_same_tensors(model.state_dict(), source.state_dict() | {key: new[key] for key in heads})


@pytest.mark.slow
def test_every_timm_model_is_swapped_whole_or_refused_by_name():
    swapped: list[str] = []
    refusals: dict[str, str] = {}
    with torch.device("meta"):
        for name in timm.list_models():
            try:
                model = create_vit(name, attention="strided")
            except UserError as error:
                refusals[name] = str(error)
                continue
            swapped.append(name)
            layers = attention_layers(model)
            assert len(layers) == len(model.blocks) > 0, name
            tokens = model.num_prefix_tokens + math.prod(model.patch_embed.grid_size)
            assert {layer.pattern().size for layer in layers} == {tokens}, name
            leftover = [path for path, module in model.named_modules() if type(module).__name__.startswith("Attention")]
            assert len([path for path in leftover if "attn_pool" not in path]) == len(layers), (name, leftover)
    others = [f"{name}: {said}" for name, said in refusals.items() if f"model {name}: its attention cannot" not in said]
    assert others == []
    assert 185 <= len(swapped) <= 250
    assert {NAME, "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vitamin_small_224"} <= set(swapped)
