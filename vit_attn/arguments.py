"""What the commands without Hydra share: errors of one line, and whole numbers within bounds."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from vit_attn.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
            UserError: always.
        """
        raise UserError(message)


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """Read a whole number within these bounds; for argparse's ``type``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} to {highest}, not {text!r}")
        return int(text)

    return parse
