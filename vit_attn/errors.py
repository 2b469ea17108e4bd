"""What a user did wrong, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from vit_attn.attention.names import unknown_name

__all__ = [
    "LostRankError",
    "RunInUseError",
    "UserError",
    "on_every_process",
    "one_line",
    "printable",
    "unknown_name",
    "user_errors",
]


class UserError(Exception):
    """A mistake of the user or of their machine: shown as one line, no traceback."""

    status = 2  # of the process that ends of it: trying again will not mend it
    everywhere = False  # all processes of a run meet it, so that the first one may speak for them


class RunInUseError(UserError):
    """Another process is at this run."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again


class LostRankError(UserError):
    """Another process of the run is gone; what was saved is whole.

    Args:
        what: is known of it.
    """

    status = RunInUseError.status

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; the same command goes on from the last checkpoint")


def one_line(error: BaseException | str) -> str:
    """The message of ``error`` on a single line, without blank runs, as :func:`printable` has it."""
    text = printable(" ".join(str(error).split()))
    return text or type(error).__name__


def printable(text: str) -> str:
    """Escape what a terminal would obey instead of show, and what cannot be encoded; line feeds stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def on_every_process() -> Iterator[None]:
    """What is wrong within this block is wrong on every process of a run."""
    try:
        yield
    except UserError as error:
        error.everywhere = True
        raise


@contextmanager
def user_errors(doing: str = "") -> Iterator[None]:
    """Turn the errors that bad input causes (``ValueError``, ``OSError``) into :class:`UserError`.

    Args:
        doing: what was being done, put before the message ("reading x.ckpt").
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{doing}: {one_line(error)}" if doing else one_line(error)) from error
