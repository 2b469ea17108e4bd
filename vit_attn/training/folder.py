"""A run on disk: experiments/<experiment_name>/<run_name>/."""

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from vit_attn.config import differences, plain, without_secrets
from vit_attn.console import write_log_to
from vit_attn.errors import UserError, one_line

# Beside the runs of an experiment: what vit_attn.report writes.
REPORT = "report"


class RunFolder:
    """Paths of a run, and the rules for going on with one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.checkpoints = root / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.logs = root / "logs"
        self.results = root / "results"
        self.attention = self.results / "attention"

    @classmethod
    def of(cls, config: DictConfig) -> "RunFolder":
        """Find a run's folder, and check that the run may use it; nothing is written.

        Raises:
            UserError: the folder belongs to another run, or cannot be written.
        """
        for key in ("experiment_name", "run_name"):
            name = str(config[key])
            if not name.strip() or name in (".", "..") or name != Path(name).name:
                raise UserError(f"{key}={name!r} is not a folder's name: leave slashes out")
        if str(config.run_name) == REPORT:
            raise UserError(f"run_name={REPORT}: that folder is for the experiment's report; choose another name")
        folder = cls(Path(config.experiments_dir).expanduser() / str(config.experiment_name) / str(config.run_name))
        nearest = next(path for path in (folder.root, *folder.root.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"the run folder {folder.root} cannot be written: {nearest} is no writable folder")
        if folder.resumable and not config.overwrite:
            changed = differences(plain(OmegaConf.load(folder.config)), plain(config))  # type: ignore[arg-type]
            if changed:
                more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
                raise UserError(
                    f"{folder.root} holds a run with another configuration: {changed[0]}{more}; "
                    "choose another run_name=, or discard that run with overwrite=true"
                )
        return folder

    @property
    def resumable(self) -> bool:
        """Whether there is a run to go on with."""
        return self.last.exists() and self.config.exists()

    @rank_zero_only
    def create(self, config: DictConfig) -> None:
        """Make the folder, or keep the one of a run that goes on; start logs/train.log.

        Raises:
            UserError: it cannot be written.
        """
        try:
            if config.overwrite and self.config.exists():
                shutil.rmtree(self.root)
            for path in (self.checkpoints, self.logs, self.attention):
                path.mkdir(parents=True, exist_ok=True)
            if not self.resumable:
                self.config.write_text(OmegaConf.to_yaml(OmegaConf.create(without_secrets(plain(config)))))
            write_log_to(self.logs / "train.log")
            self.set_state("running")
        except OSError as error:
            raise UserError(f"the run folder {self.root} cannot be written: {one_line(error)}") from error

    @rank_zero_only
    def set_state(self, state: str, error: str | None = None) -> None:
        """Write results/status.json: "running", "finished" or "failed". A killed run still says "running"."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"state": state, "error": error, "updated": now}
        path = self.results / "status.json"
        update_json(path, status if path.exists() else {**status, "started": now})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project without unpickling code.

    Raises:
        UserError: no such file, a broken one, one that holds code, or not one of this project's.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every kind of broken file raises its own kind of error
        if "unsupported global" in str(error).lower():
            raise UserError(f"checkpoint {path}: refused, it holds more than plain data (it could run code)") from error
        raise UserError(f"checkpoint {path}: cannot be read, it is broken, cut short or no checkpoint") from error
    if not isinstance(checkpoint, dict) or not {"vit_attn", "state_dict"} <= checkpoint.keys():
        raise UserError(f"checkpoint {path}: not made by vit_attn's train.py")
    return checkpoint


def update_json(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Put ``content`` into a JSON file, over what it holds, in one move: a reader never sees half of it."""
    if path.exists():
        content = {**json.loads(path.read_text()), **content}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)
    return content
