"""What the commands without Hydra share: errors of one line, and whole numbers within bounds."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser

from vit_attn.config import refuse_secrets
from vit_attn.errors import UserError, one_line


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line that holds no secret."""
        refuse_secrets(sys.argv[1:] if args is None else list(args))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
            UserError: always.
        """
        raise UserError(one_line(message))


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse flags that Hydra's own parser does not take: it would print its usage.

    Raises:
        UserError: a flag that does not exist, or lacks its value.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(message)

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """Read a whole number within these bounds; for argparse's ``type``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} to {highest}, not {text!r}")
        return int(text)

    return parse
