"""Draw attention patterns as labelled masks, and count what they leave out.

    python -m vit_attn.masks                                          # every pattern over 8 x 8 patches
    python -m vit_attn.masks --size 1024 --patterns strided fixed     # 32 x 32 patches, window = stride = 32
    python -m vit_attn.masks --size 196 --prefix 1 --symmetric --npy labels --out masks/vit_b16
    python -m vit_attn.masks --grid 16x32 --patterns axial neighborhood --kernel 5

Writes one PNG per pattern and, up to 2048 tokens, ``all.png`` with all of them side by side.
See ``python -m vit_attn.attention`` for the rules.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from vit_attn.arguments import Parser, whole
from vit_attn.attention import PATTERNS, Pattern, Tokens, make_pattern
from vit_attn.errors import UserError, unknown_name, user_errors
from vit_attn.explain.figures import describe_pattern, mask_figure, masks_side_by_side
from vit_attn.explain.style import save_figure

# Tokens: at one pixel per entry, more make pictures that viewers refuse to open.
MAX_SIZE = 4096
MAX_SIZE_SIDE_BY_SIDE = 2048
# Of all patterns, each a flag; causal has two.
_OPTIONS = list(dict.fromkeys(key for cls in PATTERNS.values() for key in cls.options() if key != "causal"))


def _parser() -> Parser:
    parser = Parser(prog="python -m vit_attn.masks", description="Draw attention patterns.", allow_abbrev=False)
    parser.add_argument("--size", type=whole(1, MAX_SIZE), help="patch tokens, a square of them (default: 64)")
    parser.add_argument(
        "--grid", type=_read_grid, metavar="HxW", help="rows and columns of patch tokens, instead of --size"
    )
    parser.add_argument(
        "--patterns", nargs="+", metavar="NAME", help=f"of {', '.join(PATTERNS)}; default: all that the grid allows"
    )
    for key in _OPTIONS:
        owners = {name: cls.options()[key] for name, cls in PATTERNS.items() if key in cls.options()}
        helps = list(dict.fromkeys(each.metadata["help"] for each in owners.values()))
        one = next(iter(owners.values()))
        reading: dict[str, Any] = {"type": whole(one.metadata["least"] or 0, MAX_SIZE)}
        if isinstance(one.default, bool):
            reading = {"action": "store_true", "default": None}
        parser.add_argument(f"--{key}", **reading, help=f"{'; '.join(helps)} ({', '.join(owners)})")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--symmetric", dest="causal", action="store_false", help="see both sides, every pattern")
    direction.add_argument("--causal", action="store_true", help="see only earlier tokens, every pattern")
    parser.set_defaults(causal=None)
    parser.add_argument("--prefix", type=whole(0, MAX_SIZE), default=0, help="prefix tokens, e.g. 1 for a class token")
    parser.add_argument("--out", type=Path, default=Path("masks"), help="folder (default: %(default)s)")
    parser.add_argument("--npy", choices=["labels", "binary"], help="also save each mask: uint8 labels, or bool")
    return parser


def _read_grid(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and 1 <= int(height) * int(width) <= MAX_SIZE):
        raise argparse.ArgumentTypeError(
            f"must be rows x columns, as in 8x8, of at most {MAX_SIZE} tokens, not {text!r}"
        )
    return int(height), int(width)


def _make_patterns(args: argparse.Namespace) -> list[Pattern]:
    """Build the patterns asked for, each once, or refuse before any work; of all, those that the grid allows."""
    names = list(dict.fromkeys(args.patterns or PATTERNS))
    for name in names:
        if name not in PATTERNS:
            raise UserError(unknown_name("pattern", name, PATTERNS))
    if args.grid is not None and args.size not in (None, args.grid[0] * args.grid[1]):
        raise UserError(f"--size {args.size} and --grid {args.grid[0]}x{args.grid[1]} differ: give one of them")
    size = args.size or (64 if args.grid is None else args.grid[0] * args.grid[1])
    if size + args.prefix > MAX_SIZE:
        raise UserError(f"--size {size} and --prefix {args.prefix} make more than {MAX_SIZE} tokens")
    options = {key: getattr(args, key) for key in (*_OPTIONS, "causal")}
    if args.grid is None and isqrt(size) ** 2 != size:
        row = Tokens((1, size))
        flat = [PATTERNS[name]() for name in names if not PATTERNS[name].needs_grid]
        needed = dict.fromkeys(f"--{key}" for each in flat for key in each.defaults(row) if options[key] is None)
        missing = " and ".join(needed) or ("--grid" if args.patterns and len(flat) < len(names) else "")
        if missing:
            raise UserError(
                f"--size {size} is no square grid to take a width from: give {missing}, "
                f"or a square such as {round(size**0.5) ** 2}"
            )
    sizes = {"num_tokens": size, "num_prefix_tokens": args.prefix, "grid_size": args.grid}
    patterns = []
    for name in names:
        try:
            patterns.append(make_pattern(name, **sizes, **options))
        except ValueError as error:
            if args.patterns:
                raise UserError(str(error)) from error
            print(f"left out {name}: {error}")
    return patterns


def _write(patterns: Sequence[Pattern], out: Path, npy: str | None) -> list[Path]:
    paths = []
    for pattern in patterns:
        paths.append(save_figure(mask_figure(pattern), out / f"{pattern.name}.png"))
        if npy is not None:
            mask = pattern.labels() if npy == "labels" else pattern.allowed()
            paths.append(out / f"{pattern.name}.npy")
            np.save(paths[-1], mask.numpy(), allow_pickle=False)
    if patterns[0].size <= MAX_SIZE_SIDE_BY_SIDE:
        paths.append(save_figure(masks_side_by_side(patterns), out / "all.png"))
    return paths


def _table(patterns: Sequence[Pattern]) -> str:
    """One aligned line per pattern; the work is that of the products of scores, N² against the entries."""
    rows = [("pattern", "options", "sparsity", "entries", "less work")]
    for pattern in patterns:
        work = f"{pattern.size**2 / pattern.entries:.1f}×"
        sparsity = f"{100 * pattern.sparsity:.4f} %"
        rows.append((pattern.name, describe_pattern(pattern), sparsity, str(pattern.entries), work))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after one line about what was wrong."""
    try:
        args = _parser().parse_args(argv)
        patterns = _make_patterns(args)
        print(_table(patterns))
        with user_errors(f"cannot write to --out {os.fspath(args.out)!r}"):
            paths = _write(patterns, args.out, args.npy)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"wrote {path}")
    if patterns[0].size > MAX_SIZE_SIDE_BY_SIDE:
        print(f"left out all.png: too large for more than {MAX_SIZE_SIDE_BY_SIDE} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
