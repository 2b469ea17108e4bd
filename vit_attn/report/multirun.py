"""The report that a multirun ends in."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vit_attn.console import is_first_process
from vit_attn.errors import UserError
from vit_attn.files import folder_name, user_path

log = logging.getLogger("vit_attn")


class WriteReport(Callback):
    """Hydra callback: compare all runs of an experiment once its multirun has ended."""

    def __init__(self) -> None:
        self._experiments: dict[Path, DictConfig] = {}

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note which experiment this run belongs to: a multirun may range over several."""
        with suppress(UserError, OmegaConfBaseException):  # the run itself says what is wrong with it
            self._note(config)

    def _note(self, config: DictConfig) -> None:
        folder = user_path("experiments_dir", config.experiments_dir)
        self._experiments[folder / folder_name("experiment_name", config.experiment_name)] = config

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the reports; a report that cannot be written is a line in the log, the runs are done."""
        if not is_first_process():
            return
        # Every run meets this module, only a multirun needs what draws and writes pages, or shows them.
        from vit_attn.report.write import write_report

        if not self._experiments:
            with suppress(UserError, OmegaConfBaseException):
                self._note(config)  # the runs were in processes of their own
        for folder, settings in self._experiments.items():
            try:
                page = write_report([folder])
            except UserError as error:
                log.warning("report     not written: %s", error)
                continue
            log.info("report     %s", page)
            _track(page, settings)


def _track(page: Path, config: DictConfig) -> None:
    """Show the report where the runs were tracked."""
    if config.logger.get("_target_") == "vit_attn.tracking.wandb.wandb_logger":
        from vit_attn.tracking.wandb import log_report

        files = [page.with_name(name) for name in ("report.md", "results.csv")]
        where = {key: config.logger[key] for key in ("project", "entity", "mode", "finish_timeout")}
        log_report(page, files, experiment=str(config.experiment_name), **where)
