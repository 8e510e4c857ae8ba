"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP end a run in good order: at once where nothing can be lost, else when it is safe.

The command line handles all four. From Python it is Ctrl-C alone, which stays Python's own KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_CODE = 75
REPEATED = 2.0
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

    since            the time.monotonic() at which it came
    repeated_within  seconds in which another SIGINT is the same one: torchrun sends on what a terminal has sent to all

    >>> signals = Signals()
    >>> with signals.deferred():
    ...     signals.arrive(signal.SIGTERM)
    ...     print("the step is finished")
    Traceback (most recent call last):
    deft.core.signals.Preempted: SIGTERM: nothing was trained yet, run the same command again to go on
    """

    arrived: int | None = None
    is_deferred: bool = False
    since: float = 0.0
    repeated_within: float = 0.0

    def arrive(self, number: int, frame: FrameType | None = None) -> None:
        """The handler. A second Ctrl-C leaves at once: whatever is being written is written beside its place."""
        if self.arrived is not None:
            if number == signal.SIGINT and time.monotonic() - self.since >= self.repeated_within:
                self._leave(number)
            return
        self.arrived, self.since = number, time.monotonic()
        if not self.is_deferred:
            raise self._ending(number)
        if number == signal.SIGINT:
            os.write(2, b"\nSIGINT: the run is saved and ends; Ctrl-C again leaves at once, saved or not\n")

    def check(self) -> None:
        """Raises Preempted where a signal has come."""
        if self.arrived is not None:
            raise self._ending(self.arrived)

    def _ending(self, number: int) -> BaseException:
        return Preempted(number)

    def _leave(self, number: int) -> None:
        os._exit(128 + number)

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


@dataclass
class Interrupts(Signals):
    """Ctrl-C as Python has it: KeyboardInterrupt, the first when it is safe, each further one at once.

    >>> ctrl_c = Interrupts()
    >>> try:
    ...     with ctrl_c.deferred():
    ...         ctrl_c.arrive(signal.SIGINT)
    ...         print("the step is finished")
    ... except KeyboardInterrupt:
    ...     print("and saved")
    the step is finished
    and saved
    """

    def _ending(self, number: int) -> BaseException:
        return KeyboardInterrupt()

    def _leave(self, number: int) -> None:
        raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[Signals]:
    """Handles Ctrl-C while the body runs, where nobody else does: a caller's own handler is left in its place.

    In a thread that is not the main one there is nothing to handle: Ctrl-C never reaches it.
    """
    if not is_reached_by_interrupts() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield Signals()
        return
    found = Interrupts()
    signal.signal(signal.SIGINT, found.arrive)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_reached_by_interrupts() -> bool:
    """Whether Ctrl-C ends what this thread does: it does so in the main thread alone."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handled() -> Iterator[Signals]:
    """Handles signals while the body runs; those that are ignored, as under nohup, stay so. In the main thread only."""
    signals = Signals(repeated_within=REPEATED if "TORCHELASTIC_RUN_ID" in os.environ else 0.0)
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


def open_streams() -> None:
    """Opens /dev/null for those of standard input, output and error that are closed.

    The next file would have their number else, and get what some library writes to it.
    """
    for number in _TERMINALS:
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
