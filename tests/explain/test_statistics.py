"""The four numbers, against scipy and against cases worked by hand."""

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
    layers[2][3:5, :, 2] = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)  # some queries have no distance
    places = {11: {"grid_size": (2, 3), "num_prefix_tokens": 1}, 2: {"grid_size": (2, 2), "num_prefix_tokens": 1}}
    statistics = AttentionStatistics()
    assert statistics.compute() == {}
    for layer, weights in layers.items():
        for batch in weights.split(4):  # 4, 4 and 1 images
            statistics.update(layer, batch, **places[layer])
    found = statistics.compute()
    assert list(found) == [2, 11]
    assert all("distance" in values for values in found.values())
    for layer, weights in layers.items():
        assert found[layer] == pytest.approx(attention_statistics(weights, **places[layer]), rel=1e-12)
    assert statistics.compute() == found  # reading changes nothing


def test_distance_by_hand():
    # A class token and 2 x 2 patches. Left out: what goes to the class token, and the last query, which gives it all.
    weights = torch.zeros(1, 1, 5, 5)
    weights[0, 0, 0] = 0.2
    weights[0, 0, 1, [0, 1, 4]] = torch.tensor([0.5, 0.25, 0.25])  # half of it to itself, half to the diagonal
    weights[0, 0, 2, 2] = 1.0
    weights[0, 0, 3, [1, 4]] = torch.tensor([0.5, 0.5])  # above it, and to its right
    weights[0, 0, 4, 0] = 1.0
    found = attention_statistics(weights, grid_size=(2, 2), num_prefix_tokens=1)
    assert found["distance"] == pytest.approx((math.sqrt(2) / 2 + 0 + 1) / 3)


def test_distance_on_a_grid_that_is_not_square_against_a_loop():
    weights, (height, width) = sparse_weights(2, size=2 + 3 * 5), (3, 5)
    expected = []
    for image, head, query in np.ndindex(2, 3, height * width):
        row = weights[image, head, 2 + query, 2:].numpy()
        far = [math.dist(divmod(query, width), divmod(key, width)) for key in range(height * width)]
        expected.append(np.average(far, weights=row))
    found = attention_statistics(weights, grid_size=(height, width), num_prefix_tokens=2)
    assert found["distance"] == pytest.approx(np.mean(expected), rel=1e-12)


def test_where_no_patch_attends_to_a_patch_there_is_no_distance():
    weights = torch.zeros(1, 1, 3, 3)
    weights[..., 0] = 1.0
    assert "distance" not in attention_statistics(weights, grid_size=(1, 2), num_prefix_tokens=1)
    assert "distance" not in attention_statistics(weights)
    with pytest.raises(ValueError, match="grid of 2x2 make 5 tokens, not 3"):
        attention_statistics(weights, grid_size=(2, 2), num_prefix_tokens=1)
