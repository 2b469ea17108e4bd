"""Calls to a service that may be slow or dead, made so that they cost the caller nothing."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

# A service that takes nothing any more must not fill the memory of a training that goes on for days.
_MOST_WAITING = 20_000


def within(seconds: float, call: Callable[[], Any]) -> bool:
    """Run ``call`` in a thread of its own, and wait for at most ``seconds``.

    Returns:
        Whether it came to its end in time. One that has not goes on by itself.

    Raises:
        BaseException: what ``call`` raised in time.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # also SystemExit, which would end the thread in silence
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return not thread.is_alive()


class Background:
    """Make calls one after another in one thread, in the order they were given.

    Args:
        on_error: told once, of the first call that raised; no call is made from then on.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self.broken = False
        self._on_error = on_error
        self._calls: queue.Queue[Callable[[], Any]] = queue.Queue(_MOST_WAITING)
        threading.Thread(target=self._work, daemon=True, name="vit_attn-tracking").start()

    def put(self, call: Callable[[], Any]) -> None:
        """Add a call."""
        if self.broken:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.stop(TimeoutError(f"{_MOST_WAITING:,} calls are waiting"))

    def stop(self, error: BaseException) -> None:
        """Make no more calls, because of ``error``."""
        if not self.broken:
            self.broken = True
            self._on_error(error)

    def wait(self, seconds: float) -> bool:
        """Wait until every call given so far has been made, for at most ``seconds``."""
        done, end = threading.Event(), time.monotonic() + seconds
        self.put(done.set)
        # In small steps: a call before it may break off the whole row.
        while not (self.broken or done.wait(0.02)):
            if time.monotonic() > end:
                return False
        return True

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if self.broken:
                continue
            try:
                call()
            except BaseException as error:  # a dying service raises SystemExit too
                self.stop(error)
