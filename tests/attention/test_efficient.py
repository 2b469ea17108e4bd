"""efficient: the two softmaxes written out, and the scale that public code puts in between."""

from pathlib import Path

import torch
from registered import qkv

from vit_attn.attention import Tokens, parse_spec

ROOT = Path(__file__).parent.parent.parent
TOKENS = Tokens((4, 4), 1)


def test_weights_are_the_product_of_two_softmaxes():
    q, k, v = qkv()
    core = parse_spec("efficient").build(2, 4)
    features = torch.stack([q[..., i, :].exp() / q[..., i, :].exp().sum(-1, keepdim=True) for i in range(17)], -2)
    keys = torch.stack([k[..., d].exp() / k[..., d].exp().sum(-1, keepdim=True) for d in range(4)], -1)
    wanted = torch.einsum("bhid,bhjd->bhij", features, keys)
    torch.testing.assert_close(core.weights(q, k, TOKENS), wanted, atol=1e-13, rtol=0)
    torch.testing.assert_close(core(q, k, v, TOKENS), wanted @ v, atol=1e-13, rtol=0)


def test_rows_sum_to_1_without_a_denominator():
    q, k, _ = qkv(scale=30.0)
    weights = parse_spec("efficient").build(2, 4).weights(q, k, TOKENS)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 17).double(), atol=1e-13, rtol=0)
    # Public code multiplies q by D^-½ after its softmax: its rows sum to ½ here, and its output is half of this one.


def test_the_order_of_patches_does_not_matter():
    core, (q, k, v) = parse_spec("efficient").build(2, 4), qkv()
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    shuffled = core(q[:, :, order], k[:, :, order], v[:, :, order], TOKENS)
    torch.testing.assert_close(shuffled, core(q, k, v, TOKENS)[:, :, order], atol=1e-12, rtol=0)


def test_contributing_shows_it_as_it_is():
    shown = (ROOT / "CONTRIBUTING.md").read_text().split("```diff\n+++ b/")
    paths = []
    for block in shown[1:]:
        path, *lines = block.split("```")[0].splitlines()
        assert "\n".join(line.removeprefix("+") for line in lines) in (ROOT / path).read_text()
        paths.append(path)
    assert paths == ["vit_attn/attention/kinds/efficient.py", "tests/attention/test_efficient.py"]
