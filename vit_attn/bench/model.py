"""Whole training steps of a ViT, one attention against the other.

    python -m vit_attn.bench model                                              # 1,024 patches and a class token
    python -m vit_attn.bench model --attention softmax,strided --batch 4 --precision bf16

A step is forward, cross entropy, backward and AdamW, on a batch that stays the same. The share of attention is
measured beside it, in the same rounds: attention(q, k, v) alone, forward and backward, at a layer's own shape,
times the depth, divided by the step. The projections before and after it do not count as attention.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vit_attn.arguments import whole
from vit_attn.attention import IMPLEMENTATIONS, attention_layers
from vit_attn.bench.cases import make_inputs, step
from vit_attn.bench.options import positive_seconds
from vit_attn.bench.output import (
    Cell,
    Column,
    ConsoleProgress,
    Spread,
    Table,
    milliseconds,
    per_second,
    times_faster,
)
from vit_attn.bench.timing import Failed, Timing, interleave, ratio
from vit_attn.cost import model_cost, peak_memory
from vit_attn.errors import UserError
from vit_attn.models import create_vit

BASE_MODEL = "vit_tiny_patch16_224"  # timm's name; every size that matters is replaced
NUM_CLASSES = 10
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUICK = {"image_size": 8, "embed_dim": 48, "depth": 2, "batch": 2, "seconds_per_candidate": 1.0}
_COLUMNS = (
    Column("attention", words=True),
    Column("layers", words=True),
    Column("speed", "images/s"),
    Column("× first"),
    Column("step", "ms"),
    Column("memory", "MiB"),
    Column("forward", "GFLOPs/image"),
    Column("by entries", "GFLOPs/image"),
    Column("in attention", "%"),
    Column("note", words=True),
)


@dataclass(frozen=True)
class Shape:
    """Sizes of model and batch.

    Args:
        image_size, patch_size: in pixels.
        embed_dim: of a token, over all heads.
        dtype: what autocast computes in; float32 is without autocast.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    heads: int
    batch: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """One line for a table's title."""
        side = self.image_size // self.patch_size
        sizes = f"{side * side:,} patches and a class token, dim {self.embed_dim}, depth {self.depth}"
        return f"{sizes}, {self.heads} heads, batch {self.batch}, {str(self.dtype).removeprefix('torch.')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    implementations = ["auto", *IMPLEMENTATIONS]
    parser.add_argument(
        "--attention",
        default="softmax,strided,entmax15+strided",
        metavar="SPEC,…",
        help="normalizer, pattern or both as normalizer+pattern; the first is the reference (default: %(default)s)",
    )
    parser.add_argument("--implementation", choices=implementations, default="auto", help="default: %(default)s")
    parser.add_argument("--image-size", type=whole(1, 4096), default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--patch-size", type=whole(1, 4096), default=1, help="pixels (default: %(default)s)")
    parser.add_argument("--embed-dim", type=whole(1, 65536), default=192, help="default: %(default)s")
    parser.add_argument("--depth", type=whole(1, 1024), default=4, help="default: %(default)s")
    parser.add_argument("--heads", type=whole(1, 1024), default=3, help="default: %(default)s")
    parser.add_argument("--batch", type=whole(1, 65536), default=8, help="images (default: %(default)s)")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="default: %(default)s")
    parser.add_argument(
        "--seconds-per-candidate",
        type=positive_seconds,
        default=60.0,
        help="slower ones get fewer rounds (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> list[Table]:
    """Build every model, which refuses wrong names and sizes; then measure; return one table."""
    specs = list(dict.fromkeys(spec.strip() for spec in args.attention.split(",")))
    shape = Shape(
        image_size=args.image_size,
        patch_size=args.patch_size,
        embed_dim=args.embed_dim,
        depth=args.depth,
        heads=args.heads,
        batch=args.batch,
        dtype=PRECISIONS[args.precision],
    )
    nets = {spec: build(spec, shape, args.device, implementation=args.implementation) for spec in specs}
    steps = {spec: training_step(net, shape, seed=args.seed) for spec, net in nets.items()}
    alone = {_alone(spec): attention_alone(net, shape, seed=args.seed) for spec, net in nets.items()}
    results = interleave(
        {**steps, **alone},
        rounds=args.rounds,
        device=args.device,
        seconds_per_candidate=args.seconds_per_candidate,
        progress=ConsoleProgress(f"training steps, {shape}"),
    )
    table = Table(f"training steps, {shape}", _COLUMNS)
    for spec in specs:
        cells, timings = _row(spec, nets[spec], shape, results, results[specs[0]])
        if timings:
            cells["memory"] = peak_memory(steps[spec], args.device) / 2**20
        table.add(cells, timings)
    table.note(f"× first: how many times faster than {specs[0]}, in the same rounds.")
    table.note("in attention: attention(q, k, v) alone, forward and backward, times the depth, divided by the step.")
    table.note("by entries: the operations of the forward pass when forbidden entries cost nothing.")
    return [table]


def build(spec: str, shape: Shape, device: torch.device, *, implementation: str = "auto") -> nn.Module:
    """Create the model of one attention spec, ready to train.

    Raises:
        UserError: a spec, an implementation or sizes that do not fit.
    """
    if shape.embed_dim % shape.heads or shape.image_size % shape.patch_size:
        raise UserError(
            f"--heads {shape.heads} must divide --embed-dim {shape.embed_dim}, "
            f"and --patch-size {shape.patch_size} must divide --image-size {shape.image_size}"
        )
    net = create_vit(
        BASE_MODEL,
        attention=spec,
        attention_options={"implementation": implementation},
        img_size=shape.image_size,
        patch_size=shape.patch_size,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=NUM_CLASSES,
    )
    return net.to(device).train()


def training_step(net: nn.Module, shape: Shape, *, seed: int) -> Callable[[], object]:
    """One step to measure, on a fixed batch of noise. Gradients are freed at its end, so that its peak has them all."""
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    side = shape.image_size
    images = torch.randn(shape.batch, 3, side, side, generator=generator).to(device)
    labels = torch.randint(NUM_CLASSES, (shape.batch,), generator=generator).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def run_step() -> None:
        with _autocast(shape, device):
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run_step


def attention_alone(net: nn.Module, shape: Shape, *, seed: int) -> Callable[[], object]:
    """The attention of the first layer, forward and backward, at the shape and in the dtype it has in the model."""
    layer = attention_layers(net)[0]
    tokens = layer.tokens()
    qkv_shape = (shape.batch, shape.heads, tokens.size, layer.head_dim)
    inputs = make_inputs(qkv_shape, dtype=shape.dtype, device=next(net.parameters()).device, seed=seed)
    return step(lambda q, k, v: layer.core(q, k, v, tokens), inputs, "forward+backward")


def _autocast(shape: Shape, device: torch.device) -> Any:
    return nullcontext() if shape.dtype == torch.float32 else torch.autocast(device.type, dtype=shape.dtype)


def _alone(spec: str) -> str:
    return f"{spec}, attention alone"


def _row(
    spec: str, net: nn.Module, shape: Shape, results: dict[str, Timing | Failed], first: Timing | Failed
) -> tuple[dict[str, Cell], list[Timing]]:
    """The cells of one model but its memory, and the timings behind them; none where the step failed."""
    cost = model_cost(net, shape.image_size)
    cells: dict[str, Cell] = {
        "attention": spec,
        "layers": ", ".join(dict.fromkeys(cost["layers"])),
        "forward": cost["flops"] / 1e9,
        "by entries": cost["flops_by_entries"] / 1e9,
    }
    timing, alone = results[spec], results[_alone(spec)]
    if isinstance(timing, Failed):
        return {**cells, "note": timing.reason}, []
    cells |= {"speed": per_second(timing, shape.batch), "step": milliseconds(timing)}
    if isinstance(first, Timing):
        cells["× first"] = times_faster(timing, first)
    if isinstance(alone, Failed):
        return {**cells, "note": f"attention alone: {alone.reason}"}, [timing]
    cells["in attention"] = Spread(*(100 * shape.depth * share for share in ratio(alone, timing)))
    return cells, [timing, alone]
