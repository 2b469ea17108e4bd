"""performer: its features and weights written out, its mean over many draws, and where its draws come from."""

import math

import pytest
import torch
from registered import draw, qkv
from torch import Tensor

from vit_attn.attention import Tokens, parse_spec
from vit_attn.attention.kinds.performer import PerformerCore, orthogonal_features
from vit_attn.models import create_vit

TOKENS = Tokens((4, 4), 1)
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features_of(x: Tensor, omega: Tensor, feature_map: str) -> Tensor:
    """φ(x) of (N, D), as published, with nothing subtracted."""
    x = x * x.shape[-1] ** -0.25
    if feature_map == "relu":
        return (x @ omega.T).clamp(min=0) + 1e-3
    return (x @ omega.T - x.square().sum(-1, keepdim=True) / 2).exp()


@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
def test_weights_and_output_are_those_written_out(feature_map):
    q, k, v = qkv()
    core = parse_spec(f"performer:features:7:feature_map:{feature_map}").build(2, 4).double()
    out, weights = core(q, k, v, TOKENS), core.weights(q, k, TOKENS)
    for image, head in ((0, 0), (1, 1)):
        phi_q, phi_k = (features_of(x[image, head], core.features, feature_map) for x in (q, k))
        wanted = phi_q @ phi_k.T
        wanted = wanted / wanted.sum(-1, keepdim=True)
        torch.testing.assert_close(weights[image, head], wanted, atol=1e-12, rtol=0)
        torch.testing.assert_close(out[image, head], wanted @ v[image, head], atol=1e-12, rtol=0)


def test_features_are_orthogonal_in_blocks_and_as_long_as_normal_ones():
    omega = orthogonal_features(10, 4, generator()).double()
    assert omega.shape == (10, 4)
    for start in (0, 4, 8):
        block = omega[start : start + 4]
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-5, rtol=0)
    lengths = orthogonal_features(4000, 16, generator()).double().square().sum(1)
    assert lengths.mean() == pytest.approx(16, rel=0.02)  # χ² of 16
    assert lengths.var() == pytest.approx(32, rel=0.15)
    # Uniform over the rotations: QR without its signs leaves one sign of each diagonal entry.
    blocks = orthogonal_features(4000, 4, generator(1)).double().view(-1, 4, 4)
    assert abs(float(blocks[:, 0, 0].sign().mean())) < 0.15


def kernel_over(draws: int, orthogonal: bool) -> tuple[Tensor, Tensor]:
    """φ(q)·φ(k) / m of pairs, for each of many draws, and what they are to be in the mean: exp(q·k D^-½)."""
    q, k = 0.7 * draw(6, 8), 0.7 * draw(6, 8, seed=1)
    source, found = generator(3), []
    for _ in range(draws):
        omega = orthogonal_features(8, 8, source) if orthogonal else torch.randn(8, 8, generator=source)
        phi_q, phi_k = (features_of(x, omega.double(), "softmax") for x in (q, k))
        found.append((phi_q * phi_k).mean(-1))
    return torch.stack(found), ((q * k).sum(-1) * 8**-0.5).exp()


def test_the_kernel_is_softmaxs_in_the_mean_and_orthogonal_features_vary_less():
    found, wanted = kernel_over(4096, orthogonal=True)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - wanted).abs() < 4 * error).all()
    independent, _ = kernel_over(4096, orthogonal=False)
    assert found.var(0).mean() < independent.var(0).mean()


@pytest.mark.parametrize(("features", "most"), [(32, 1.0), (8192, 0.08)])
def test_more_features_come_closer_to_softmax(features, most):
    q, k, v = (0.5 * draw(1, 2, 64, 16, seed=seed) for seed in range(3))
    torch.manual_seed(0)
    core = parse_spec(f"performer:features:{features}").build(2, 16).double()
    wanted = (q @ k.mT * 16**-0.5).softmax(-1) @ v
    assert (core(q, k, v, Tokens((8, 8))) - wanted).norm() / wanted.norm() < most


@pytest.mark.parametrize("scale", [1.0, 3.0, 30.0])
def test_large_scores_do_not_become_the_mean_of_the_values(scale):
    # With 1e-4 added to every feature, as public code has it, the output is the mean of v at these scores.
    q, k, v = (factor * draw(1, 2, 256, 64, seed=seed).float() for seed, factor in enumerate((scale, scale, 1.0)))
    core = parse_spec("performer").build(2, 64)
    out, weights = core(q, k, v, Tokens((16, 16))), core.weights(q, k, Tokens((16, 16)))
    assert out.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 256), atol=1e-4, rtol=0)
    mean = v.mean(-2, keepdim=True)
    assert (out - mean).norm() > 0.2 * v.norm()
    entropy = torch.special.entr(weights.clamp_min(0)).sum(-1).mean()
    assert entropy < 0.95 * math.log(256)


def test_there_are_d_ln_d_features_by_default():
    assert parse_spec("performer").build(2, 64).features.shape == (266, 64)
    assert parse_spec("performer:features:10").build(2, 64).features.shape == (10, 64)


# Where draws come from


def core_of(spec: str = "performer:redraw:10", layer: int = 0) -> PerformerCore:
    return parse_spec(spec).build(2, 8, layer)


def test_features_are_a_function_of_seed_layer_and_redraw_alone():
    def at(step: int, seed: int, layer: int, start: int = 0) -> Tensor:
        torch.manual_seed(start)
        core = core_of()
        core.on_step(step, seed=seed, layer=layer)
        return core.features.clone()

    one = at(0, 1, 0)
    assert torch.equal(one, at(9, 1, 0, start=5))
    for other in (at(10, 1, 0), at(0, 2, 0), at(0, 1, 1)):
        assert not torch.equal(one, other)
    assert torch.equal(at(10, 1, 0), at(19, 1, 0))


def test_nothing_is_drawn_from_torchs_generator():
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    core = core_of()
    core.on_step(50, seed=1, layer=0)
    assert torch.equal(torch.rand(3), wanted)
    torch.manual_seed(3)
    same = core_of()
    torch.manual_seed(4)
    other = core_of()
    assert torch.equal(core_of("performer:redraw:10").features, other.features)
    assert not torch.equal(same.features, other.features)


def test_features_that_are_never_drawn_again_stay_as_they_were():
    core = core_of("performer:redraw:0")
    before = core.features.clone()
    core.on_step(10**6, seed=7, layer=3)
    assert torch.equal(core.features, before)


def test_layers_have_features_of_their_own_and_checkpoints_hold_them(tmp_path):
    torch.manual_seed(0)
    model = create_vit("vit_tiny_patch16_224", attention="performer", **SIZES).eval()
    first, second = (block.attn.core.features for block in model.blocks)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    other = create_vit("vit_tiny_patch16_224", attention="performer", **SIZES).eval()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    third = create_vit("vit_tiny_patch16_224", attention="performer", weights=tmp_path / "weights.pt", **SIZES).eval()
    assert torch.equal(third(x), model(x))  # weights that were trained with features go with them


def test_a_training_draws_its_features_again_by_the_optimizer_step(train, no_pictures):
    settings = ("trainer.limit_train_batches=10", "trainer.accumulate_grad_batches=2", "trainer.limit_val_batches=1")
    options = ("model.attention=performer", "model.attention_options.redraw=2", "model.attention_options.features=5")
    run = train(*settings, *options, "seed=3", "data.batch_size=16", "test=false")
    state = torch.load(run.last, weights_only=True)["state_dict"]
    for layer in (0, 1):
        core = parse_spec("performer:redraw:2:features:5").build(2, 16, layer)
        core.on_step(4, seed=3, layer=layer)  # the last of five steps, from 0
        assert torch.equal(state[f"net.blocks.{layer}.attn.core.features"], core.features)
        core.on_step(0, seed=3, layer=layer)
        assert not torch.equal(state[f"net.blocks.{layer}.attn.core.features"], core.features)
