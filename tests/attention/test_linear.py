"""linear: the weights written out, entry by entry, and the numbers at which usual feature maps give out."""

import math

import pytest
import torch
from registered import draw, qkv
from torch import Tensor

from vit_attn.attention import Tokens, parse_spec
from vit_attn.attention.kinds.linear import elu_plus_one

TOKENS = Tokens((4, 4), 1)
FEATURES = {
    "elu": lambda x: x + 1 if x > 0 else math.exp(x),
    "relu": lambda x: max(x, 0) + 1e-6,
    "exp": math.exp,
}


def written_out(q: Tensor, k: Tensor, feature_map: str) -> Tensor:
    """(N, N) weights of q, k (N, D): φ(q)·φ(k) / (Σ φ(q)·φ(k) + ε), ε = 1e-6 for elu."""
    phi = FEATURES[feature_map]
    rows = []
    for i in q.tolist():
        row = [sum(phi(a) * phi(b) for a, b in zip(i, j, strict=True)) for j in k.tolist()]
        total = sum(row) + (1e-6 if feature_map == "elu" else 0)
        rows.append([value / total for value in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("feature_map", FEATURES)
def test_weights_and_output_are_those_written_out(feature_map):
    q, k, v = qkv()
    core = parse_spec(f"linear:feature_map:{feature_map}").build(2, 4)
    out, weights = core(q, k, v, TOKENS), core.weights(q, k, TOKENS)
    for image, head in ((0, 0), (1, 1)):
        wanted = written_out(q[image, head], k[image, head], feature_map)
        torch.testing.assert_close(weights[image, head], wanted, atol=1e-12, rtol=0)
        torch.testing.assert_close(out[image, head], wanted @ v[image, head], atol=1e-12, rtol=0)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 17).double(), atol=1e-5, rtol=0)


def test_no_feature_is_rounded_to_0():
    x = torch.linspace(-80, 80, 2001).requires_grad_()
    features = elu_plus_one(x)
    assert (features > 0).all()
    assert (torch.nn.functional.elu(x.detach()) + 1 == 0).any()  # as it is usually written
    torch.testing.assert_close(features.double(), torch.where(x > 0, x.double() + 1, x.double().exp()))
    (slope,) = torch.autograd.grad(features.sum(), x)
    torch.testing.assert_close(slope.double(), torch.where(x > 0, 1.0, x.double().exp()))


@pytest.mark.parametrize("scale", [10.0, 100.0, 1000.0])
def test_exp_neither_overflows_nor_loses_a_row(scale):
    q, k, v = qkv(dtype=torch.float32, scale=scale)
    out = parse_spec("linear:feature_map:exp").build(2, 4)(q, k, v, TOKENS)
    largest = v.amax(-2, keepdim=True)
    assert out.isfinite().all()
    assert (out <= largest + 1e-4).all()  # rows sum to 1
    # In the limit one key gets it all: the one whose feature with the query is the largest.
    best = (q.double()[..., :, None, :] + k.double()[..., None, :, :]).amax(-1).argmax(-1)
    if scale >= 1000:
        torch.testing.assert_close(out, v.gather(2, best[..., None].expand_as(v)), atol=1e-3, rtol=0)


def test_the_order_of_patches_does_not_matter():
    core, (q, k, v) = parse_spec("linear").build(2, 4), qkv()
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    shuffled = core(q[:, :, order], k[:, :, order], v[:, :, order], TOKENS)
    torch.testing.assert_close(shuffled, core(q, k, v, TOKENS)[:, :, order], atol=1e-12, rtol=0)


def test_a_wrong_feature_map_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown feature_map 'rely'. Did you mean 'relu'. Allowed: elu, relu, exp"):
        parse_spec("linear:feature_map:rely")


def test_parallel_queries_get_equal_rows_which_is_its_known_weakness():
    core = parse_spec("linear:feature_map:relu").build(1, 4)
    q = draw(1, 1, 1, 4).abs() * torch.arange(1, 18).double()[:, None]
    weights = core.weights(q, draw(1, 1, 17, 4, seed=1), TOKENS)
    torch.testing.assert_close(weights[0, 0, 1:], weights[0, 0, :1].expand(16, -1), atol=1e-5, rtol=0)
