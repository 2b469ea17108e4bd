"""From attention weights over tokens to maps over the image."""

import torch
from torch import Tensor, nn


def reads_class_token(net: nn.Module) -> bool:
    """Whether the prediction is read from a class token; a model that pools its patches may have one all the same."""
    return bool(getattr(net, "has_class_token", False)) and getattr(net, "global_pool", "token") == "token"


def patch_maps(weights: Tensor, *, num_prefix_tokens: int, has_class_token: bool, grid_size: tuple[int, int]) -> Tensor:
    """Lay the attention to the patch tokens out on the patch grid: (B, H, gh, gw), at least fp32.

    With a class token: its row, what the prediction looks at. Without: the mean over the patch queries, how
    much each patch is looked at. Values are the weights as they are, not renormalized: a map sums to less than
    1 where part of the attention goes to prefix tokens, so maps of different layers can be compared.

    Args:
        weights: (B, H, N, N) with N = num_prefix_tokens + gh * gw, rows are queries.
        num_prefix_tokens: tokens before the patch grid; the class token, where there is one, comes first.
        has_class_token: whether token 0 is a class token that the prediction is read from.
        grid_size: (gh, gw), patches in raster order.

    Raises:
        ValueError: the numbers of tokens do not fit each other.
    """
    height, width = grid_size
    size = num_prefix_tokens + height * width
    if weights.ndim != 4 or weights.shape[2:] != (size, size):
        raise ValueError(
            f"weights must be (B, H, {size}, {size}) for {num_prefix_tokens} prefix tokens and a grid of "
            f"{height}x{width}, not {tuple(weights.shape)}"
        )
    if has_class_token and num_prefix_tokens < 1:
        raise ValueError("a class token is a prefix token: num_prefix_tokens must be at least 1, not 0")
    queries = weights[:, :, :1] if has_class_token else weights[:, :, num_prefix_tokens:]
    to_patches = queries[..., num_prefix_tokens:].to(torch.promote_types(weights.dtype, torch.float32))
    return to_patches.mean(dim=2).unflatten(-1, grid_size)  # (B, H, gh * gw) -> (B, H, gh, gw)
