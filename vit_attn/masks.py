"""Draw attention patterns as labelled masks, and count what they leave out.

    python -m vit_attn.masks                                          # every pattern over 8 x 8 patches
    python -m vit_attn.masks --size 1024 --patterns strided fixed     # 32 x 32 patches, window = stride = 32
    python -m vit_attn.masks --size 196 --prefix 1 --symmetric --npy labels --out masks/vit_b16

Writes one PNG per pattern and, up to 2048 tokens, ``all.png`` with all of them side by side.
See ``vit_attn/attention/patterns.py`` for the rules.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from math import isqrt
from pathlib import Path

import numpy as np

from vit_attn.arguments import Parser, whole
from vit_attn.attention.patterns import PATTERNS, Pattern, make_pattern, pattern_options
from vit_attn.errors import UserError, unknown_name, user_errors
from vit_attn.explain.figures import describe_pattern, mask_figure, masks_side_by_side
from vit_attn.explain.style import save_figure

# Tokens: at one pixel per entry, more make pictures that viewers refuse to open.
MAX_SIZE = 4096
MAX_SIZE_SIDE_BY_SIDE = 2048


def _parser() -> Parser:
    parser = Parser(prog="python -m vit_attn.masks", description="Draw attention patterns.", allow_abbrev=False)
    parser.add_argument("--size", type=whole(1, MAX_SIZE), default=64, help="patch tokens (default: %(default)s)")
    parser.add_argument(
        "--patterns", nargs="+", metavar="NAME", default=list(PATTERNS), help=f"of {', '.join(PATTERNS)}; default: all"
    )
    parser.add_argument("--window", type=whole(1, MAX_SIZE), help="tokens (default: the width of the patch grid)")
    parser.add_argument("--stride", type=whole(1, MAX_SIZE), help="tokens (default: the width of the patch grid)")
    parser.add_argument("--dilation", type=whole(1, MAX_SIZE), help="tokens (default: 2)")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--symmetric", dest="causal", action="store_false", help="see both sides, every pattern")
    direction.add_argument("--causal", action="store_true", help="see only earlier tokens, every pattern")
    parser.set_defaults(causal=None)
    parser.add_argument("--prefix", type=whole(0, MAX_SIZE), default=0, help="prefix tokens, e.g. 1 for a class token")
    parser.add_argument("--out", type=Path, default=Path("masks"), help="folder (default: %(default)s)")
    parser.add_argument("--npy", choices=["labels", "binary"], help="also save each mask: uint8 labels, or bool")
    return parser


def _make_patterns(args: argparse.Namespace) -> list[Pattern]:
    """Build the patterns asked for, each once, or refuse before any work."""
    names = list(dict.fromkeys(args.patterns))
    for name in names:
        if name not in PATTERNS:
            raise UserError(unknown_name("pattern", name, PATTERNS))
    if args.size + args.prefix > MAX_SIZE:
        raise UserError(f"--size {args.size} and --prefix {args.prefix} make more than {MAX_SIZE} tokens")
    read = {option for name in names for option in pattern_options(name)}
    missing = [f"--{key}" for key in ("window", "stride") if key in read and getattr(args, key) is None]
    if missing and isqrt(args.size) ** 2 != args.size:
        raise UserError(
            f"--size {args.size} is no square grid to take a width from: give {' and '.join(missing)}, "
            f"or a square such as {round(args.size**0.5) ** 2}"
        )
    options = {key: getattr(args, key) for key in ("window", "stride", "dilation", "causal")}
    with user_errors():
        return [make_pattern(n, num_tokens=args.size, num_prefix_tokens=args.prefix, **options) for n in names]


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
