"""Train a Vision Transformer with a chosen attention.

python train.py                                            # softmax on CIFAR-10
python train.py model.attention=entmax+strided data=cifar10 trainer=gpu
python train.py experiment=demo                            # a minute on a CPU, no download
python train.py -m model.attention=softmax,entmax,strided seed=1,2,3        # ends in a report that compares them
python train.py -m hydra/launcher=slurm seed=1,2,3                         # on a cluster, as a job array
"""

import os
import sys
import traceback

import hydra
import torch.distributed
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vit_attn.arguments import check_flags
from vit_attn.console import explain, run_command
from vit_attn.errors import UserError, one_line
from vit_attn.outcomes import crashes, mistakes
from vit_attn.slurm import let_first_rank_end
from vit_attn.training.launcher import launched_from_outside, names_to_pass_on
from vit_attn.training.run import train
from vit_attn.training.stopping import Stopped

composed = False  # whether there has been a job


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def job(config: DictConfig) -> Exception | None:
    """Run one configuration; a multirun calls this for each. Returns what went wrong, for a launcher to tell."""
    global composed
    composed = True
    # Lightning starts the other processes of a run by repeating the command line: give it that of this job alone.
    sys.argv = [sys.argv[0], *HydraConfig.get().overrides.task, *names_to_pass_on(config), "hydra.mode=RUN"]
    environment = dict(os.environ)
    try:
        _check_launcher()
        train(config)
        return None
    except (UserError, OmegaConfBaseException) as error:
        # Not through Hydra, which adds lines of its own; and the other jobs of a multirun go on.
        mistakes.append(error if isinstance(error, UserError) else UserError(explain(error)))
        return mistakes[-1]
    except Stopped as stop:
        let_first_rank_end(stop.status)
        raise
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN:
            raise
        traceback.print_exc()
        crashes.append(error)
        return error
    finally:
        # Lightning leaves its process group, and the variables that say it has been launched, to the next job.
        # Processes from outside are those of the next job too; torch would look for them where they were in this one.
        if torch.distributed.is_initialized() and not launched_from_outside():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


def _check_launcher() -> None:
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.RUN and hydra_config.runtime.choices.get("hydra/launcher") == "slurm":
        raise UserError("hydra/launcher=slurm submits the jobs of a multirun: add -m")


def main() -> None:
    """Run the command line's one job or many, then say what went wrong."""
    # Hydra's own parser takes -m before the overrides or after them, not in between.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    check_flags(sys.argv[1:])
    mistakes.clear()  # of the last command, where one process runs several
    crashes.clear()
    try:
        job()
    except Exception as error:
        # Until the first job there is nothing but files and a command line to be wrong.
        if composed or isinstance(error, HydraException | OmegaConfBaseException | UserError):
            raise
        raise UserError(f"the configuration cannot be composed: {type(error).__name__}: {one_line(error)}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if mistakes:
        whole = UserError("; ".join(dict.fromkeys(map(str, mistakes))))
        # One that trying again may mend makes the whole worth a try.
        whole.status = max(mistake.status for mistake in mistakes)
        whole.everywhere = all(mistake.everywhere for mistake in mistakes)
        raise whole
    if crashes:
        sys.exit(f"error: {len(crashes)} of the runs crashed; what they said is above, and the report names them")


if __name__ == "__main__":
    sys.exit(run_command(main))
