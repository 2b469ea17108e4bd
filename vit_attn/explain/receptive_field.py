"""How far a patch can see after each layer, by what its mechanisms let it see."""

import torch
from torch import Tensor, nn

from vit_attn.attention import Attention, attention_layers


def receptive_field(net: nn.Module, *, relays: bool = True) -> list[float]:
    """Tell the share of the patches that a patch's output can depend on after layer 0, 1, …, mean over the patches.

    Exact for what the mechanisms allow, the residual connection included. A normalizer that gives exact zeros does not
    change it: which weights are 0 depends on the image, and here every allowed one may be another than 0.

    Args:
        net: from ``create_vit``.
        relays: let prefix tokens (class token, registers) pass on what they have seen. As they see and are seen by
            all, two layers then suffice for everything; False counts paths over patches alone.
    """
    shares: list[float] = []
    reached = torch.empty(0)  # (N, N): 1 where the row's token has seen something of the column's
    settled: object = None  # the mechanism whose layer added nothing: nor will the next one
    for layer in attention_layers(net):
        if shares and (shares[-1] == 1.0 or settled == layer.mechanism):
            shares.append(shares[-1])
            continue
        step = _step(layer, relays=relays)
        grown = (step @ reached > 0).to(step.dtype) if shares else step
        settled = layer.mechanism if torch.equal(grown, reached) else None
        reached = grown
        prefix = layer.num_prefix_tokens if relays else 0
        shares.append(float(reached[prefix:, prefix:].double().mean()))
    return shares


def first_reached(net: nn.Module, query: int, *, relays: bool = True) -> Tensor:
    """Tell for each patch after how many layers the output at patch ``query`` can depend on it.

    Args:
        net: from ``create_vit``.
        query: index of a patch in raster order.
        relays: see :func:`receptive_field`.

    Returns:
        (gh, gw) int64: 0 for the query itself, 1 after the first layer, …, -1 where the depth does not suffice.
    """
    layers = attention_layers(net)
    height, width = layers[0].grid_size
    prefix = layers[0].num_prefix_tokens if relays else 0
    first = torch.full((height * width,), -1)
    first[query] = 0
    owners = {layer.mechanism: layer for layer in layers}
    steps = {mechanism: _step(layer, relays=relays) for mechanism, layer in owners.items()}
    for depth in range(1, len(layers) + 1):
        reached = torch.zeros(1, prefix + height * width)
        reached[0, prefix + query] = 1
        for layer in reversed(layers[:depth]):  # from the output back to the input
            reached = (reached @ steps[layer.mechanism] > 0).to(reached.dtype)
        first[(reached[0, prefix:] > 0) & (first < 0)] = depth
    return first.unflatten(0, (height, width))


def _step(layer: Attention, *, relays: bool) -> Tensor:
    """(N, N) fp32, or over patches alone: 1 where a token's output depends on a token's input, through one layer."""
    skipped = 0 if relays else layer.num_prefix_tokens
    tokens = layer.tokens()
    reach = layer.core.reach(tokens)
    if reach is None:
        reach = torch.ones(tokens.size, tokens.size, dtype=torch.bool)
    reach = reach | torch.eye(tokens.size, dtype=torch.bool)  # the residual
    return reach[skipped:, skipped:].float()
