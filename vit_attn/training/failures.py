"""Failures of the machine, amid a run, in one line that says what to change."""

import re
from typing import Any

import torch
from omegaconf import DictConfig

from vit_attn.errors import LostRankError, UserError, one_line
from vit_attn.training.ranks import is_loss

_NO_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|out of memory", re.I)
_WORKER = re.compile(r"DataLoader worker.*(killed by signal|exited unexpectedly)")


class LostWorkerError(UserError):
    """A process that reads images was killed."""

    status = LostRankError.status


def named(error: Exception, config: DictConfig) -> UserError | None:
    """Say what has failed, where it is the machine and not the program; None where it is not known to be.

    Args:
        error: what was raised.
        config: of the run, for what could be changed in it.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    ):
        return UserError(f"out of memory ({_first_sentence(error)}): {_smaller(config)}")
    if is_loss(error):
        return LostRankError("another process of the run is gone")
    if isinstance(error, RuntimeError) and _WORKER.search(one_line(error)):
        return LostWorkerError(
            f"a process that reads images was lost ({_first_sentence(error)}), often for want of memory; the same "
            f"command goes on from the last checkpoint, with a smaller data.num_workers than {config.data.num_workers} "
            "if it happens again"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return UserError(
            f"{where}{error.strerror}; the same command goes on from the last checkpoint once that is mended"
        )
    return None


def _first_sentence(error: Exception) -> str:
    return re.split(r"(?<=[^.\d])\. ", one_line(error))[0][:160]


def _smaller(config: DictConfig) -> str:
    """What needs less memory, in the order of what it costs, and computes the same as far as that can be."""
    batch, accumulate = config.data.batch_size, config.trainer.accumulate_grad_batches
    advice: list[Any] = []
    if batch > 1:
        advice.append(
            f"data.batch_size={max(1, batch // 2)} with trainer.accumulate_grad_batches={2 * accumulate} "
            "sees as many images per step"
        )
    if config.trainer.precision == "32-true":
        advice.append("trainer.precision=bf16-mixed halves the activations")
    advice.append("a smaller data.image_size, model.embed_dim or model.depth needs less")
    return "; ".join(advice)
