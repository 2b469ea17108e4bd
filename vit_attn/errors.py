"""What a user did wrong, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from vit_attn.attention.names import unknown_name

__all__ = ["UserError", "one_line", "unknown_name", "user_errors"]


class UserError(Exception):
    """A mistake of the user or of their machine: shown as one line, exit status 2, no traceback."""


def one_line(error: BaseException | str) -> str:
    """The message of ``error`` on a single line, without blank runs."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


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
