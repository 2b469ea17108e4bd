"""What every mechanism owes, tested over all that is registered and every option: nothing here names one.

The definition of each is tested against an independent reference in a file of its own, tests/attention/test_<name>.py.
"""

import math

import pytest
import torch
from registered import DIM, HEADS, NAMES, SPECS, TOKENS, build, draw, fits, qkv
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vit_attn.attention import MECHANISMS, PATTERNS, Masked, Tokens, attention, parse_spec
from vit_attn.attention.functional import IMPLEMENTATIONS
from vit_attn.errors import UserError
from vit_attn.models import create_vit

CPU = torch.device("cpu")
every_spec = pytest.mark.parametrize("spec", SPECS)
every_name = pytest.mark.parametrize("spec", NAMES)
SPARSE = [name for name, cls in PATTERNS.items() if cls().has_components]


def implementations(spec: str) -> list[str]:
    """The specs of a mechanism that differ in who computes it, as options."""
    mechanism = parse_spec(spec)
    if not isinstance(mechanism, Masked):
        return ["auto"]
    return [name for name in IMPLEMENTATIONS if name != "fused" or mechanism.normalizer.name == "softmax"]


def core_of(spec: str, implementation: str = "auto"):
    return parse_spec(spec, {"implementation": implementation}).build(HEADS, DIM).double()


@every_spec
def test_output_and_weights_are_one_computation(spec):
    core, (q, k, v) = build(spec), qkv()
    out = core(q, k, v, TOKENS)
    weights = core.weights(q, k, TOKENS)
    assert out.shape == q.shape
    assert weights.shape == (2, HEADS, TOKENS.size, TOKENS.size)
    torch.testing.assert_close(weights @ v, out, atol=1e-12, rtol=0)
    shown, seen = core.forward_with_weights(q, k, v, TOKENS)
    torch.testing.assert_close((shown, seen), (out, weights), atol=1e-12, rtol=0)


@every_spec
def test_output_is_linear_in_the_values(spec):
    core, (q, k, v) = build(spec), qkv()
    other = draw(*v.shape, seed=7)
    both = core(q, k, 2 * v - 3 * other, TOKENS)
    torch.testing.assert_close(both, 2 * core(q, k, v, TOKENS) - 3 * core(q, k, other, TOKENS), atol=1e-11, rtol=0)


@every_spec
def test_gradients_to_inputs_and_parameters_are_those_of_the_output(spec):
    core = build(spec)
    leaves = [leaf[:1].requires_grad_() for leaf in qkv(scale=1.0)]
    parameters = list(core.parameters())

    def run(*inputs: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in core.named_parameters()), inputs[3:], strict=True))
        return torch.func.functional_call(core, named, (*inputs[:3], TOKENS))

    assert gradcheck(run, (*leaves, *parameters), fast_mode=True)


@every_spec
def test_an_image_alone_is_what_it_is_in_a_batch(spec):
    core, tensors = build(spec), qkv(images=4)
    tensors = [x * torch.tensor([1.0, 8.0, 0.1, 3.0]).double()[:, None, None, None] for x in tensors]
    out = core(*tensors, TOKENS)
    for image in range(4):
        alone = core(*(x[image : image + 1] for x in tensors), TOKENS)
        torch.testing.assert_close(alone, out[image : image + 1], atol=1e-11, rtol=1e-11)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(core(*(x[order] for x in tensors), TOKENS), out[order], atol=1e-11, rtol=1e-11)


@every_spec
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
def test_bf16_under_autocast_is_finite(spec, scale):
    core = build(spec).float()
    leaves = [x.to(torch.bfloat16).requires_grad_() for x in qkv(scale=scale)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = core(*leaves, TOKENS)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[2].dtype == torch.bfloat16


@every_spec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_rounds_inputs_and_output_alone(spec, dtype):
    core = build(spec)
    q, k, v = qkv(dtype=dtype)
    out = core.float()(q, k, v, TOKENS)
    wanted = build(spec)(q.double(), k.double(), v.double(), TOKENS)
    assert out.dtype == dtype
    # torch's own kernel rounds inside, too.
    rounding = 2 if core.cost(TOKENS, CPU).implementation == "fused" else 1
    atol = rounding * {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), wanted, atol=atol, rtol=0)


@every_spec
def test_keys_out_of_reach_change_nothing(spec):
    core, (q, k, v) = build(spec), qkv()
    reach = core.reach(TOKENS)
    weights = core.weights(q, k, TOKENS)
    if reach is None:
        return
    assert reach.diagonal().all()
    assert (weights[..., ~reach] == 0).all()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = core(*leaves, TOKENS)
    for query in (TOKENS.prefix, TOKENS.size - 1):
        _, dk, dv = torch.autograd.grad(out[:, :, query].sum(), leaves, retain_graph=True)
        assert (dk[:, :, ~reach[query]] == 0).all()
        assert (dv[:, :, ~reach[query]] == 0).all()


@every_spec
def test_prefix_tokens_see_and_are_seen_by_every_token(spec):
    reach = build(spec).reach(TOKENS)
    assert reach is None or (reach[0].all() and reach[:, 0].all())
    core, (q, k, v) = build(spec), qkv(scale=0.1)
    before = core(q, k, v, TOKENS)
    for patch in (1, TOKENS.size - 1):
        other = v.clone()
        other[:, :, patch] += 1
        assert (core(q, k, other, TOKENS)[:, :, 0] != before[:, :, 0]).all()
    v[:, :, 0] += 1
    assert (core(q, k, v, TOKENS) != before).all()


@every_spec
def test_no_images_give_no_output(spec):
    for implementation in implementations(spec):
        core = core_of(spec, implementation)
        leaves = [torch.zeros(0, HEADS, TOKENS.size, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        out = core(*leaves, TOKENS)
        assert out.shape == (0, HEADS, TOKENS.size, DIM)
        out.sum().backward()
        assert core.weights(*leaves[:2], TOKENS).shape == (0, HEADS, TOKENS.size, TOKENS.size)


@every_name
def test_nan_in_one_image_does_not_reach_another(spec):
    for implementation in implementations(spec):
        core, tensors = core_of(spec, implementation), qkv(images=3)
        wanted = core(*tensors, TOKENS)
        for which in range(3):
            bad = [x.clone() for x in tensors]
            bad[which][1] = math.nan
            out = core(*bad, TOKENS)
            torch.testing.assert_close(out[[0, 2]], wanted[[0, 2]], atol=1e-13, rtol=1e-12)
            assert out[1].isnan().all()


@every_name
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_query_or_a_key_that_is_no_number_spoils_what_it_reaches_and_nothing_else(spec, value):
    spoiled = TOKENS.size - 3
    for implementation in implementations(spec):
        core, tensors = core_of(spec, implementation), qkv()
        reach = core.reach(TOKENS)
        reach = torch.ones(TOKENS.size, TOKENS.size, dtype=torch.bool) if reach is None else reach
        wanted = core(*tensors, TOKENS)
        q, k, v = (x.clone() for x in tensors)
        q[:, :, spoiled] = value
        out = core(q, k, v, TOKENS)
        others = torch.arange(TOKENS.size) != spoiled
        assert out[:, :, spoiled].isnan().all()
        torch.testing.assert_close(out[:, :, others], wanted[:, :, others], atol=1e-13, rtol=1e-12)
        if implementation == "fused" or value == math.inf:
            continue  # torch's kernel adds a mask to the scores, which NaN survives; one infinite score may be right
        k[:, :, spoiled] = value
        out = core(tensors[0], k, v, TOKENS)
        assert out[:, :, reach[:, spoiled]].isnan().all()
        torch.testing.assert_close(
            out[:, :, ~reach[:, spoiled]], wanted[:, :, ~reach[:, spoiled]], atol=1e-13, rtol=1e-12
        )


@every_spec
def test_the_cost_is_what_is_computed(spec):
    tokens = Tokens((8, 8), 1)
    core = parse_spec(spec).build(HEADS, 16)
    cost = core.cost(tokens, CPU)
    q, k, v = (torch.zeros(1, HEADS, tokens.size, 16) for _ in range(3))
    # torch 2.11 does not count its fused kernel on the CPU; its plain products are the same.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        core(q, k, v, tokens)
    assert counter.get_total_flops() == pytest.approx(cost.flops, rel=0.1)
    assert 0 < cost.needed_flops <= cost.flops
    assert cost.why
    assert "\n" not in cost.why
    reach = core.reach(tokens)
    if cost.entries is not None:
        assert cost.entries == (tokens.size**2 if reach is None else int(reach.sum()))
        assert cost.needed_flops == 4 * HEADS * 16 * cost.entries


def most_held(core: nn.Module, tokens: Tokens) -> int:
    """Bytes held at most while output and gradients are computed, beyond q, k and v."""
    leaves = [torch.randn(1, 1, tokens.size, 8, requires_grad=True) for _ in range(3)]
    core(*leaves, tokens).sum().backward()  # plans are kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        core(*leaves, tokens).sum().backward()
    held = most = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("spec", [*MECHANISMS, *SPARSE])
def test_no_square_of_scores_is_held(spec):
    sizes = Tokens((16, 16)), Tokens((32, 32))
    core = parse_spec(spec, {"implementation": "blocks"}).build(1, 8)
    small, large = (most_held(core, tokens) for tokens in sizes)
    assert large < 10 * small, "four times the tokens: 16 times where every pair is held"
    assert large < sizes[1].size ** 2 * 4


@every_spec
def test_forward_mode_derivatives_are_right_or_refused_but_never_zero(spec):
    tangents = [draw(*x.shape, seed=5 + index) for index, x in enumerate(qkv())]
    for implementation in implementations(spec):
        core, tensors = core_of(spec, implementation), qkv(scale=1.0)
        step = 1e-6
        ahead, back = (
            core(*(x + sign * step * t for x, t in zip(tensors, tangents, strict=True)), TOKENS) for sign in (1, -1)
        )
        wanted = (ahead - back) / (2 * step)
        if {implementation, core.cost(TOKENS, CPU).implementation} & {"fused", "blocks"}:
            with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward"):
                torch.func.jvp(lambda *x: core(*x, TOKENS), tuple(tensors), tuple(tangents))  # noqa: B023
            continue
        _, slope = torch.func.jvp(lambda *x: core(*x, TOKENS), tuple(tensors), tuple(tangents))  # noqa: B023
        torch.testing.assert_close(slope, wanted, atol=1e-6, rtol=1e-5)


@every_name
def test_torch_func_goes_through(spec):
    for implementation in implementations(spec):
        core, (q, k, v) = core_of(spec, implementation), qkv()

        def loss(q: Tensor) -> Tensor:
            return (core(q, k, v, TOKENS) * draw(*v.shape, seed=9)).sum()  # noqa: B023

        leaf = q.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(q), wanted, atol=1e-12, rtol=0)

        def total(q: Tensor) -> Tensor:
            return core(q, k, v, TOKENS).sum((0, 1, 2))  # noqa: B023

        rows = [torch.autograd.grad(total(leaf)[index], leaf)[0] for index in range(DIM)]
        torch.testing.assert_close(torch.func.jacrev(total)(q), torch.stack(rows), atol=1e-12, rtol=0)
        several = torch.stack([q, 2 * q, q.flip(0)])
        out = torch.func.vmap(lambda q: core(q, k, v, TOKENS))(several)  # noqa: B023
        torch.testing.assert_close(out, torch.stack([core(each, k, v, TOKENS) for each in several]), atol=1e-12, rtol=0)


@every_name
def test_second_derivatives_are_right_or_refused(spec):
    for implementation in implementations(spec):
        if implementation == "fused":
            continue  # torch's own
        core = core_of(spec, implementation)
        leaves = [leaf[:1, :1, :5].requires_grad_() for leaf in qkv(scale=0.5)]
        tokens = Tokens((2, 2), 1)
        if not fits(spec, tokens):
            tokens, leaves = TOKENS, [leaf[:1].requires_grad_() for leaf in qkv(scale=0.5)]
        if implementation == "blocks" or core.cost(tokens, CPU).implementation == "blocks":
            (grad,) = torch.autograd.grad(core(*leaves, tokens).sum(), leaves[0], create_graph=True)
            with pytest.raises(RuntimeError, match="second derivative: use implementation 'dense'"):
                grad.sum().backward()
        else:
            assert gradgradcheck(lambda *x: core(*x, tokens), leaves, fast_mode=True, atol=1e-4)  # noqa: B023


def test_attention_of_the_front_door_is_that_of_the_layers():
    q, k, v = qkv()
    for name in PATTERNS:
        pattern = parse_spec(name).pattern.on(TOKENS)
        torch.testing.assert_close(
            attention(q, k, v, "softmax", pattern), core_of(name)(q, k, v, TOKENS), atol=0, rtol=0
        )


@every_spec
def test_the_tensors_for_torchscript_are_those_of_the_state_dict(spec):
    core = build(spec)
    listed, state = core.tensors(), core.state_dict()
    assert len(listed) == len(state)
    assert all(one.data_ptr() == other.data_ptr() for one, other in zip(listed, state.values(), strict=True))


@every_name
def test_attn_drop_drops_weights_or_is_refused_where_there_are_none(spec):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "attn_drop_rate": 0.5}
    q, k, v = qkv()
    drop = nn.Dropout(0.5)
    if not parse_spec(spec).drops_weights:
        with pytest.raises(UserError, match=rf"attn_drop_rate=0.5: {spec} forms no weights to drop"):
            create_vit("vit_tiny_patch16_224", attention=spec, **sizes)
        return
    model = create_vit("vit_tiny_patch16_224", attention=spec, **sizes).train()
    images = draw(2, 3, 16, 16, dtype=torch.float32)
    assert (model.forward_features(images) != model.forward_features(images)).any()
    out = build(spec)(q, k, torch.ones_like(v), TOKENS, drop)
    assert out.std() > 0.1  # without dropout, rows of weights sum to 1
