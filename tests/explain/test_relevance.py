"""Rollout and gradient × attention, against cases worked by hand and against products written out."""

import numpy as np
import pytest
import torch

from vit_attn.explain.relevance import attention_rollout, gradient_attention


def random_weights(layers, batch_size=2, heads=3, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, batch_size, heads, size, size)
    return list(torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1))


def test_rollout_of_two_tokens_by_hand():
    # Two heads whose mean is [[1/2, 1/2], [0, 1]]: with the residual [[3/4, 1/4], [0, 1]]; then a layer that swaps.
    first = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]])
    second = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]] * 2])  # with the residual all 1/2
    expected = torch.tensor([[[3 / 8, 5 / 8], [3 / 8, 5 / 8]]])
    torch.testing.assert_close(attention_rollout([first, second]), expected, rtol=0, atol=1e-7)


def test_rollout_of_three_tokens_by_hand():
    # Each token looks at the one before it, the first at itself: half moves on by one step a layer.
    shift = torch.tensor([[[[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]]])
    twice = torch.tensor([[[1.0, 0, 0], [0.75, 0.25, 0], [0.25, 0.5, 0.25]]])
    torch.testing.assert_close(attention_rollout([shift, shift]), twice, rtol=0, atol=1e-7)


def test_rollout_is_the_product_of_the_layers():
    weights = random_weights(4)
    rolled = attention_rollout(weights)
    mixed = [0.5 * layer.numpy().mean(1) + 0.5 * np.eye(5) for layer in weights]
    for image in range(2):
        expected = np.linalg.multi_dot([layer[image] for layer in reversed(mixed)])
        np.testing.assert_allclose(rolled[image].numpy(), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 5, dtype=torch.float64), rtol=0, atol=1e-14)


def test_rollout_normalizes_rows_that_do_not_sum_to_one():
    halved = [layer / 2 for layer in random_weights(2)]
    sums = attention_rollout(halved).sum(-1)
    torch.testing.assert_close(sums, torch.ones(2, 5, dtype=torch.float64), rtol=0, atol=1e-14)


def test_gradient_attention_by_hand():
    # Layer 1: head 0 keeps 0.5 * 2 at (0, 1), head 1's gradient is negative there and counts as 0: mean 0.5.
    weights = torch.tensor([[[[0.5, 0.5], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]])
    gradients = torch.tensor([[[[0.0, 2.0], [4.0, 0.0]], [[1.0, -3.0], [0.0, 5.0]]]])
    once = gradient_attention([weights], [gradients])
    torch.testing.assert_close(once, torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]), rtol=0, atol=0)
    # Layer 2: mean over two heads of (w g)+ is [[0, 0], [3, 0]], so row 1 takes three times row 0.
    second = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]] * 2])
    slope = torch.tensor([[[[0.0, 7.0], [2.0, 0.0]], [[-1.0, 0.0], [4.0, 0.0]]]])
    twice = gradient_attention([weights, second], [gradients, slope])
    torch.testing.assert_close(twice, torch.tensor([[[1.0, 0.5], [3.0, 2.5]]]), rtol=0, atol=0)


def test_gradient_attention_is_the_product_of_identity_plus_each_layer():
    weights, gradients = random_weights(3), [layer - 0.2 for layer in random_weights(3, seed=1)]
    relevance = gradient_attention(weights, gradients)
    for image in range(2):
        expected = np.eye(5)
        for layer, gradient in zip(weights, gradients, strict=True):
            raising = np.maximum(layer[image].numpy() * gradient[image].numpy(), 0).mean(0)
            expected = (np.eye(5) + raising) @ expected
        np.testing.assert_allclose(relevance[image].numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    weights = [layer.to(dtype) for layer in random_weights(2)]
    assert attention_rollout(weights).dtype == gradient_attention(weights, weights).dtype == torch.float32
