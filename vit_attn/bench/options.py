"""Options that the suites share, and the checks that refuse a wrong value in one line before any work."""

import argparse
from collections.abc import Callable, Iterable
from math import isqrt
from pathlib import Path

import torch

from vit_attn.arguments import whole
from vit_attn.errors import UserError, unknown_name, user_errors

PLOT_FORMATS = ("png", "svg", "pdf")


def positive_seconds(text: str) -> float:
    """Read a number of seconds above 0; for argparse's ``type``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return value


def names(kind: str, allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """Read names with commas between them, each once, all of them allowed; for argparse's ``type``."""
    known = list(allowed)

    def parse(text: str) -> list[str]:
        asked = [name.strip() for name in text.split(",")]
        for name in asked:
            if name not in known:
                raise argparse.ArgumentTypeError(unknown_name(kind, name, known))
        return list(dict.fromkeys(asked))

    return parse


def square_sizes(text: str) -> list[int]:
    """Read token numbers with commas between them, ascending; squares, so that a patch grid gives the patterns'
    defaults; for argparse's ``type``.
    """
    sizes = [whole(4, 65536)(size.strip()) for size in text.split(",")]
    for size in sizes:
        if isqrt(size) ** 2 != size:
            nearest = round(size**0.5) ** 2
            raise argparse.ArgumentTypeError(f"{size} tokens are no square grid; the nearest is {nearest}")
    return sorted(set(sizes))


def plot_path(text: str) -> Path:
    """Read the path of a picture; for argparse's ``type``."""
    path = Path(text)
    if path.suffix.removeprefix(".").lower() not in PLOT_FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} must end in .{', .'.join(PLOT_FORMATS)}")
    return path


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every suite takes."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is")
    parser.add_argument("--threads", type=whole(1, 1024), help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=whole(1, 10_000), default=9, help="measurements (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, with the seconds of every round")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables for docs/benchmarks.md")


def resolve_device(name: str) -> torch.device:
    """Turn auto, cpu or cuda into a device.

    Raises:
        UserError: cuda where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is available; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_writable(option: str, path: Path) -> None:
    """Find out before an hour of measuring whether its result can be written; the folder is made if need be.

    Raises:
        UserError: it cannot.
    """
    with user_errors(f"cannot write {option} {str(path)!r}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
