"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


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
