"""The processes of one run: when one of them is lost, the others end soon, and say which it was."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from subprocess import Popen, TimeoutExpired
from types import TracebackType

from lightning.pytorch import Trainer

from vit_attn.console import is_first_process
from vit_attn.errors import LostRankError, UserError
from vit_attn.training.stopping import SIGNALS

_LOOK_SECONDS = 0.2
# What the first process may take to say itself what is wrong, once another is gone: it may be amid a save.
_GRACE_SECONDS = 10
# What the others may take to come to their end after the first one has.
_END_SECONDS, _FAILED_SECONDS = 30, 3
# Statuses that a run ends with in order: the others end likewise.
_IN_ORDER = (UserError.status, *(128 + signum for signum in SIGNALS))
_LOST = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited|timed out waiting|nccl", re.I)


def is_loss(error: BaseException) -> bool:
    """Whether ``error`` is what a process sees of another one that is gone: gloo's and NCCL's say so in words."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


class Ranks:
    """Context that watches over the processes that Lightning has launched, and ends them when this one ends.

    Lightning's own observer kills every process, the first one included, without a word. A process that was launched
    itself, by whatever, ends when what launched it is gone: it would otherwise wait for the others for half an hour.

    Args:
        on_loss: told what was lost, where this process hangs and is about to be ended.
    """

    def __init__(self, on_loss: Callable[[str], None]) -> None:
        self._on_loss = on_loss
        self._trainer: Trainer | None = None
        self._processes: list[Popen[bytes]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="vit_attn-ranks")

    def __enter__(self) -> "Ranks":
        if is_first_process():
            self._thread.start()
        else:
            threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
        return self

    def follow(self, trainer: Trainer) -> None:
        """Watch over the processes that ``trainer`` launches, besides those of the Trainers before."""
        self._trainer = trainer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        lost = self.lost()
        end = time.monotonic() + _FAILED_SECONDS
        # The connection to a process that dies is closed a moment before the process is dead.
        while lost is None and error is not None and is_loss(error) and self._processes and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
            lost = self.lost()
        self._end(_END_SECONDS if kind is None else _FAILED_SECONDS)
        if lost is not None and error is not None and is_loss(error):
            raise lost from error

    def lost(self) -> LostRankError | None:
        """The first process that has failed; None while none has."""
        for rank, process in enumerate(self._processes, 1):
            if status := process.poll():
                how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                error = LostRankError(f"process {rank} of the run {how}")
                error.status = status if status in _IN_ORDER else LostRankError.status
                return error
        return None

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            launcher = self._trainer.strategy.launcher if self._trainer is not None else None
            started = [process for process in getattr(launcher, "procs", ()) if process not in self._processes]
            if started:
                self._processes += started
                _dismiss_lightnings_observer()
            lost = self.lost()
            if lost is None:
                continue
            if not self._over.wait(_GRACE_SECONDS):  # it hangs: in what the lost one would have answered
                self._on_loss(str(lost))
                print(f"error: {lost}", file=sys.stderr, flush=True)
                self._end(0)
                os._exit(lost.status)

    def _end(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except TimeoutExpired:
                process.kill()  # one that waits for another hears no other signal
                process.wait()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(LostRankError.status)


def _dismiss_lightnings_observer() -> None:
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]  # it ends where there is nobody to watch
