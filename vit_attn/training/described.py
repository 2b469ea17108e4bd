"""What a checkpoint says of the model that it holds: data of anybody's, read as data and as nothing more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import vit_attn
from vit_attn.errors import UserError, one_line
from vit_attn.training.failures import named
from vit_attn.training.finite import NotFiniteError
from vit_attn.training.stopping import Stopped

_CONF = Path(vit_attn.__file__).parent.parent.absolute() / "conf"
_SAVED: dict[str, Any] = {
    **{"run_name": (str, int, float), "experiment_name": (str, int, float), "seed": int},
    **{"model": dict, "data": dict, "loss": dict},
}
_TRAINED_ON: dict[str, Any] = {"class_names": list, "image_size": int, "mean": list, "std": list}
_COUNTS = {"global_step", "ready", "started", "processed", "completed", "is_last_batch", "_batches_that_stepped"}
_LARGEST_IMAGE = 2**13  # pixels per side, as in vit_attn.training.check


def described(checkpoint: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the configuration and the description of the data out of a checkpoint.

    They name none but this project's own classes, and refer to nothing outside of themselves, such as a variable of
    the environment.

    Raises:
        UserError: something is missing, is of another kind, or asks for more than that.
    """
    try:
        saved, trained_on = checkpoint["vit_attn"]["config"], checkpoint["vit_attn"]["data"]
        why = _asks_for_more(saved)
        if why:
            raise UserError(f"checkpoint {path}: refused, its configuration {why}")
        why = _wrong(checkpoint, saved, trained_on)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        why = f"what it says of its model is incomplete ({type(error).__name__}: {one_line(error)[:100]})"
    if why:
        raise UserError(f"checkpoint {path}: broken, {why}")
    return saved, trained_on


def _asks_for_more(saved: dict[str, Any]) -> str | None:
    for key, value in _leaves(saved):
        if isinstance(value, str) and "${" in value:
            return f"refers to something outside of it in {key}"
    for part in ("data", "loss"):
        target, allowed = f"{part}._target_", own_classes(part)
        if saved[part]["_target_"] not in allowed:
            return f"asks for {target}={str(saved[part]['_target_'])[:80]!r}, not one of {', '.join(allowed)}"
        # A call of a class within the call of another, or another way to call it.
        for key, _ in _leaves(saved[part], part):
            if key.rpartition(".")[2].startswith("_") and key != target:
                return f"holds {key[:80]}"
    return None


@cache
def own_classes(group: str) -> list[str]:
    """The classes that a checkpoint may ask for: those that a file in conf/<group> names."""
    named = {OmegaConf.select(OmegaConf.load(path), "_target_") for path in (_CONF / group).glob("*.yaml")}
    return sorted(target for target in named if isinstance(target, str))


def _wrong(checkpoint: dict[str, Any], saved: dict[str, Any], trained_on: dict[str, Any]) -> str | None:
    for holder, kinds in ((saved, _SAVED), (trained_on, _TRAINED_ON)):
        for key, kind in kinds.items():
            if not isinstance(holder[key], kind) or isinstance(holder[key], bool):
                return f"its {key} is {str(holder[key])[:60]!r}"
    names, size = trained_on["class_names"], trained_on["image_size"]
    if not names or not all(isinstance(name, str) for name in names) or not 1 <= size <= _LARGEST_IMAGE:
        return "its classes or the size of its images make no sense"
    if not isinstance(checkpoint["epoch"], int) or not all(map(torch.is_tensor, checkpoint["state_dict"].values())):
        return "its epoch is no number, or its weights are no tensors"
    return None


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below ``node``, and every element of a list under the key of the list, with what it holds."""
    if isinstance(node, dict):
        for name, value in node.items():
            inner = f"{key}.{name}" if key else str(name)
            yield inner, value
            yield from _leaves(value, inner)
    elif isinstance(node, list | tuple):
        for value in node:
            yield key, value
            yield from _leaves(value, key)


def check_progress(checkpoint: dict[str, Any]) -> None:
    """See that what Lightning has counted are numbers.

    Raises:
        TypeError: naming the first that is none.
        KeyError: they are not there.
    """
    found = [("global_step", checkpoint["global_step"]), *_leaves(checkpoint["loops"])]
    for key, value in found:
        if key.rpartition(".")[2] in _COUNTS and not (isinstance(value, int) and value >= 0):
            raise TypeError(f"{key} is {str(value)[:40]!r}")


def is_score(value: Any) -> bool:
    """Whether this is what Lightning keeps of a metric: a tensor of one element."""
    return isinstance(value, Tensor) and value.numel() == 1


@contextmanager
def as_described(path: Path) -> Iterator[None]:
    """Say that it is the checkpoint that is wrong, where what it describes cannot be built.

    Raises:
        UserError: in place of whatever is raised inside: the values of a checkpoint may be anything.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    except Exception as error:
        why = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(f"checkpoint {path}: what it describes cannot be built: {why}") from error


@contextmanager
def going_on_from(path: Path | None, has_stepped: Callable[[], bool], config: DictConfig) -> Iterator[None]:
    """Say that it is the checkpoint that is wrong, where a training that goes on from it fails before its first step.

    Args:
        path: the checkpoint; None: the training begins, and its errors are its own.
        has_stepped: whether there has been a step since.
        config: of the run.

    Raises:
        UserError: in place of an error that is not known to be another's.
    """
    try:
        yield
    except (Stopped, NotFiniteError, UserError):
        raise
    except Exception as error:
        if path is None or has_stepped() or named(error, config) is not None:
            raise
        why = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(
            f"checkpoint {path}: this run cannot go on from it ({why}); overwrite=true starts the run anew"
        ) from error
