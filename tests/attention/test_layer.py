"""The layer that replaces timm's Attention, alone and inside timm's blocks."""

import copy
import shutil
from types import SimpleNamespace

import entmax as package
import pytest
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vit_attn.attention import (
    Attention,
    attention,
    attention_layers,
    make_pattern,
    observe_attention,
    parse_spec,
)
from vit_attn.attention import compiled as compiling
from vit_attn.models import create_vit

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="torch.compile needs a C++ compiler"
)
HEADS, DIM, GRID = 3, 24, (3, 4)
N = 1 + 12
VARIANTS = {
    "plain": {},
    "bias": {"qkv_bias": True, "proj_bias": False},
    "qk_norm": {"qk_norm": True},
    "scale_norm": {"scale_norm": True},
    "gated": {"gated": True},
    "all": {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True, "attn_head_dim": 4},
}


@pytest.fixture(params=[True, False], ids=["fused", "unfused"])
def fused(request):
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(True)


def timm_attention(**kwargs) -> TimmAttention:
    torch.manual_seed(0)
    return TimmAttention(DIM, num_heads=HEADS, norm_layer=nn.LayerNorm, **kwargs).eval()


def layer(spec: str, source: TimmAttention | None = None, *, grid: tuple[int, int] = GRID, **options) -> Attention:
    mechanism = parse_spec(spec, options)
    return Attention(source or timm_attention(), mechanism, num_prefix_tokens=1, grid=SimpleNamespace(grid_size=grid))


def alpha_of(swapped: Attention) -> Tensor:
    return swapped.core.normalizer.number()


def tokens(*, dim: int = DIM, size: int = N) -> Tensor:
    return torch.randn(2, size, dim, generator=torch.Generator().manual_seed(1))


def tiny_vit(attention: str | list[str] = "strided", **kwargs):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 3, "num_heads": HEADS, "num_classes": 5}
    return create_vit("vit_tiny_patch16_224", attention=attention, **small | kwargs).eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_softmax_is_timm_bit_for_bit(variant, fused):
    source = timm_attention(**variant)
    assert source.fused_attn is fused
    leaf, other = tokens().requires_grad_(), tokens().requires_grad_()
    wanted, got = source(leaf), layer("softmax", source)(other)
    assert torch.equal(got, wanted)
    wanted.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spec", ["strided", "sliding_window", "causal"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_softmax_over_a_pattern_is_timm_with_that_mask(spec, variant, fused):
    source = timm_attention(**variant)
    mask = make_pattern(spec, num_tokens=12, num_prefix_tokens=1, window=4, stride=4).allowed()
    torch.testing.assert_close(layer(spec, source)(tokens()), source(tokens(), attn_mask=mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", ["entmax", "sparsemax+strided"])
def test_another_normalizer_is_timm_with_other_weights(spec):
    source = timm_attention(qkv_bias=True)
    x = tokens()
    q, k, v = source.qkv(x).reshape(2, N, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
    normalizer, _, pattern = spec.partition("+")
    laid = make_pattern(pattern, num_tokens=12, num_prefix_tokens=1, grid_size=GRID) if pattern else None
    out = attention(q, k, v, normalizer, laid, alpha=1.2)
    wanted = source.proj(out.transpose(1, 2).reshape(2, N, DIM))
    torch.testing.assert_close(layer(spec, source, alpha=1.2)(x), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_state_dict_keys_parameters_and_mode_are_those_of_timm(variant):
    source = timm_attention(**variant)
    swapped = layer("entmax+strided", source)
    assert list(swapped.state_dict()) == list(source.state_dict())
    assert [id(p) for p in swapped.parameters()] == [id(p) for p in source.parameters()]
    assert swapped.training is False
    assert layer("strided", source.train()).training is True


def test_dropout_of_the_weights_and_the_projection_acts_while_training(fused):
    source = timm_attention(attn_drop=0.5, proj_drop=0.5).train()
    swapped = layer("softmax", source)
    torch.manual_seed(3)
    got = swapped(tokens())
    torch.manual_seed(3)
    assert torch.equal(got, source(tokens()))
    assert not torch.equal(got, swapped.eval()(tokens()))


@pytest.mark.parametrize("start", [1.01, 1.1, 1.5, 1.9, 2.0])
def test_learned_alpha_is_one_number_per_head_that_starts_at_the_option(start):
    swapped = layer("entmax+strided", learnable_alpha=True, alpha=start)
    assert dict(swapped.named_parameters())["core.normalizer.alpha_logit"].shape == (HEADS,)
    alpha = alpha_of(swapped)
    assert alpha.shape == (HEADS,)
    assert ((alpha > 1.01) & (alpha < 2)).all()
    torch.testing.assert_close(alpha, torch.full((HEADS,), start), rtol=0, atol=0.011)
    if 1.05 <= start <= 1.95:
        torch.testing.assert_close(alpha, torch.full((HEADS,), start), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [1.01, 1.5, 2.0])
def test_learned_alpha_receives_a_gradient_and_follows_it(start):
    swapped = layer("entmax", timm_attention(qk_norm=True), learnable_alpha=True, alpha=start)
    before = alpha_of(swapped).detach()
    optimizer = torch.optim.SGD([swapped.core.normalizer.alpha_logit], lr=1.0)
    swapped(tokens()).square().sum().backward()
    assert swapped.core.normalizer.alpha_logit.grad.isfinite().all()
    assert (swapped.core.normalizer.alpha_logit.grad != 0).all()
    optimizer.step()
    assert (torch.sign(alpha_of(swapped) - before) == -torch.sign(swapped.core.normalizer.alpha_logit.grad)).all()


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_learned_alpha_stays_in_its_range_and_finite_however_far_it_is_pushed(logit):
    swapped = layer("entmax", learnable_alpha=True)
    nn.init.constant_(swapped.core.normalizer.alpha_logit, logit)
    assert ((alpha_of(swapped) >= 1.01) & (alpha_of(swapped) <= 2)).all()
    swapped(tokens()).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in swapped.parameters())


def test_learned_alpha_changes_only_its_own_head():
    swapped = layer("entmax", learnable_alpha=True)
    swapped.proj = nn.Identity()
    before = swapped(tokens()).unflatten(-1, (HEADS, -1))
    with torch.no_grad():
        swapped.core.normalizer.alpha_logit[1] += 1
    after = swapped(tokens()).unflatten(-1, (HEADS, -1))
    assert torch.equal(after[:, :, [0, 2]], before[:, :, [0, 2]])
    assert not torch.isclose(after[:, :, 1], before[:, :, 1]).all()


@pytest.mark.parametrize("spec", ["softmax", "entmax15", "sparsemax", "strided"])
def test_only_entmax_gets_an_alpha_to_learn(spec):
    assert not [key for key in layer(spec, learnable_alpha=True).state_dict() if "alpha" in key]


@pytest.mark.parametrize(("start", "end"), [(1.01, 1.5), (1.1, 1.7), (2.0, 1.3)])
def test_annealed_alpha_goes_from_its_start_to_exactly_the_option(start, end):
    swapped = layer("entmax+strided", anneal_alpha_from=start, alpha=end)
    seen = [alpha_of(swapped).clone()]
    arrived = [swapped.core.settled()]
    for progress in (0.0, 0.25, 1.0):
        swapped.core.normalizer.anneal(progress)
        seen.append(alpha_of(swapped).clone())
        arrived.append(swapped.core.settled())
    for alpha, wanted in zip(seen, (start, start, 0.75 * start + 0.25 * end, end), strict=True):
        assert alpha.shape == (HEADS,)
        torch.testing.assert_close(alpha, torch.full((HEADS,), wanted), rtol=0, atol=1e-6)
    assert torch.equal(seen[0], torch.full((HEADS,), start))
    assert torch.equal(seen[3], torch.full((HEADS,), end))
    assert arrived == [False, False, False, True]


@pytest.mark.parametrize("implementation", ["dense", "blocks"])
@pytest.mark.parametrize("spec", ["entmax", "entmax+strided"])
def test_an_annealed_alpha_weighs_as_the_entmax_package_does_at_that_alpha(spec, implementation):
    source = timm_attention(qkv_bias=True)
    nn.init.normal_(source.qkv.weight)  # scores that spread, so that α matters
    swapped = layer(spec, source, anneal_alpha_from=1.1, alpha=1.9, implementation=implementation)
    q, k, v = source.qkv(tokens()).reshape(2, N, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * source.scale
    if spec != "entmax":
        allowed = make_pattern("strided", num_tokens=12, num_prefix_tokens=1, grid_size=GRID).allowed()
        scores = scores.masked_fill(~allowed, -1e9)
    outs = []
    for progress, alpha in ((0.0, 1.1), (0.5, 1.5), (1.0, 1.9)):
        swapped.core.normalizer.anneal(progress)
        weights = package.entmax_bisect(scores.double(), alpha, n_iter=100).float()
        wanted = source.proj((weights @ v).transpose(1, 2).reshape(2, N, DIM))
        outs.append(swapped(tokens()))
        torch.testing.assert_close(outs[-1], wanted, rtol=1e-4, atol=1e-4)
    assert (outs[0] - outs[1]).abs().max() > 0.01
    assert (outs[1] - outs[2]).abs().max() > 0.01


@pytest.mark.parametrize("implementation", ["dense", "blocks"])
@pytest.mark.parametrize("spec", ["entmax", "entmax+strided"])
def test_an_annealed_alpha_has_the_outputs_and_gradients_of_a_fixed_one(spec, implementation):
    grads = []
    for options in ({"alpha": 1.3}, {"anneal_alpha_from": 1.1, "alpha": 1.5}):
        swapped = layer(spec, implementation=implementation, **options)
        if "anneal_alpha_from" in options:
            swapped.core.normalizer.anneal(0.5)
        x = tokens().requires_grad_()
        out = swapped(x)
        out.square().sum().backward()
        grads.append([out, x.grad, *(parameter.grad for parameter in swapped.parameters())])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["entmax", "entmax+strided"])
def test_no_gradient_is_taken_to_an_annealed_alpha(spec):
    source = timm_attention()
    swapped = layer(spec, source, anneal_alpha_from=1.1)
    assert [id(parameter) for parameter in swapped.parameters()] == [id(parameter) for parameter in source.parameters()]
    swapped(tokens()).square().sum().backward()
    assert not alpha_of(swapped).requires_grad
    assert swapped.core.normalizer.annealed_alpha.grad is None


def test_a_state_dict_carries_an_annealed_alpha():
    source, target = (layer("entmax", anneal_alpha_from=1.1, alpha=1.9) for _ in range(2))
    source.core.normalizer.anneal(0.75)
    target.load_state_dict(source.state_dict())
    assert torch.equal(alpha_of(target), alpha_of(source))
    torch.testing.assert_close(alpha_of(target), torch.full((HEADS,), 1.7))
    assert torch.equal(target(tokens()), source(tokens()))


@pytest.mark.parametrize("spec", ["softmax", "entmax15", "sparsemax", "strided"])
def test_only_entmax_gets_an_alpha_to_anneal(spec):
    swapped = layer(spec, anneal_alpha_from=1.1)
    assert not [key for key in swapped.state_dict() if "annealed_alpha" in key]
    assert swapped.core.settled()


def test_a_deep_copy_has_an_annealed_alpha_of_its_own():
    model = tiny_vit("entmax", attention_options={"anneal_alpha_from": 1.1, "alpha": 1.9})
    twin = copy.deepcopy(model)
    for swapped in attention_layers(twin):
        swapped.core.normalizer.anneal(1.0)
    assert [float(alpha_of(swapped)[0]) for swapped in attention_layers(model)] == pytest.approx([1.1] * 3)
    assert [float(alpha_of(swapped)[0]) for swapped in attention_layers(twin)] == pytest.approx([1.9] * 3)


@pytest.mark.parametrize("implementation", ["dense", "blocks"])
def test_a_compiled_model_is_not_compiled_again_when_alpha_moves(implementation):
    options = {"anneal_alpha_from": 1.1, "alpha": 1.9, "implementation": implementation}
    model = tiny_vit("entmax+strided", attention_options=options).train()
    model(images())  # lays the masks: what is made once must not count
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for progress in (0.0, 0.3, 0.7, 1.0):
        for swapped in attention_layers(model):
            swapped.core.normalizer.anneal(progress)
        out = compiled(images())
        torch.testing.assert_close(out, model(images()), rtol=0, atol=1e-5)
        out.square().sum().backward()
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.slow
@needs_compiler
def test_the_kernels_of_the_engine_are_not_compiled_again_when_alpha_moves(monkeypatch):
    monkeypatch.setattr(compiling, "COMPILE_FROM", 0)
    monkeypatch.setattr(compiling, "_works", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    swapped = layer("entmax+strided", anneal_alpha_from=1.1, alpha=1.9, implementation="blocks")
    graphs = []
    for progress in (0.0, 0.3, 0.7, 1.0):
        swapped.core.normalizer.anneal(progress)
        swapped(tokens()).square().sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert compiling._works
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 4


@pytest.mark.parametrize("given", [{"attn_mask": torch.ones(N, N, dtype=torch.bool)}, {"is_causal": True}])
def test_a_mask_at_call_time_is_refused(given):
    with pytest.raises(ValueError, match="not taken at call time"):
        layer("softmax")(tokens(), **given)


@pytest.mark.parametrize("spec", ["strided", "causal", "entmax+fixed"])
def test_tokens_that_are_not_those_of_the_grid_are_refused_by_number(spec):
    with pytest.raises(ValueError, match="12 tokens came in, but 1 prefix tokens and a patch grid of 3x4 make 13"):
        layer(spec)(tokens(size=12))


@pytest.mark.parametrize("spec", ["softmax", "entmax15"])
def test_all_keys_need_no_grid(spec):
    assert layer(spec)(tokens(size=7)).shape == (2, 7, DIM)
    with pytest.raises(ValueError, match="7 tokens came in"):
        layer(spec, causal=True)(tokens(size=7))


@pytest.mark.parametrize("asked", [None, "auto", "dense", "fused"])
def test_the_implementation_asked_for_runs_and_timm_s_switch_turns_auto_to_dense(asked, fused):
    expected = asked if asked in ("dense", "fused") else "fused" if fused else "dense"
    swapped = layer("strided", implementation=asked)
    assert swapped.cost().implementation == expected
    seen = []
    swapped.attn_drop.register_forward_hook(lambda module, args, weights: seen.append(weights))
    swapped(tokens())
    assert len(seen) == (expected == "dense")  # the fused one never forms the weights


@pytest.mark.parametrize(("spec", "pattern"), [("softmax", "full"), ("strided", "strided"), ("entmax+fixed", "fixed")])
def test_observers_are_shown_the_weights_and_the_output_stays(spec, pattern):
    model = tiny_vit(spec)
    plain = model(images())
    seen: dict[int, Tensor] = {}
    with observe_attention(model, seen.__setitem__):
        observed = model(images())
    torch.testing.assert_close(observed, plain, rtol=0, atol=1e-6)
    assert list(seen) == [0, 1, 2]
    forbidden = ~make_pattern(pattern, num_tokens=16, num_prefix_tokens=1).allowed()
    for weights in seen.values():
        assert weights.shape == (2, HEADS, 17, 17)
        assert not weights.requires_grad
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 17))
        assert (weights[..., forbidden] == 0).all()
    seen.clear()
    model(images())
    assert not seen


def test_observed_weights_are_those_of_timm():
    model = tiny_vit("softmax", depth=1)
    seen = []
    with observe_attention(model, lambda index, weights: seen.append(weights)):
        model(images())
    block = model.blocks[0]
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images()))))
    q, k, _ = block.attn.qkv(block.norm1(x)).reshape(2, 17, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
    wanted = (q @ k.transpose(-2, -1) * block.attn.scale).softmax(-1)
    torch.testing.assert_close(seen[0], wanted, rtol=0, atol=1e-6)


def test_chosen_layers_alone_are_observed():
    model = tiny_vit(["strided", "full"])
    seen = []
    with observe_attention(model, lambda index, weights: seen.append(index), layers=[2, 0]):
        model(images())
    assert seen == [0, 2]


def test_observing_ends_when_an_exception_leaves_the_block():
    model = tiny_vit()

    def stop(index: int, weights: Tensor) -> None:
        raise RuntimeError("seen enough")

    with pytest.raises(RuntimeError, match="seen enough"), observe_attention(model, stop):
        model(images())
    assert model(images()).isfinite().all()


def test_nested_observing_gives_the_outer_observer_its_turn_back():
    model = tiny_vit()
    outer, inner = [], []
    with observe_attention(model, lambda index, weights: outer.append(index)):
        with observe_attention(model, lambda index, weights: inner.append(index), layers=[1]):
            model(images())
        model(images())
    assert inner == [1]
    assert outer == [0, 2, 0, 1, 2]


@pytest.mark.parametrize("spec", ["strided", "entmax+strided"])
def test_timm_s_extractor_sees_the_weights_when_fused_attention_is_off(spec):
    set_fused_attn(False)
    try:
        model = tiny_vit(spec)
    finally:
        set_fused_attn(True)
    found = AttentionExtract(model, method="hook")(images())
    assert list(found) == [f"blocks.{index}.attn.attn_drop" for index in range(3)]
    seen: dict[int, Tensor] = {}
    with observe_attention(model, seen.__setitem__):
        model(images())
    for weights, expected in zip(found.values(), seen.values(), strict=True):
        assert torch.equal(weights, expected)
        assert (weights[..., 1, 2:] == 0).all()  # the first patch sees itself and the class token
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 17))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_deep_copy_has_its_own_grid_and_weights(dynamic):
    model = tiny_vit("entmax+strided", dynamic_img_size=dynamic)
    before = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.set_input_size(img_size=48)
    twin(images(48))
    assert attention_layers(twin)[0].grid_size == (6, 6)
    assert attention_layers(model)[0].grid_size == (4, 4)
    assert torch.equal(model(images()), before)


def test_layers_are_listed_by_depth_and_do_not_hold_the_patch_embedding():
    model = tiny_vit()
    layers = attention_layers(model)
    assert [layer.layer for layer in layers] == [0, 1, 2]
    assert layers == [block.attn for block in model.blocks]
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert not [name for name in names if name.startswith("blocks.") and "patch_embed" in name]


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = tiny_vit("entmax+strided").train()
        model.set_grad_checkpointing(checkpointing)
        model(images()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-6)


def test_training_after_a_first_forward_in_inference_mode():
    model = tiny_vit(["strided", "entmax+fixed"])
    with torch.inference_mode():
        model(images())
    model(images()).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("spec", ["softmax", "strided", "entmax+strided"])
def test_bf16_autocast_is_finite_and_close(spec):
    model = tiny_vit(spec)
    wanted = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=0.05 * float(wanted.detach().abs().max()))


def test_auto_follows_timms_switch_for_fused_attention():
    model = tiny_vit("fixed")
    for layer in attention_layers(model):
        assert layer.cost().implementation != "dense"
        layer.fused_attn = False
        assert layer.cost().implementation == "dense"
