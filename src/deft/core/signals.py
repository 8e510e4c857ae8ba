"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP end a run in good order: at once where nothing can be lost, else when it is safe.

Only the command line installs handlers; from Python, Ctrl-C stays Python's own KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_CODE = 75
_TERMINALS = (0, 1, 2)


class Preempted(BaseException):
    """A signal ended the run. No Exception: what handles errors must not take it for one.

    >>> str(Preempted(signal.SIGTERM, saved=412))
    'SIGTERM: saved step 412, run the same command again to go on'
    """

    def __init__(self, number: int, saved: int | None = None) -> None:
        self.number, self.saved = number, saved
        what = "nothing was trained yet" if saved is None else f"saved step {saved}"
        super().__init__(f"{signal.Signals(number).name}: {what}, run the same command again to go on")


@dataclass
class Signals:
    """The signal that has come, if one has, and whether it may end the run wherever the run is.

    >>> signals = Signals()
    >>> with signals.deferred():
    ...     signals.arrive(signal.SIGTERM)
    ...     print("the step is finished")
    Traceback (most recent call last):
    deft.core.signals.Preempted: SIGTERM: nothing was trained yet, run the same command again to go on
    """

    arrived: int | None = None
    is_deferred: bool = False

    def arrive(self, number: int, frame: FrameType | None = None) -> None:
        """The handler. A second Ctrl-C leaves at once: whatever is being written is written beside its place."""
        if self.arrived is not None:
            if number == signal.SIGINT:
                os._exit(128 + number)
            return
        self.arrived = number
        if not self.is_deferred:
            raise Preempted(number)
        if number == signal.SIGINT:
            os.write(2, b"\nSIGINT: the run is saved and ends; Ctrl-C again leaves without saving\n")

    def check(self) -> None:
        """Raises Preempted where a signal has come."""
        if self.arrived is not None:
            raise Preempted(self.arrived)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for `check`, for `at_once`, or for the end."""
        with self._set(True):
            yield
        self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends what is going on, wherever it is."""
        with self._set(False):
            self.check()
            yield

    @contextmanager
    def _set(self, is_deferred: bool) -> Iterator[None]:
        before, self.is_deferred = self.is_deferred, is_deferred
        try:
            yield
        finally:
            self.is_deferred = before


@contextmanager
def handled() -> Iterator[Signals]:
    """Handles signals while the body runs; those that are ignored, as under nohup, stay so. In the main thread only."""
    signals = Signals()
    terminals = [number for number in _TERMINALS if os.isatty(number)]

    def arrive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            let_go_of(terminals)
        signals.arrive(number)

    before = {each: signal.getsignal(each) for each in HANDLED}
    taken = [each for each, handler in before.items() if handler is not signal.SIG_IGN]
    for each in taken:
        signal.signal(each, arrive)
    try:
        yield signals
    finally:
        for each in taken:
            signal.signal(each, before[each])


def let_go_of(numbers: list[int]) -> None:
    """Redirects these file descriptors to /dev/null: writing to a terminal that has hung up raises an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in numbers:
        os.dup2(nowhere, number)
    os.close(nowhere)
