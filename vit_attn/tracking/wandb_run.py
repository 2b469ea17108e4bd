"""A run's logger for Weights & Biases: what a run shows there, and how it ends, whatever W&B does meanwhile."""

import logging
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from vit_attn.errors import one_line
from vit_attn.tracking.background import Background, within

if TYPE_CHECKING:
    from vit_attn.tracking.loggers import Prediction

log = logging.getLogger("vit_attn")

STEP = "trainer/global_step"
CHECKPOINTS = ("none", "best", "last", "all")
# How long what was logged may take to reach wandb-core, which writes it down; uploading is another matter.
_HAND_OVER_SECONDS = 5
# Beyond W&B's own limit, which is not kept where wandb-core is dead.
_GRACE_SECONDS = 10
# Of a run that a signal has ended: a scheduler kills it half a minute later.
_STOPPED_SECONDS = 10


def sync_command(folder: Path, *, online: bool) -> str:
    """The command that uploads what W&B has not: all parts of the run, in order."""
    return shlex.join(["wandb", "sync", *(["--include-online"] if online else []), str(folder)])


class WandbRunLogger(WandbLogger):
    """Log to one W&B run. Each call is made in a thread, and trouble is one warning: training goes on without W&B.

    Args:
        run: the W&B run, which has begun.
        checkpoints: which checkpoints are uploaded: none, best, last or all.
        finish_timeout: seconds that uploading may take at the end.
    """

    def __init__(self, run: Any, *, checkpoints: str = "none", finish_timeout: float = 60) -> None:
        super().__init__(experiment=run)
        self.checkpoints = checkpoints
        self.finish_timeout = finish_timeout
        self.finished = False
        self._lost_something = False
        self._latest: dict[str, Any] = {}  # what was logged last, for a checkpoint's metadata
        self._uploaded: dict[Path, int] = {}  # checkpoint → when it was written
        self._background = Background(self._give_up)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the thread out: processes that are spawned get a copy."""
        return {**super().__getstate__(), "_background": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _background=Background(self._give_up))

    @property
    def wandb_folder(self) -> Path:
        """The run's logs/wandb."""
        return Path(self.experiment.settings.sync_dir).parent

    @property
    def online(self) -> bool:
        """Whether the run is uploaded while it goes on."""
        return self.experiment.settings.mode == "online"

    def _give_up(self, error: BaseException) -> None:
        log.warning(
            "W&B        stopped (%s): training goes on without it, logs/metrics.csv is whole; "
            "what it has can be uploaded: %s",
            one_line(error)[:200],
            sync_command(self.wandb_folder, online=self.online),
        )

    def _attempt(self, call: Callable[[], Any]) -> None:
        """Make a call that W&B may refuse without losing the run: an artifact asks the server, a number does not."""

        def attempt() -> None:
            try:
                call()
            except Exception as error:
                if not self._lost_something:
                    self._lost_something = True
                    why = one_line(error)[:200]
                    log.warning("W&B        cannot keep a picture, a table or a file (%s); numbers are logged on", why)

        self._background.put(attempt)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at ``step``."""
        self._latest = {**self._latest, **metrics, **({} if step is None else {STEP: step})}
        self._background.put(partial(super().log_metrics, dict(metrics), step))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the run's configuration; a sweep's own keys stay as the sweep has set them."""

        def update() -> None:
            run = self.experiment
            locked = run.config.keys() if run.sweep_id else ()
            run.config.update({key: value for key, value in params.items() if key not in locked}, allow_val_change=True)

        self._background.put(update)

    def log_pictures(self, name: str, paths: Sequence[Path], step: int | None) -> None:
        """Show PNG files under ``name``; the same name at later steps becomes one panel with a slider."""
        self._show(lambda wandb: {name: [wandb.Image(str(path)) for path in paths]}, step)

    def log_predictions(self, predictions: Sequence["Prediction"]) -> None:
        """Show a table with a row per image."""
        overlays = list(dict.fromkeys(name for prediction in predictions for name in prediction.overlays))

        def table(wandb: Any) -> dict[str, Any]:
            rows = []
            for one in predictions:
                shown = [one.overlays.get(name) for name in overlays]
                pictures = [picture if picture is None else wandb.Image(picture) for picture in (one.image, *shown)]
                rows.append([*pictures, one.true, one.predicted, float(one.confidence), one.true == one.predicted])
            columns = ["image", *overlays, "true", "predicted", "confidence", "correct"]
            return {"predictions": wandb.Table(columns=columns, data=rows)}

        self._show(table, None)

    def log_html(self, name: str, path: Path) -> None:
        """Show a page."""
        self._show(lambda wandb: {name: wandb.Html(str(path), inject=False)}, None)

    def _show(self, make: Callable[[Any], dict[str, Any]], step: int | None) -> None:
        def show() -> None:
            import wandb

            # Never wandb.log(step=…): it counts in steps of its own, and drops what comes at an earlier one.
            self.experiment.log({**make(wandb), **({} if step is None else {STEP: step})})

        self._attempt(show)

    def log_files(
        self,
        name: str,
        kind: str,
        paths: Sequence[Path],
        aliases: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Upload files as one version of the artifact ``name``. They are copied now: what comes later is not in it."""
        import wandb

        paths = [path for path in paths if path.is_file()]
        if not paths or self._background.broken or self._lost_something:
            return
        try:
            name = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:128]
            artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata or {}))
            top = Path(os.path.commonpath([path.absolute().parent for path in paths]))
            for path in paths:
                artifact.add_file(str(path), name=path.absolute().relative_to(top).as_posix(), skip_cache=True)
        except Exception as error:  # such as a full disk
            log.warning("W&B        cannot keep %s: %s", name, one_line(error)[:200])
            return
        wanted = ["latest", *dict.fromkeys(aliases)]
        self._attempt(lambda: self.experiment.log_artifact(artifact, aliases=wanted))

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """Upload a checkpoint that has just been written, where all of them are wanted."""
        if self.checkpoints == "all":
            best = isinstance(checkpoint_callback, ModelCheckpoint)
            path = Path(checkpoint_callback.best_model_path if best else checkpoint_callback.path)  # type: ignore[attr-defined]
            step = getattr(
                checkpoint_callback, "_last_global_step_saved" if best else "step", self._latest.get(STEP, 0)
            )
            numbers: dict[str, Any] = {
                name: self._latest[name] for name in ("epoch", "val/acc", "val/loss") if name in self._latest
            }
            self.log_checkpoint(path, step, numbers)

    def log_checkpoint(self, path: Path, step: int, metadata: Mapping[str, Any]) -> None:
        """Upload one checkpoint, unless it is there already."""
        written = path.stat().st_mtime_ns if path.is_file() else None
        if written is None or self._uploaded.get(path) == written:
            return
        self._uploaded[path] = written
        numbers = {name: getattr(value, "item", lambda value=value: value)() for name, value in metadata.items()}
        name = f"model-{self.experiment.id}"
        self.log_files(name, "model", [path], [path.stem, f"step{step}"], {"step": step, **numbers})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Hand over what was logged; Lightning calls this after each of its stages."""
        self._background.wait(_HAND_OVER_SECONDS)

    def finish(self, *, failed: bool, stopped: bool = False) -> None:
        """End the W&B run, within bounds; a run that failed, or that a signal has stopped, is marked as such."""
        if self.finished:
            return
        self.finished = True
        run, online = self.experiment, self.online
        # Known while the run is open: the line that would upload it.
        command = sync_command(self.wandb_folder, online=online)

        def end() -> None:
            if not self._background.broken:
                self._background.wait(self.finish_timeout)
            if stopped:
                run.mark_preempting()
            run.finish(exit_code=1 if failed else 0)

        limit = _HAND_OVER_SECONDS if self._background.broken else self.finish_timeout + _GRACE_SECONDS
        limit = min(limit, _STOPPED_SECONDS) if stopped else limit
        try:
            done, why = within(limit, end), f"more than {min(limit, self.finish_timeout):g} s"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            done, why = False, one_line(error)[:200]
        if done and not self._background.broken:
            if online:
                shutil.rmtree(self.wandb_folder / "artifacts", ignore_errors=True)
            return
        if not self._background.broken:
            log.warning("W&B        not all of the run is uploaded (%s); to upload the rest: %s", why, command)
        tear_down()


def tear_down() -> None:
    """Make the next run in this process start with a wandb-core of its own."""
    import wandb

    try:
        within(_HAND_OVER_SECONDS, wandb.teardown)
    except BaseException as error:  # it ends in SystemExit where wandb-core was killed
        if isinstance(error, KeyboardInterrupt):
            raise
    os.environ.pop("WANDB_SERVICE", None)  # how a child finds the wandb-core of its parent: that one is gone
