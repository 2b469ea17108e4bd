"""Processes that a launcher such as torchrun or Slurm has started: how many they are, and that they are one run."""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import distributed

from vit_attn.errors import LostRankError, UserError, on_every_process

_FOLDER = ("experiments_dir", "experiment_name", "run_name")
_OF_THE_MOMENT = "${now:"  # Hydra's clock


def follow_launcher(config: DictConfig) -> None:
    """Set ``trainer.devices`` and ``trainer.num_nodes`` to what torchrun has started, where it has started anything.

    Raises:
        UserError: the command line asks for another number, or each process would name the run's folder for itself.
    """
    if TorchElasticEnvironment.detect():
        here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        started = {"devices": here, "num_nodes": everywhere // here}
        if started["num_nodes"] * here != everywhere:
            raise UserError(
                f"torchrun has started {here} processes on this node and {everywhere} in all: "
                "give every node the same --nproc-per-node"
            )
        asked = _given_on_the_command_line()
        for key, number in started.items():
            if (value := asked.get(f"trainer.{key}", "auto")) not in ("auto", "-1", str(number)):
                what = "processes per node" if key == "devices" else "nodes"
                raise UserError(f"trainer.{key}={value}, but torchrun has started {number} {what}: leave it out")
            config.trainer[key] = number
    if not launched_from_outside():
        return
    for key, value in _read_off_the_clock(config).items():
        raise UserError(
            f"{key}={value}: every process of a launcher reads the clock for itself, and they need one folder; "
            "let the launching script read it, or leave the name out"
        )


def _read_off_the_clock(config: DictConfig) -> dict[str, str]:
    """Parts of the run folder's name that depend on the moment, as they are written."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    return {key: str(raw[key]) for key in _FOLDER if _OF_THE_MOMENT in str(raw.get(key))}


def _given_on_the_command_line() -> dict[str, str]:
    if not HydraConfig.initialized():
        return {}
    pairs = (override.lstrip("+").partition("=") for override in HydraConfig.get().overrides.task)
    return {key: value for key, _, value in pairs}


def launched_from_outside() -> bool:
    """Whether torchrun or Slurm has started the processes of this run, and not Lightning from the first of them."""
    return TorchElasticEnvironment.detect() or (
        SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    )


def names_to_pass_on(config: DictConfig) -> list[str]:
    """Overrides that give the processes that Lightning starts the folder that the first one has read off the clock."""
    return [
        f"{key}={QuotedString(str(config[key]), Quote.single).with_quotes()}" for key in _read_off_the_clock(config)
    ]


class OneRun(Callback):
    """Before the training, see that all processes write into one folder and go on from one checkpoint.

    Args:
        folder: of the run.
        step: of the checkpoint that this process goes on from; None: it begins.
    """

    def __init__(self, folder: Path, step: int | None) -> None:
        self.folder, self.step = str(folder.absolute()), step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with the first process.

        Raises:
            UserError: other folders.
            LostRankError: other checkpoints, as where one process has set a broken one aside and another has read it.
        """
        if stage != "fit" or trainer.world_size == 1:
            return
        found: list[tuple[str, int | None]] = [("", None)] * trainer.world_size
        distributed.all_gather_object(found, (self.folder, self.step))
        for rank, (folder, step) in enumerate(found):
            if folder != found[0][0]:
                with on_every_process():
                    raise UserError(
                        f"the processes of this run would write into {found[0][0]} and, process {rank}, {folder}: "
                        "give all of them one experiments_dir=, experiment_name= and run_name="
                    )
            if step != found[0][1]:
                raise LostRankError(
                    f"process {rank} would go on from step {step or 0}, process 0 from step {found[0][1] or 0}"
                )
