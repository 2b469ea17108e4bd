"""create_vit(): a timm Vision Transformer whose attention is swapped, weights and all."""

import logging
import socket
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import build_sincos2d_pos_embed
from timm.models import load_state_dict
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vit_attn.attention import Attention, Mechanism, attention_layers, parse_attention
from vit_attn.attention.layer import current_key
from vit_attn.errors import UserError, one_line, unknown_name, user_errors
from vit_attn.files import user_path

POOLS = ("token", "avg", "avgmax", "max", "map", "prr")
POS_EMBEDS = ("learn", "sinusoidal", "none")
# Written by Lightning in front of the network's own keys (vit_attn.training.module.Classifier.net).
_CHECKPOINT_PREFIX = "net."
# In front of what a mechanism holds in a layer, such as α.
_CORE = ".attn.core."


def create_vit(
    name: str,
    *,
    attention: str | Sequence[str] = "softmax",
    attention_options: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    weights: str | Path | None = None,
    pos_embed: str = "learn",
    **timm_kwargs: Any,
) -> VisionTransformer:
    """Create a timm Vision Transformer with a chosen attention: an ordinary timm model, state-dict keys included.

    Args:
        name: a timm model built on timm's plain ``Attention`` over one token grid: ``vit_*``, ``deit*``, ….
        attention: a spec such as "entmax+strided", or a list of specs that the layers cycle through.
        attention_options: options of mechanisms, defaults for every layer: ``{"window": 8}``; ``python -m
            vit_attn.attention`` lists them.
        pretrained: load timm's weights for ``name``.
        weights: load a local safetensors file, a timm checkpoint or a checkpoint of this project instead.
        pos_embed: "learn" (timm's), "sinusoidal" (fixed, 2-D) or "none".
        timm_kwargs: of timm's model (``img_size``, ``patch_size``, ``num_classes``, ``embed_dim``, …).

    Raises:
        UserError: a model whose attention cannot be swapped, wrong options, or weights that cannot be had.
    """
    with user_errors():
        mechanisms = parse_attention(attention, attention_options)
    if pos_embed not in POS_EMBEDS:
        raise UserError(unknown_name("model.pos_embed", pos_embed, POS_EMBEDS))
    if pos_embed == "none":
        timm_kwargs["pos_embed"] = "none"
    pool = timm_kwargs.get("global_pool", "")
    if pool and pool not in POOLS:
        raise UserError(unknown_name("model.global_pool", pool, POOLS))
    if weights is not None and pretrained:
        raise UserError("model.weights and model.pretrained=true exclude each other: choose one")
    held: dict[str, Tensor] = {}
    if weights is not None:
        overlay, held = _read_weights(user_path("model.weights", str(weights)))
        if pos_embed == "none":
            overlay["state_dict"].pop("pos_embed", None)
        timm_kwargs |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    elif pretrained:
        _refuse_unless_vit(name)
        _check_weights_reachable(name)
        timm_kwargs["pretrained"] = True
    model = _create_timm(name, timm_kwargs, weights)
    _check_swappable(name, model, mechanisms)
    if weights is not None:
        _check_complete(model, overlay["state_dict"], weights)
    _swap_attention(model, mechanisms)
    if held:
        _load_mechanisms(model, held)
    if pos_embed == "sinusoidal":
        _fix_sinusoidal(name, model)
    return model


def _create_timm(name: str, kwargs: dict[str, Any], weights: str | Path | None) -> Any:
    if not timm.is_model(name.split(".")[0]):
        raise UserError(unknown_name("model.name", name, timm.list_models(["vit_*", "deit*"])))
    with _quiet_hub():
        try:
            return timm.create_model(name, **kwargs)
        except TypeError as error:
            # Other families take other arguments: then the family is what is wrong.
            _refuse_unless_vit(name)
            raise UserError(f"model {name}: {one_line(error)}") from error
        # What timm and the hub raise for a size that does not divide, an unknown tag or weights that do not fit.
        except (AssertionError, RuntimeError, ValueError, KeyError, OSError) as error:
            what = f"model.weights={weights}" if weights is not None else f"model {name}"
            raise UserError(f"{what}: {one_line(error)[:400]}") from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub's retry messages off the screen: the error that follows says it in one line."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_weights_reachable(name: str) -> None:
    """Refuse at once what would otherwise fail after a minute of retries.

    Raises:
        UserError: timm names no weights, or they are neither cached nor reachable.
    """
    advice = "give a local file by model.weights=<file>, or train from scratch with model.pretrained=false"
    try:
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    except RuntimeError as error:  # an unknown tag
        raise UserError(f"model {name}: {one_line(error)}") from error
    if cfg is not None and not cfg.has_weights:
        raise UserError(f"model.pretrained: timm has no weights for {name}: {advice}")
    if cfg is None or not cfg.hf_hub_id or urllib.request.getproxies():
        return
    files = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files):
        return
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"model.pretrained: the weights of {name} are not in the local cache and {endpoint.hostname} cannot be "
            f"reached ({one_line(error)}): {advice}"
        ) from error


def _read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a state dict, without unpickling code, as an overlay of timm's pretrained configuration.

    Returns:
        The overlay, and what mechanisms hold in a checkpoint of this project, which timm's model has no place for.
    """
    if not path.is_file():
        raise UserError(f"model.weights={path}: no such file")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # every kind of broken file raises its own kind of error
        why = "cannot be read, it is broken, cut short or no weights file"
        if "unsupported global" in f"{error} {error.__cause__}".lower():
            why = "refused, it holds more than tensors (it could run code)"
        raise UserError(f"model.weights={path}: {why}") from error
    if any(key.startswith(_CHECKPOINT_PREFIX) for key in state):
        ours = {key: value for key, value in state.items() if key.startswith(_CHECKPOINT_PREFIX)}
        state = {key.removeprefix(_CHECKPOINT_PREFIX): value for key, value in ours.items()}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.weights={path}: holds no state dict of tensors")
    state = {current_key(key): value for key, value in state.items()}
    held = {key: state.pop(key) for key in [key for key in state if _CORE in key]}
    overlay: dict[str, Any] = {"state_dict": state, "custom_load": False}
    # timm drops the head where the classes differ from what its configuration says of the source.
    head = state.get("head.weight")
    overlay["num_classes"] = 0 if head is None else head.shape[0]
    return overlay, held


def _check_complete(model: Any, state: dict[str, Tensor], weights: str | Path) -> None:
    """Refuse what timm takes with a warning as soon as the number of classes differs: weights of another model.

    Raises:
        UserError: tensors of the file that found no place, or parameters that the file has nothing for.
    """
    filtered = checkpoint_filter_fn(dict(state), model, adapt_layer_scale=True)
    strangers = sorted(set(model.state_dict()).symmetric_difference(filtered))
    strangers = [key for key in strangers if not key.startswith(("head.", "head_dist."))]
    # Another model.global_pool has its last norm elsewhere: it starts anew, as the head does.
    if not all(key.startswith(("norm.", "fc_norm.")) for key in strangers):
        raise UserError(
            f"model.weights={weights}: does not fit the model: {len(strangers)} tensors are in one and not in the "
            f"other, such as {', '.join(strangers[:3])}"
        )


@torch.no_grad()
def _load_mechanisms(model: nn.Module, held: dict[str, Tensor]) -> None:
    """Load what the mechanisms of a checkpoint hold into the layers that have a place for it."""
    for layer in attention_layers(model):
        prefix, own = f"blocks.{layer.layer}{_CORE}", layer.core.state_dict()
        for name, value in own.items():
            found = held.get(prefix + name)
            if found is not None and found.shape == value.shape and layer.core.inherits(name):
                value.copy_(found)


def _refuse_unless_vit(name: str) -> None:
    """Refuse another family before its weights are fetched or its arguments are blamed."""
    if not timm.is_model(name.split(".")[0]):
        return  # _create_timm knows the nearest name
    with torch.device("meta"):
        model = timm.create_model(name.split(".")[0])
    if not isinstance(model, VisionTransformer):
        _refuse(name, type(model).__name__ + " is not timm's VisionTransformer")


def _refuse(name: str, why: str) -> None:
    raise UserError(
        f"model {name}: its attention cannot be swapped: {why}. "
        "Models built on timm's plain Attention over one token grid work: vit_*, deit_*, deit3_*, …"
    )


def _check_swappable(name: str, model: Any, mechanisms: list[Mechanism]) -> None:
    """Refuse a model whose attention would be swapped in part, in vain or with another meaning.

    Raises:
        UserError: naming the model and what stands in the way.
    """
    if not isinstance(model, VisionTransformer):
        _refuse(name, type(model).__name__ + " is not timm's VisionTransformer")
    for block in model.blocks:
        if type(block) not in (Block, ResPostBlock):
            _refuse(name, f"its blocks are {type(block).__name__}")
        if type(block.attn) is not TimmAttention:
            _refuse(name, f"its attention is {type(block.attn).__name__}")
    others = [path for path, module in model.named_modules() if type(module) is TimmAttention]
    if len(others) != len(model.blocks):
        _refuse(name, f"it has {len(others)} attentions in {len(model.blocks)} blocks")
    if any(mechanism.positional for mechanism in mechanisms) and not isinstance(model.patch_drop, nn.Identity):
        raise UserError(
            "model.patch_drop_rate drops and reorders tokens, so a pattern loses its positions: set it to 0"
        )
    if len(mechanisms) > len(model.blocks):
        raise UserError(f"model.attention lists {len(mechanisms)} specs for {len(model.blocks)} layers")


class _DynamicGrid:
    """The patch grid of the image at hand, for models whose ``dynamic_img_size`` lets it change by call."""

    def __init__(self, patch_embed: Any) -> None:
        self._patch_embed = patch_embed
        self._nominal = self._seen = patch_embed.grid_size
        # A bound method, so that a deep copy of the model is hooked to the copy of this grid.
        patch_embed.register_forward_hook(self._read)

    def _read(self, module: nn.Module, args: Any, patches: Tensor) -> None:
        self._nominal = module.grid_size
        self._seen = (patches.shape[1], patches.shape[2])  # (B, H, W, C): timm flattens these later

    @property
    def grid_size(self) -> tuple[int, int]:
        """That of the last image, or of ``set_input_size`` where it came later."""
        nominal = self._patch_embed.grid_size
        return self._seen if nominal == self._nominal else nominal


def _swap_attention(model: Any, mechanisms: list[Mechanism]) -> None:
    grid = _DynamicGrid(model.patch_embed) if model.dynamic_img_size else model.patch_embed
    with user_errors("model.attention"):
        for depth, block in enumerate(model.blocks):
            block.attn = Attention(
                block.attn,
                mechanisms[depth % len(mechanisms)],
                num_prefix_tokens=model.num_prefix_tokens,
                grid=grid,
                layer=depth,
            )
        for layer in attention_layers(model):
            layer.mechanism.check(layer.tokens())


def _fix_sinusoidal(name: str, model: Any) -> None:
    """Put the fixed 2-D sine-cosine embedding where the learned one stood; prefix tokens get none."""
    if model.pos_embed is None:
        raise UserError(f"model {name} has no position embedding to replace: use model.pos_embed=learn")
    if model.embed_dim % 4:
        raise UserError(f"model.pos_embed=sinusoidal needs an embed_dim divisible by 4, not {model.embed_dim}")
    grid = [int(side) for side in model.patch_embed.grid_size]
    table = build_sincos2d_pos_embed(grid, dim=model.embed_dim)  # (patches, embed_dim)
    prefix = model.pos_embed.shape[1] - table.shape[0]
    full = torch.cat([torch.zeros(prefix, model.embed_dim), table])[None]
    model.pos_embed = nn.Parameter(full.to(model.pos_embed), requires_grad=False)
