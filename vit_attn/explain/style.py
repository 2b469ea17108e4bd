"""One house style for every picture: colours that colour-blind readers can tell apart, text large enough to read.

Figures are built with matplotlib's object API, never with pyplot: no global state, no display, no figure left open.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vit_attn.attention.patterns import FORBIDDEN, GLOBAL, LOCAL, SECOND, SELF

DPI = 150
# Four steps of grey and blue that also differ in lightness, and an orange (Okabe and Ito, 2008) for what is
# outside the patch grid.
MASK_COLORS = {
    FORBIDDEN: "#ebebeb",  # light grey
    SELF: "#0b1f5c",  # dark blue
    LOCAL: "#4169e1",  # royal blue
    SECOND: "#56b4e9",  # sky blue
    GLOBAL: "#e69f00",  # orange
}
ZERO_COLOR = "#bdbdbd"  # a weight that is exactly 0, as against one that is small
WEIGHT_COLORMAP = "viridis"  # attention weights
SHARE_COLORMAP = "Blues"  # shares in [0, 1]
# What others are compared with, and things to tell apart: Okabe and Ito (2008), Tol's wine for the yellow that
# vanishes on white; the markers tell the same where a picture is printed in grey. The reference has the
# first marker for itself, and 7 and 11 have no common factor: no pair comes back before 77 things.
REFERENCE_COLOR = "#000000"
CATEGORY_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255")
CATEGORY_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "figure.titlesize": 14,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.07,  # inches
    "figure.constrained_layout.h_pad": 0.07,
    # Titles and class names are a user's text: a "$" in one is no formula.
    "text.usetex": False,
    "text.parse_math": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the style to the artists made inside; usable as a decorator, too."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float, *, dpi: float = DPI, placed: bool = True) -> Figure:
    """Make an empty figure in the house style.

    Args:
        width, height: in inches.
        dpi: pixels per inch, used when saving.
        placed: let matplotlib place the axes so that no text is clipped; if not, the caller does.
    """
    with house_style():
        return Figure(figsize=(width, height), dpi=dpi, layout="compressed" if placed else None)


def save_figure(fig: Figure, path: str | os.PathLike[str]) -> Path:
    """Write ``fig`` as a PNG, at its own dpi, and return the path; the folder is made if need be.

    The file appears whole or not at all: a reader, or a killed run, never meets half a picture.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with house_style():
            fig.savefig(partial, format="png", dpi="figure")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
