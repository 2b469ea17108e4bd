"""Stopping when a scheduler says so: a signal is noted, the run saves at its next step and ends."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# SIGTERM ends a container or a preempted job; SIGUSR1 and, from submitit, SIGUSR2 say that time is nearly up.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):  # as KeyboardInterrupt, nobody's `except Exception` may swallow it
    """A run was stopped by a signal; what it had done is in a checkpoint.

    Args:
        signum: the signal.
        step: the optimizer step of that checkpoint; None where training had not begun, or had ended.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        super().__init__(signum, step)
        self.signum, self.step = signum, step

    @property
    def status(self) -> int:
        """Exit status: 128 + the signal, which schedulers take for "not the program's fault"."""
        return 128 + self.signum

    def __str__(self) -> str:
        where = f"saved at step {self.step}" if self.step is not None else "nothing was left to save"
        return f"stopped by {signal.Signals(self.signum).name}: {where}; the same command goes on from there"


class StopSignals:
    """Context in which :data:`SIGNALS` stop a run in order.

    While :attr:`patient`, a signal is noted in :attr:`received` for the training to act on between two steps;
    otherwise it raises :class:`Stopped` at once. Handlers from before are put back at the end.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.patient = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.reclaim()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if _can_handle():
            for signum, handler in self._before.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def reclaim(self) -> None:
        """Take the signals again: Lightning's Trainer puts a handler of its own in front, which hangs several ranks."""
        if _can_handle():
            for signum in SIGNALS:
                signal.signal(signum, self._handle)

    def pass_on(self, stop: Stopped) -> None:
        """Call the handler from before, where a launcher such as submitit has one: it requeues the job."""
        handler = self._before.get(stop.signum)
        if callable(handler) and not isinstance(handler, signal.Handlers):
            handler(stop.signum, None)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.patient:
            self.received = self.received or signum
        else:
            raise Stopped(signum)


def _can_handle() -> bool:
    return threading.current_thread() is threading.main_thread()
