"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vit_attn.errors import UserError

# Bytes; less than what file systems take, since the files in a folder need room for their names too.
_LONGEST_NAME, _LONGEST_PATH = 200, 3000


def user_path(key: str, value: Any) -> Path:
    """The path that a user has given for ``key``, with ``~`` replaced.

    Raises:
        UserError: nothing that a file or a folder can be called.
    """
    text = str(value)
    if value is None or not text or (isinstance(value, bool | Mapping | Sequence) and not isinstance(value, str)):
        raise UserError(f"{key} must be a path, not {value!r}")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{key}={text!r} is not valid UTF-8: rename it") from None
    if "\0" in text:
        raise UserError(f"{key}={text!r} holds a zero byte, which no file's name can")
    if len(encoded) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in encoded.split(b"/")):
        raise UserError(
            f"{key}={text[:60]!r}… is too long: names have up to {_LONGEST_NAME} bytes, paths up to {_LONGEST_PATH}"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={text!r}: nobody of that name has a home folder") from error


def folder_name(key: str, value: Any) -> str:
    """The name of a folder that a user has given for ``key``.

    Raises:
        UserError: more or less than one name, or one that a terminal or another tool would stumble over.
    """
    name = str(value)
    user_path(key, value)
    if not name.strip() or name != Path(name).name or name in (".", ".."):
        raise UserError(f"{key}={name!r} is not a folder's name: leave slashes out")
    if not name.isprintable() or name != name.strip() or name.startswith(("-", "~")):
        raise UserError(
            f"{key}={name!r} is no good name for a folder: no blank at its ends, no - or ~ in front, no line feed or "
            "other control character"
        )
    return name


@contextmanager
def whole_file(path: Path, mode: str = "w", *, keep: Path | None = None, **options: Any) -> Iterator[IO[Any]]:
    """Open a file that takes its place in one move, once it is written and on the disk.

    A reader never sees half of it, and whatever stops the writing, be it a full disk, a kill or a power cut, leaves
    what ``path`` held before.

    Args:
        path: the file.
        mode: "w" or "wb".
        keep: what ``path`` held is kept under this name.
        options: of ``open``.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
