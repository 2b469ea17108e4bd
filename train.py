"""Train a Vision Transformer with a chosen attention.

python train.py                                            # softmax on CIFAR-10
python train.py model.attention=entmax+strided data=cifar10 trainer=gpu
python train.py experiment=demo                            # a minute on a CPU, no download
python train.py -m model.attention=softmax,entmax,strided seed=1,2,3        # ends in a report that compares them
"""

import os
import sys
import traceback

import hydra
import torch.distributed
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vit_attn.console import run_command
from vit_attn.errors import UserError
from vit_attn.training.launcher import launched_from_outside, names_to_pass_on
from vit_attn.training.run import train

mistakes: list[UserError] = []
crashes: list[Exception] = []


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def job(config: DictConfig) -> None:
    """Run one configuration; a multirun calls this for each."""
    # Lightning starts the other processes of a run by repeating the command line: give it that of this job alone.
    sys.argv = [sys.argv[0], *HydraConfig.get().overrides.task, *names_to_pass_on(config), "hydra.mode=RUN"]
    environment = dict(os.environ)
    try:
        train(config)
    except UserError as error:
        # Not through Hydra, which adds lines of its own; and the other jobs of a multirun go on.
        mistakes.append(error)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN:
            raise
        traceback.print_exc()
        crashes.append(error)
    finally:
        # Lightning leaves its process group, and the variables that say it has been launched, to the next job.
        # Processes from outside are those of the next job too; torch would look for them where they were in this one.
        if torch.distributed.is_initialized() and not launched_from_outside():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


def main() -> None:
    """Run the command line's one job or many, then say what went wrong."""
    # Hydra's own parser takes -m before the overrides or after them, not in between.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    try:
        job()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if mistakes:
        error = UserError("; ".join(dict.fromkeys(map(str, mistakes))))
        # One that trying again may mend makes the whole worth a try.
        error.status = max(mistake.status for mistake in mistakes)
        error.everywhere = all(mistake.everywhere for mistake in mistakes)
        raise error
    if crashes:
        sys.exit(f"error: {len(crashes)} of the runs crashed; their tracebacks are above, and the report names them")


if __name__ == "__main__":
    sys.exit(run_command(main))
