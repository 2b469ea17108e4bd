"""The three numbers, against scipy and against cases worked by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from vit_attn.explain.statistics import AttentionStatistics, attention_statistics


def sparse_weights(batch_size: int, size: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch_size, 3, size, size, generator=generator, dtype=torch.float64)
    weights = weights * (weights > 0.4) + torch.eye(size, dtype=torch.float64)
    return weights / weights.sum(-1, keepdim=True)


def test_by_hand():
    # Entropies log 2, 0, 0: supports 2, 1, 1 of 3 keys.
    weights = torch.tensor([[[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]])
    found = attention_statistics(weights)
    assert found == pytest.approx({"zeros": 5 / 9, "entropy": math.log(2) / 3, "support": 4 / 3})
    assert all(type(value) is float for value in found.values())


def test_against_scipy():
    weights = sparse_weights(4)
    found = attention_statistics(weights)
    assert found["entropy"] == pytest.approx(scipy.stats.entropy(weights.numpy(), axis=-1).mean(), rel=1e-12)
    assert found["zeros"] == pytest.approx(np.mean(weights.numpy() == 0), rel=1e-12)
    assert found["support"] == pytest.approx((weights.numpy() != 0).sum(-1).mean(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_uniform_attention_has_the_entropy_of_the_uniform_distribution(dtype):
    weights = torch.full((2, 2, 64, 64), 1 / 64, dtype=dtype, requires_grad=True)
    assert attention_statistics(weights) == pytest.approx({"zeros": 0.0, "entropy": math.log(64), "support": 64.0})


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 3, 4, 4), ()])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="weights must be"):
        attention_statistics(torch.zeros(shape))
    with pytest.raises(ValueError, match="weights must be"):
        AttentionStatistics().update(0, torch.zeros(shape))


def test_batches_of_any_size_add_up_to_one():
    layers = {11: sparse_weights(9, seed=1), 2: sparse_weights(9, size=5, seed=2)}
    statistics = AttentionStatistics()
    assert statistics.compute() == {}
    for layer, weights in layers.items():
        for batch in weights.split(4):  # 4, 4 and 1 images
            statistics.update(layer, batch)
    found = statistics.compute()
    assert list(found) == [2, 11]
    for layer, weights in layers.items():
        assert found[layer] == pytest.approx(attention_statistics(weights), rel=1e-12)
    assert statistics.compute() == found  # reading changes nothing
