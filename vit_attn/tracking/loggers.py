"""Loggers of a run: a CSV always, and Weights & Biases or TensorBoard beside it."""

import csv
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor

from vit_attn.attention import parse_attention
from vit_attn.errors import UserError, one_line
from vit_attn.files import whole_file
from vit_attn.tracking.wandb_run import WandbRunLogger


class CsvLogger(Logger):
    """logs/metrics.csv: a row per step, in order, and a column per metric.

    Lightning's own CSVLogger deletes what an earlier part of the run wrote; this one goes on from it.

    Args:
        path: the file.
        resume_step: keep earlier rows up to this step: what comes after is about to be done again.

    Raises:
        UserError: the file is not what this logger writes, or, from any method, cannot be written.
    """

    # The whole file is written each time: in a run of days, that shall take no more than this share of it.
    _SHARE = 0.02

    def __init__(self, path: Path, *, resume_step: int = -1) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        self._write_again_at = 0.0
        if path.exists():
            try:
                with path.open(newline="") as file:
                    rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
                self.rows = {int(row["step"]): row for row in rows if int(row["step"]) <= resume_step}
            except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
                raise UserError(f"{path} cannot be read: {one_line(error)[:200]}; mend it or move it away") from error

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
        """Write the file, unless that was done a moment ago; Lightning calls this after each row."""
        if time.monotonic() >= self._write_again_at:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the file anew, in one move, so that a reader never sees half of it."""
        start = time.monotonic()
        names = sorted(set().union(*self.rows.values()) - {"step", "epoch"}) if self.rows else []
        try:
            with whole_file(self.path, newline="") as file:
                writer = csv.DictWriter(file, ["step", "epoch", *names])
                writer.writeheader()
                writer.writerows(self.rows[step] for step in sorted(self.rows))
        except OSError as error:
            why = one_line(error.strerror or error)
            raise UserError(f"{self.path} cannot be written: {why}; what it held is whole") from error
        end = time.monotonic()
        self._write_again_at = end + (end - start) / self._SHARE

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; of a run that failed, if it can be."""
        try:
            self.write()
        except UserError:
            if status == "success":
                raise


def tensorboard_logger(folder: Path, run_name: str, *, resume_step: int = -1) -> TensorBoardLogger:
    """Log to TensorBoard, in logs/tensorboard.

    Args:
        folder: of the run.
        run_name: not needed: the folder has it.
        resume_step: what comes after this step is about to be done again, and no longer shown.
    """
    purge = resume_step + 1 if resume_step >= 0 else None
    return TensorBoardLogger(save_dir=folder / "logs", name="tensorboard", version="", purge_step=purge)


@dataclass(frozen=True)
class Prediction:
    """One image of the table of predictions.

    Args:
        image: (H, W, C) uint8.
        overlays: explanation → (H', W', 3) uint8, a column each.
        true, predicted: names of classes.
        confidence: probability of the predicted class.
    """

    image: NDArray[Any]
    overlays: dict[str, NDArray[Any]]
    true: str
    predicted: str
    confidence: float


def run_tags(config: dict[str, Any]) -> list[str]:
    """Tags that every run has: its normalizers, patterns or other mechanisms, and its data set."""
    mechanisms = parse_attention(config["model"]["attention"])
    names = [term.name for mechanism in mechanisms for term in mechanism.terms()]
    data = str(config["data"].get("_target_", "")).split(".")[-2:-1]
    return list(dict.fromkeys([*names, *data]))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


@rank_zero_only
def log_config(loggers: Sequence[Logger], config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Show the configuration and what is known of the run, under flat keys: "model.attention", as sweeps name them.

    Args:
        config: nested, without secrets.
        facts: what the configuration does not say, such as the number of parameters.
    """
    flat = {**_flat(config), **_flat(facts)}
    for logger in loggers:
        if isinstance(logger, (WandbRunLogger, TensorBoardLogger)):
            logger.log_hyperparams(flat)


@rank_zero_only
def log_pictures(loggers: Sequence[Logger], name: str, paths: Sequence[Path], *, step: int) -> None:
    """Show PNG files in the loggers that can show pictures."""
    for logger in loggers:
        if isinstance(logger, WandbRunLogger):
            logger.log_pictures(name, paths, step)
        elif isinstance(logger, TensorBoardLogger):
            from PIL import Image
            from torchvision.transforms.functional import pil_to_tensor

            for path in paths:
                with Image.open(path) as picture:
                    logger.experiment.add_image(name, pil_to_tensor(picture.convert("RGB")), step)


@rank_zero_only
def log_predictions(loggers: Sequence[Logger], predictions: Sequence[Prediction]) -> None:
    """Show predictions and their explanations as a table."""
    for logger in loggers:
        if isinstance(logger, WandbRunLogger) and predictions:
            logger.log_predictions(predictions)


@rank_zero_only
def log_files(loggers: Sequence[Logger], name: str, kind: str, paths: Sequence[Path]) -> None:
    """Keep files as an artifact of the run; they are copied before this returns."""
    for logger in loggers:
        if isinstance(logger, WandbRunLogger):
            logger.log_files(f"{name}-{logger.experiment.id}", kind, paths)


@rank_zero_only
def log_checkpoints(
    loggers: Sequence[Logger],
    *,
    best: Path,
    last: Path,
    best_step: int,
    last_step: int,
    best_numbers: dict[str, Any],
    last_numbers: dict[str, Any],
) -> None:
    """At the end of a run, keep the checkpoints that ``logger.log_checkpoints`` asks for.

    Those written in between are kept by the logger itself, where all are asked for.

    Args:
        best_numbers, last_numbers: the artifact's metadata, such as val/acc.
    """
    for logger in loggers:
        if isinstance(logger, WandbRunLogger):
            if logger.checkpoints in ("best", "all"):
                logger.log_checkpoint(best, best_step, best_numbers)
            if logger.checkpoints in ("last", "all"):
                logger.log_checkpoint(last, last_step, last_numbers)


@rank_zero_only
def finish_loggers(loggers: Sequence[Logger], *, failed: bool, stopped: bool = False) -> None:
    """End every logger, within bounds; call it once, however the run ended.

    Args:
        failed: it has not come to its end.
        stopped: by a signal, so that there is little time.
    """
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbRunLogger):
            logger.finish(failed=failed, stopped=stopped)
