"""attention(): every normalizer over every pattern, against attention written out query by query."""

import entmax as package
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from vit_attn.attention import IMPLEMENTATIONS, PATTERNS, Pattern, attention, make_pattern

B, H, D, PREFIX, TOKENS = 2, 3, 4, 2, 9
N = PREFIX + TOKENS
ALPHA = 1.3
REFERENCES = {
    "softmax": lambda row, alpha: torch.softmax(row, -1),
    "sparsemax": lambda row, alpha: package.sparsemax(row, dim=-1),
    "entmax15": lambda row, alpha: package.entmax15(row, dim=-1),
    "entmax": lambda row, alpha: package.entmax_bisect(row, alpha, n_iter=100),
}


def lay(name: str, causal: bool | None = None) -> Pattern:
    return make_pattern(
        name, num_tokens=TOKENS, num_prefix_tokens=PREFIX, window=2, stride=4, dilation=2, causal=causal
    )


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(size: int = N) -> list[Tensor]:
    # Scores spread enough for the sparse normalizers to give zeros of their own.
    return [factor * draw(B, H, size, D, seed=seed) for seed, factor in enumerate((2.0, 2.0, 1.0))]


def reference(
    q: Tensor, k: Tensor, v: Tensor, normalizer: str, pattern: Pattern, alpha: float | Tensor, scale: float = D**-0.5
) -> tuple[Tensor, Tensor]:
    """One query at a time, over the keys that it may see and no others."""
    outputs, weights = [], []
    for query, allowed in enumerate(pattern.allowed()):
        scores = scale * (q[:, :, query, None] * k[:, :, allowed]).sum(-1)  # (B, H, keys)
        rows = REFERENCES[normalizer](scores, alpha)
        outputs.append((rows[..., None] * v[:, :, allowed]).sum(-2))
        weights.append(rows.new_zeros(*rows.shape[:2], pattern.size).masked_scatter(allowed, rows))
    return torch.stack(outputs, 2), torch.stack(weights, 2)


def takes(implementation: str, normalizer: str) -> bool:
    return implementation != "fused" or normalizer == "softmax"


CASES = [(normalizer, name, causal) for normalizer in REFERENCES for name in PATTERNS for causal in (True, False)]
every_case = pytest.mark.parametrize(("normalizer", "name", "causal"), CASES)
every_normalizer = pytest.mark.parametrize("normalizer", REFERENCES)
ACCEPTED = [(i, n) for i in ("auto", *IMPLEMENTATIONS) for n in REFERENCES if takes(i, n)]
every_implementation = pytest.mark.parametrize(("implementation", "normalizer"), ACCEPTED)


@every_case
def test_output_weights_and_gradients_equal_the_reference(normalizer, name, causal):
    pattern = lay(name, causal)
    leaves = [leaf.requires_grad_() for leaf in qkv()]
    wanted, wanted_weights = reference(*leaves, normalizer, pattern, ALPHA)
    wanted_grads = torch.autograd.grad((wanted * draw(B, H, N, D, seed=9)).sum(), leaves)

    out, weights = attention(*leaves, normalizer, pattern, ALPHA, return_weights=True)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(weights, wanted_weights, atol=1e-12, rtol=0)
    assert weights.shape == (B, H, N, N)
    assert (weights[..., ~pattern.allowed()] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N).double(), atol=1e-12, rtol=0)

    for implementation in ("auto", *IMPLEMENTATIONS):
        if takes(implementation, normalizer):
            out = attention(*leaves, normalizer, pattern, ALPHA, implementation=implementation)
            grads = torch.autograd.grad((out * draw(B, H, N, D, seed=9)).sum(), leaves)
            torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
            torch.testing.assert_close(grads, wanted_grads, atol=1e-10, rtol=0)


@every_implementation
def test_without_a_pattern_every_key_is_seen(implementation, normalizer):
    q, k, v = qkv()
    wanted, _ = reference(q, k, v, normalizer, lay("full"), ALPHA)
    for pattern in (None, lay("full")):
        out = attention(q, k, v, normalizer, pattern, ALPHA, implementation=implementation)
        torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
    fewer_queries = attention(q[:, :, :3], k, v, normalizer, None, ALPHA, implementation=implementation)
    torch.testing.assert_close(fewer_queries, wanted[:, :, :3], atol=1e-12, rtol=0)


def test_dense_softmax_equals_torch():
    q, k, v = qkv()
    mask = lay("strided").allowed()
    out = attention(q, k, v, pattern=lay("strided"), implementation="dense")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-12, rtol=0)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_forbidden_key_gets_nothing_however_low_the_scores_of_the_others(implementation, normalizer, dtype):
    q, k, v = (x.to(dtype) for x in qkv())
    q, k = 1e3 * q.abs(), -1e3 * k.abs()  # scores down to -1e7
    v[:, :, PREFIX + 1 :] = 1.0
    out = attention(q, k, v, normalizer, lay("strided"), ALPHA, implementation=implementation)
    seen = v[:, :, : PREFIX + 1]  # all that the first patch may see
    assert (out[:, :, PREFIX] <= seen.amax(2)).all()
    wanted, _ = reference(q.double(), k.double(), v.double(), normalizer, lay("strided"), ALPHA)
    torch.testing.assert_close(out.double(), wanted, atol=1e-9 if dtype == torch.float64 else 1e-5, rtol=0)


@every_implementation
@pytest.mark.parametrize("name", [name for name in PATTERNS if lay(name).sparsity > 0])
def test_a_query_does_not_notice_a_key_or_value_that_it_may_not_see(implementation, normalizer, name):
    pattern = lay(name)
    q, k, v = qkv()
    before = attention(q, k, v, normalizer, pattern, ALPHA, implementation=implementation)
    for key in range(PREFIX, N):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, :, key] = 1e4 * draw(B, H, D, seed=10)
        other_v[:, :, key] = 1e4
        after = attention(q, other_k, other_v, normalizer, pattern, ALPHA, implementation=implementation)
        blind = ~pattern.allowed()[:, key]
        assert torch.equal(after[:, :, blind], before[:, :, blind])
        assert not torch.equal(after[:, :, key], before[:, :, key])  # its own query does


@every_implementation
@pytest.mark.parametrize("name", [name for name in PATTERNS if lay(name).sparsity > 0])
def test_keys_and_values_that_no_query_of_the_loss_sees_get_gradient_exactly_0(implementation, normalizer, name):
    pattern = lay(name)
    q, k, v = (leaf.requires_grad_() for leaf in qkv())
    queries = [PREFIX, PREFIX + 1]
    out = attention(q, k, v, normalizer, pattern, ALPHA, implementation=implementation)
    out[:, :, queries].square().sum().backward()
    unseen = ~pattern.allowed()[queries].any(0)
    assert unseen.any()
    for leaf in (k, v):
        assert (leaf.grad[:, :, unseen] == 0).all()
        assert (leaf.grad[:, :, queries] != 0).any()


@pytest.mark.parametrize("name", ["full", "strided"])
def test_each_head_has_its_own_alpha(name):
    pattern, alpha = lay(name), torch.tensor([1.05, 1.5, 2.0], dtype=torch.float64)
    q, k, v = qkv()
    out, weights = attention(q, k, v, "entmax", pattern, alpha, return_weights=True)
    for head in range(H):
        one = slice(head, head + 1)
        wanted = reference(q[:, one], k[:, one], v[:, one], "entmax", pattern, float(alpha[head]))
        torch.testing.assert_close((out[:, one], weights[:, one]), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("normalizer", ["softmax", "entmax15", "sparsemax"])
def test_gradcheck(normalizer):
    pattern = make_pattern("strided", num_tokens=4, num_prefix_tokens=1, window=1, stride=2)
    leaves = [draw(1, 2, 5, 3, seed=seed).requires_grad_() for seed in range(3)]
    assert gradcheck(lambda q, k, v: attention(q, k, v, normalizer, pattern, implementation="dense"), leaves)


def test_gradcheck_to_alpha_per_head():
    pattern = make_pattern("strided", num_tokens=4, num_prefix_tokens=1, window=1, stride=2)
    leaves = [draw(1, 2, 5, 3, seed=seed).requires_grad_() for seed in range(3)]
    alpha = torch.tensor([1.2, 1.8], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda q, k, v, a: attention(q, k, v, "entmax", pattern, a), (*leaves, alpha))


@every_implementation
def test_permuting_the_batch_permutes_the_output(implementation, normalizer):
    q, k, v = (draw(5, H, N, D, seed=seed) for seed in range(3))
    order = torch.tensor([3, 1, 4, 0, 2])
    out = attention(q, k, v, normalizer, lay("fixed"), ALPHA, implementation=implementation)
    permuted = attention(q[order], k[order], v[order], normalizer, lay("fixed"), ALPHA, implementation=implementation)
    torch.testing.assert_close(permuted, out[order], atol=1e-13, rtol=0)


@every_implementation
def test_shifting_every_key_shifts_the_scores_of_a_row_alike_and_changes_nothing(implementation, normalizer):
    q, k, v = qkv()
    plain, shifted = (
        attention(q, keys, v, normalizer, lay("strided"), ALPHA, implementation=implementation)
        for keys in (k, k + 50 * draw(D, seed=11))
    )
    torch.testing.assert_close(shifted, plain, atol=1e-10, rtol=0)


@every_normalizer
def test_scale_multiplies_the_scores(normalizer):
    q, k, v = qkv()
    wanted, _ = reference(q, k, v, normalizer, lay("strided"), ALPHA, scale=0.1)
    for implementation in IMPLEMENTATIONS:
        if takes(implementation, normalizer):
            out = attention(q, k, v, normalizer, lay("strided"), ALPHA, scale=0.1, implementation=implementation)
            torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)


@every_implementation
@pytest.mark.parametrize("name", ["full", "strided"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_lower_precision_is_close_and_keeps_its_dtype(implementation, normalizer, name, dtype, atol):
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv())
    out = attention(q, k, v, normalizer, lay(name), ALPHA, implementation=implementation)
    wanted, _ = reference(q.double(), k.double(), v.double(), normalizer, lay(name), ALPHA)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, atol=atol, rtol=0)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)


@every_normalizer
def test_weights_of_half_precision_inputs_are_computed_in_fp32(normalizer):
    # Scores of 4 · 300² overflow fp16, and bf16 has no digits left to tell them apart.
    for dtype, factor in ((torch.float16, 300), (torch.bfloat16, 1)):
        q, k, v = (x.to(dtype) for x in qkv())
        q, k = (q.sign() * factor, k.sign() * factor) if factor > 1 else (q, k)
        _, weights = attention(q, k, v, normalizer, lay("strided"), ALPHA, scale=1.0, return_weights=True)
        _, wanted = reference(q.double(), k.double(), v.double(), normalizer, lay("strided"), ALPHA, scale=1.0)
        torch.testing.assert_close(weights.double(), wanted, atol=1e-5, rtol=0)


@every_normalizer
def test_autocast_does_not_lower_the_precision_of_dense(normalizer):
    q, k, v = (x.float() for x in qkv())
    outside = attention(q, k, v, normalizer, lay("strided"), ALPHA, return_weights=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention(q, k, v, normalizer, lay("strided"), ALPHA, return_weights=True)
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])


@every_implementation
def test_dropout_acts_on_the_weights_while_training(implementation, normalizer):
    torch.manual_seed(0)
    q, k, _ = qkv()
    v = torch.eye(N, dtype=torch.float64).expand(B, H, N, N)  # so that the output is the weights
    weights = attention(q, k, v, normalizer, lay("strided"), ALPHA, implementation="dense")
    drop = nn.Dropout(0.25)
    out = attention(q, k, v, normalizer, lay("strided"), ALPHA, implementation=implementation, attn_drop=drop)
    kept = out > 0
    torch.testing.assert_close(out[kept], weights[kept] / 0.75)
    assert 0.6 < kept.sum() / (weights > 0).sum() < 0.9
    drop.eval()
    out = attention(q, k, v, normalizer, lay("strided"), ALPHA, implementation=implementation, attn_drop=drop)
    torch.testing.assert_close(out, weights)


def test_returned_weights_are_those_after_dropout():
    torch.manual_seed(0)
    q, k, v = qkv()
    out, weights = attention(q, k, v, attn_drop=nn.Dropout(0.5), return_weights=True)
    assert (weights == 0).any()
    torch.testing.assert_close(weights @ v, out)


@every_implementation
def test_a_pattern_first_used_in_inference_mode_can_be_trained_with(implementation, normalizer):
    pattern = lay("strided", causal=False)
    q, k, v = qkv()
    with torch.inference_mode():
        attention(q, k, v, normalizer, pattern, ALPHA, implementation=implementation)
    q.requires_grad_()
    attention(q, k, v, normalizer, pattern, ALPHA, implementation=implementation).sum().backward()
    assert q.grad.isfinite().all()


@every_implementation
def test_a_name_stands_for_the_pattern_over_a_square_grid(implementation, normalizer):
    q, k, v = qkv(9)
    wanted, _ = reference(q, k, v, normalizer, make_pattern("strided", num_tokens=9, window=3, stride=3), ALPHA)
    out = attention(q, k, v, normalizer, "strided", ALPHA, implementation=implementation)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"normalizer": "softmaxx"}, "unknown normalizer 'softmaxx'. Did you mean 'softmax'"),
        ({"implementation": "dens"}, "unknown implementation 'dens'. Did you mean 'dense'"),
        ({"implementation": "flash"}, "Allowed: auto, dense, fused"),
        ({"implementation": "fused", "normalizer": "entmax15"}, "'fused' computes softmax only, not 'entmax15'"),
        ({"implementation": "fused", "return_weights": True}, "'fused' never forms the weights"),
        ({"pattern": "stridded"}, "unknown pattern 'stridded'. Did you mean 'strided'"),
        ({"pattern": "strided"}, "11 tokens are no square grid"),
        ({"pattern": make_pattern("causal", num_tokens=N - 1)}, "a pattern over 10 tokens met 11 queries, 11 keys"),
        ({"normalizer": "entmax", "alpha": 1.0}, r"alpha must lie in \(1, 2\], not 1.0"),
        ({"normalizer": "entmax", "alpha": 2.5}, r"alpha must lie in \(1, 2\], not 2.5"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        attention(*qkv(), **options)


def test_a_pattern_refuses_fewer_queries_than_keys():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="a pattern over 11 tokens met 3 queries, 11 keys"):
        attention(q[:, :, :3], k, v, pattern=lay("strided"))


def test_alpha_is_not_read_by_the_other_normalizers():
    q, k, v = qkv()
    assert torch.equal(attention(q, k, v, "entmax15", alpha=7.0), attention(q, k, v, "entmax15"))
