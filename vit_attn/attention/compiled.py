"""``torch.compile`` for the engine's kernels: where there is a compiler and enough work, and never to be asked for."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Compiling takes seconds, once per kind of arguments: not for fewer entries in all than this.
COMPILE_FROM = 2**18

P = ParamSpec("P")
R = TypeVar("R")

_works = True  # until a compiler was missing


def _kind(arg: object) -> object:
    return (arg.shape, arg.stride(), arg.dtype, arg.device) if isinstance(arg, Tensor) else arg


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` compiled where its tensors have ``COMPILE_FROM`` entries, and as it is elsewhere.

    Matrices may have any number of rows; every other size is a version of its own, which is faster for being constant.
    Nothing is recorded for autograd. A machine without a compiler gets one warning, and the same results in more time.
    """
    fast = torch.compile(function)
    known: set[tuple[object, ...]] = set()

    @wraps(function)
    @torch.no_grad()  # training and evaluation then share a version
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        global _works
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not _works or sum(tensor.numel() for tensor in tensors) < COMPILE_FROM:
            return function(*args, **kwargs)
        for tensor in tensors:
            if tensor.dim() == 2 and tensor.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        kind = (torch.is_inference_mode_enabled(), *map(_kind, args), *kwargs)
        try:
            if kind in known:
                return fast(*args, **kwargs)
            with torch._dynamo.config.patch(recompile_limit=256, automatic_dynamic_shapes=False):
                result = fast(*args, **kwargs)
            known.add(kind)
            return result
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or its absence may raise; the plain lines raise what is real
            result = function(*args, **kwargs)
            _works = False
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("attention runs without compiled kernels, which is slower: %s", reason)
            return result

    return run
