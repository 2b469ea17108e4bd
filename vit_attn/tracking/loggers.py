"""Loggers of a run: a CSV always, and Weights & Biases or TensorBoard beside it."""

import csv
import hashlib
import logging
import netrc
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from vit_attn.config import without_secrets
from vit_attn.errors import UserError, one_line, unknown_name

log = logging.getLogger("vit_attn")


class CsvLogger(Logger):
    """logs/metrics.csv: a row per step, in order, and a column per metric.

    Lightning's own CSVLogger deletes what an earlier part of the run wrote; this one goes on from it.

    Args:
        path: the file.
        resume_step: keep earlier rows up to this step: what comes after is about to be done again.
    """

    def __init__(self, path: Path, *, resume_step: int = -1) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        if path.exists():
            with path.open(newline="") as file:
                rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
            self.rows = {int(row["step"]): row for row in rows if int(row["step"]) <= resume_step}

    @property
    def name(self) -> str:
        """The logger's name."""
        return "csv"

    @property
    def version(self) -> str:
        """One file, no versions."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Leave them out: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of ``step``."""
        row = self.rows.setdefault(step or 0, {"step": step or 0})
        row |= {key: value.item() if isinstance(value, Tensor) else value for key, value in metrics.items()}

    @rank_zero_only
    def save(self) -> None:
        """Write the file anew, in one move, so that a reader never sees half of it."""
        names = sorted(set().union(*self.rows.values()) - {"step", "epoch"}) if self.rows else []
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "epoch", *names])
            writer.writeheader()
            writer.writerows(self.rows[step] for step in sorted(self.rows))
        part.replace(self.path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()


def wandb_mode(mode: str | None = None) -> str:
    """Decide between "online", where the user is logged in, and "offline", so that nothing asks a question.

    Raises:
        UserError: a mode that does not exist.
    """
    mode = mode or os.environ.get("WANDB_MODE") or None
    if mode is not None:
        allowed = ("online", "offline", "disabled")
        if mode not in allowed:
            raise UserError(unknown_name("logger.mode", mode, allowed))
        return mode
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "online" if netrc.netrc(str(file)).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def wandb_logger(
    folder: Path,
    run_name: str,
    *,
    project: str,
    entity: str | None,
    group: str | None,
    tags: Sequence[str],
    mode: str | None,
) -> WandbLogger:
    """Log to Weights & Biases, in logs/wandb. The same run folder is always the same W&B run.

    Raises:
        UserError: a mode that does not exist.
    """
    # Nothing beyond the run itself goes over the network, and the one line that matters is ours.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode = wandb_mode(mode)
    identity = hashlib.sha256(f"{folder.parent.name}/{run_name}/{_birth(folder)}".encode()).hexdigest()[:12]
    options: dict[str, Any] = {
        **{"name": run_name, "id": identity, "project": project, "entity": entity, "group": group},
        **{"tags": list(tags), "dir": folder / "logs", "resume": "allow", "reinit": "finish_previous"},
        # Uncaught output: the log is in logs/train.log. The timeout bounds what an unreachable server costs.
        "settings": wandb.Settings(console="off", init_timeout=30),
    }
    with _command_line_without_secrets():
        try:
            run = wandb.init(**options, mode=mode)  # type: ignore[arg-type]  # checked by wandb_mode
        except wandb.Error as error:
            log.warning("W&B        cannot go online (%s): this run is logged offline", one_line(error)[:200])
            wandb.teardown()  # the failed attempt still holds the run's id
            run = wandb.init(**options, mode="offline")
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run)


@contextmanager
def _command_line_without_secrets() -> Iterator[None]:
    """W&B records sys.argv: let it see what config.yaml shows."""
    argv = sys.argv
    shown = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        shown.append(f"{key}{equals}{without_secrets(value, key.lstrip('+~').rpartition('.')[2])}")
    sys.argv = shown
    try:
        yield
    finally:
        sys.argv = argv


def _birth(folder: Path) -> str:
    """What tells this run from an earlier one in a folder of the same name: when its configuration was written."""
    return str((folder / "config.yaml").stat().st_mtime_ns)


def tensorboard_logger(folder: Path, run_name: str) -> TensorBoardLogger:
    """Log to TensorBoard, in logs/tensorboard."""
    return TensorBoardLogger(save_dir=folder / "logs", name="tensorboard", version="")


@rank_zero_only
def log_pictures(loggers: Sequence[Logger], name: str, paths: Sequence[Path], *, step: int) -> None:
    """Show PNG files in the loggers that can show pictures."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path) for path in paths])
        elif isinstance(logger, TensorBoardLogger):
            from PIL import Image
            from torchvision.transforms.functional import pil_to_tensor

            for path in paths:
                with Image.open(path) as picture:
                    logger.experiment.add_image(name, pil_to_tensor(picture.convert("RGB")), step)
