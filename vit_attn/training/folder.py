"""A run on disk: experiments/<experiment_name>/<run_name>/."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vit_attn.config import differences, plain, without_secrets
from vit_attn.console import is_first_process, write_log_to
from vit_attn.errors import RunInUseError, UserError, one_line, user_errors
from vit_attn.files import folder_name, user_path, whole_file
from vit_attn.training.checkpoint import BEST, LAST, PREVIOUS, newest

_ORPHANS_SECONDS = 15
# Beside the runs of an experiment: what vit_attn.report writes.
REPORT = "report"


class RunFolder:
    """Paths of a run, and the rules for going on with one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.checkpoints = root / "checkpoints"
        self.last = self.checkpoints / LAST
        self.previous = self.checkpoints / PREVIOUS
        self.best = self.checkpoints / BEST
        self.logs = root / "logs"
        self.results = root / "results"
        self.attention = self.results / "attention"
        self.status = self.results / "status.json"
        self.skipped = self.results / "skipped_batches.json"

    @classmethod
    def of(cls, config: DictConfig) -> "RunFolder":
        """Find a run's folder, and check that the run may use it; nothing is written.

        Raises:
            UserError: the folder belongs to another run, or cannot be written.
        """
        experiment, run = (folder_name(key, config[key]) for key in ("experiment_name", "run_name"))
        if run == REPORT:
            raise UserError(f"run_name={REPORT}: that folder is for the experiment's report; choose another name")
        folder = cls(user_path("experiments_dir", config.experiments_dir) / experiment / run)
        with user_errors("experiments_dir"):
            nearest = next(path for path in (folder.root, *folder.root.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"the run folder {folder.root} cannot be written: {nearest} is no writable folder")
        if folder.resumable and not config.overwrite:
            folder._check_same(config)
        return folder

    def _check_same(self, config: DictConfig) -> None:
        """Refuse to go on with a run of another configuration."""
        try:
            before = plain(OmegaConf.load(self.config))  # type: ignore[arg-type]  # a mapping, else refused below
        except (OSError, ValueError, AssertionError, YAMLError, OmegaConfBaseException) as error:
            raise UserError(
                f"{self.config} cannot be read, so this run cannot be gone on with; overwrite=true discards it"
            ) from error
        changed = differences(before, plain(config))
        if changed:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise UserError(
                f"{self.root} holds a run with another configuration: {changed[0]}{more}; "
                "choose another run_name=, or discard that run with overwrite=true"
            )

    @property
    def resumable(self) -> bool:
        """Whether there is a run to go on with."""
        return self.config.exists() and (self.last.exists() or self.previous.exists())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Own the folder: two processes that write one run would spoil it. The lock of a dead process is free.

        Raises:
            RunInUseError: the run is going on elsewhere.
            UserError: the folder cannot be written.
        """
        if not is_first_process():
            yield  # the first process of the run has the lock, for all of them
            return
        lock = FileLock(self.root / ".lock")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # Processes that read images for a dead owner hold its lock until they see that it is gone.
            lock.acquire(timeout=_ORPHANS_SECONDS if self._owner_is_dead() else 0)
        except Timeout as error:
            raise RunInUseError(f"{self.root}: this run is going on already{self._owner()}") from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _last_owner(self) -> dict[str, Any] | None:
        try:
            status = read_json(self.status)
            return {"pid": int(status["pid"]), "host": status["host"], "since": status["since"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _owner(self) -> str:
        owner = self._last_owner()
        return f", in process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else ""

    def _owner_is_dead(self) -> bool:
        owner = self._last_owner()
        if owner is None or owner["host"] != socket.gethostname():
            return False
        try:
            os.kill(owner["pid"], 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)
        return False

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"the run folder {self.root} cannot be written: {one_line(error.strerror or error)}")

    def resume(self) -> tuple[Path, dict[str, Any]] | None:
        """Read the newest checkpoint that is whole; broken ones are set aside. None: the run begins.

        Raises:
            UserError: see :func:`vit_attn.training.checkpoint.newest`.
        """
        if not self.resumable:
            return None
        return newest([self.last, self.previous], set_aside=is_first_process())

    @rank_zero_only
    def create(self, config: DictConfig) -> None:
        """Make the folder, or keep the one of a run that goes on; start logs/train.log.

        Raises:
            UserError: it cannot be written.
        """
        try:
            if config.overwrite and self.config.exists():
                self._empty()
            for path in (self.checkpoints, self.logs, self.attention):
                path.mkdir(parents=True, exist_ok=True)
            if not self.resumable:
                text = OmegaConf.to_yaml(OmegaConf.create(without_secrets(plain(config))))
                with whole_file(self.config, encoding="utf-8") as file:
                    file.write(text)
            for folder in (self.root, self.checkpoints, self.logs, self.results):
                for part in folder.glob(".*.part"):
                    part.unlink(missing_ok=True)  # of a process that was killed as it wrote
            write_log_to(self.logs / "train.log")
            self.set_state("running")
        except OSError as error:
            raise self._unwritable(error) from error

    def _empty(self) -> None:
        for path in self.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()

    @rank_zero_only
    def set_state(self, state: str, error: str | None = None) -> None:
        """Write results/status.json: "running", "finished", "stopped" by a signal, or "failed" of what ``error`` says.

        A killed run still says "running".
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status: dict[str, Any] = {"state": state, "error": error, "updated": now}
        if state == "running":
            status |= {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        update_json(self.status, status if self.status.exists() else {**status, "started": now})

    def end(self, state: str, error: str | None = None) -> None:
        """:meth:`set_state` where something has gone wrong already: a disk that is full must not hide what it was."""
        with suppress(OSError, UserError):
            self.set_state(state, error)

    def skipped_batches(self) -> list[dict[str, Any]]:
        """Batches that are left out: dictionaries with "epoch" and "batch", from 0, "step" and "why".

        Raises:
            UserError: results/skipped_batches.json cannot be read.
        """
        if not self.skipped.exists():
            return []
        try:
            return [dict(entry, epoch=int(entry["epoch"]), batch=int(entry["batch"])) for entry in _read(self.skipped)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.skipped} cannot be read: {one_line(error)[:200]}") from error

    @rank_zero_only
    def skip(self, batches: list[dict[str, Any]]) -> None:
        """Write results/skipped_batches.json, from which :meth:`skipped_batches` reads them.

        Raises:
            UserError: it cannot be written.
        """
        try:
            _write_json(self.skipped, batches)
        except OSError as error:
            raise self._unwritable(error) from error


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a run holds; nothing where it is missing, or somebody has broken it: it is written anew.

    Raises:
        OSError: it cannot be read.
    """
    if not path.exists():
        return {}
    with suppress(ValueError):
        found = _read(path)
        if isinstance(found, dict):
            return found
    return {}


def update_json(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Put ``content`` into a JSON file, over what it holds, in one move.

    Raises:
        UserError: it cannot be written. What it held stays.
    """
    try:
        content = {**read_json(path), **content}
        _write_json(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {one_line(error.strerror or error)}") from error
    return content


def _write_json(path: Path, content: Any) -> None:
    with whole_file(path, encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
