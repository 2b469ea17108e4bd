"""Checkpoints on disk: written whole or not at all, verified when they are read, the one before the last kept."""

import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from vit_attn.errors import UserError, one_line
from vit_attn.files import whole_file

log = logging.getLogger("vit_attn")

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class BrokenCheckpointError(UserError):
    """A checkpoint that is torn, corrupt or no checkpoint at all; one that holds code is refused otherwise."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin that writes and reads checkpoints, made so that no stop at any moment costs one.

    A checkpoint is written beside its place, forced to the disk and moved into place. ``last.ckpt`` becomes
    ``previous.ckpt`` as the next one takes its place.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint``; what ``path`` held is there until the new one is whole.

        Raises:
            UserError: it cannot be written; the file that was there stays.
        """
        path = Path(path)
        previous = path.with_name(PREVIOUS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, "wb", keep=previous if path.name == LAST else None) as file:
                _write(checkpoint, file)
        except OSError as error:
            kept = next((place for place in (path.with_name(LAST), previous) if place.exists()), None)
            state = f"{kept}, written before, is whole" if kept else "none was written before"
            raise UserError(
                f"checkpoint {path} cannot be written: {one_line(error.strerror or error)}; {state}. "
                "Once that is mended, the same command goes on from there"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without unpickling code; see :func:`load_checkpoint`."""
        return load_checkpoint(Path(path))


def _write(checkpoint: dict[str, Any], file: Any) -> None:
    """``torch.save``, whose writer hides the ``OSError`` of a full disk behind one of its own."""
    failed: list[OSError] = []

    class Watched(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                raise

    try:
        torch.save(checkpoint, Watched())  # type: ignore[arg-type]  # a writable file
    except (OSError, RuntimeError) as error:
        if failed:
            raise failed[0] from error
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project without unpickling code, and verify its checksums.

    Raises:
        BrokenCheckpointError: torn, corrupt, or no checkpoint.
        UserError: no such file, one that holds code, or not one of this project's.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        # torch.save keeps a CRC of every part, but torch.load does not look at it.
        with zipfile.ZipFile(path) as archive:
            # Nothing in it is compressed: what claims to be could unfold without bounds.
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()) or archive.testzip():
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every kind of broken file raises its own kind of error
        if "unsupported global" in str(error).lower():
            raise UserError(f"checkpoint {path}: refused, it holds more than plain data (it could run code)") from error
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"checkpoint {path}: cannot be read: {error.strerror}") from error
        raise BrokenCheckpointError(
            f"checkpoint {path}: cannot be read, it is broken, cut short or no checkpoint"
        ) from error
    if not isinstance(checkpoint, dict) or not {"vit_attn", "state_dict"} <= checkpoint.keys():
        raise UserError(f"checkpoint {path}: not made by vit_attn's train.py")
    return checkpoint


def newest(paths: Sequence[Path], *, set_aside: bool) -> tuple[Path, dict[str, Any]] | None:
    """Read the first checkpoint that is whole.

    Args:
        paths: from the newest to the oldest; those that are missing are passed over.
        set_aside: rename broken ones to "<name>.broken", so that they are neither read again nor overwritten.

    Returns:
        Its path and what it holds; None where there is nothing to go on from.

    Raises:
        UserError: two broken ones, which no torn write explains; or one that is whole and not to be used.
    """
    broken: list[Path] = []
    found = None
    for path in paths:
        try:
            found = (path, load_checkpoint(path)) if path.exists() else None
        except BrokenCheckpointError:
            broken.append(path)
        if found is not None:
            break
    if found is None and len(broken) > 1:
        raise UserError(
            f"no checkpoint of this run can be read: {' and '.join(map(str, broken))} are broken; "
            "overwrite=true starts the run anew"
        )
    for path in broken:
        aside = f"set aside as {_put_aside(path)}" if set_aside else "passed over"
        instead = (
            f"{found[0].name} is used" if found else "no earlier one is there, so the run starts from its beginning"
        )
        log.warning("%s is broken: %s; %s", path, aside, instead)
    return found


def _put_aside(path: Path) -> str:
    numbers = ("", *(f".{number}" for number in range(1, 1000)))
    free = (path.with_name(f"{path.name}.broken{number}") for number in numbers)
    place = next(place for place in free if not place.exists())
    path.rename(place)
    return place.name
