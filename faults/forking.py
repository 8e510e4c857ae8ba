"""Commands in forks of this process: torch is imported once, and a run starts in a tenth of a second."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

GENEROUS = 10
"""A limit on computing time is one on wall time as well, this many times as long: a busy machine fails nothing."""

HANGS = 600.0
"""Seconds after which what a test waits for will not come."""


@dataclass
class Child:
    """A process that was forked off; what it prints goes to `log`.

    computed  seconds of CPU time that it used, with its own children that it has waited for; known from its end on
    """

    pid: int
    log: Path
    code: int | None = None
    computed: float = 0.0

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; a process that has ended gets none."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, minus the signal where one ended it, None while it runs."""
        if self.code is None:
            self._reap(os.WNOHANG)
        return self.code

    def _reap(self, options: int) -> None:
        pid, status, usage = os.wait4(self.pid, options)
        if pid:
            self.code, self.computed = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime

    def _computed_so_far(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code. A process that computes for longer is killed: TimeoutError with what it printed."""
        deadline = time.monotonic() + GENEROUS * seconds
        while self.poll() is None:
            if self._computed_so_far() > seconds or time.monotonic() > deadline:
                self.kill()
                self._reap(0)
                raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def wait_until(self, condition: Callable[[], bool], seconds: float = HANGS) -> bool:
        """Whether the condition came true before the process ended or the time was over."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.002)
        return condition()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def fork(target: Callable[[], object], log: Path) -> Child:
    """Runs `target` in a child, in the folder of `log`, which gets its output.

    SystemExit gives the exit code, any other exception 1.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        become(lambda: (_log_to(log), target()))
    return Child(pid, log)


def deft(*words: str, log: Path, before: Callable[[], object] = lambda: None) -> Child:
    """`deft WORDS` in a child, as from the command line. `before` runs first in it: the place to plant a fault."""
    import deft.run.train  # noqa: F401  imported before the fork, so that no child has to

    return fork(lambda: (before(), command(*words)), log)


def command(*words: str) -> None:
    """`deft WORDS` in this process."""
    from deft.commands import cli

    sys.argv = ["deft", *words]
    cli.main()


def become(target: Callable[[], object]) -> NoReturn:
    """This process, a fork, does `target` and ends with its exit code; after an exception with 1."""
    code = 1
    try:
        target()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _log_to(log: Path) -> None:
    os.setsid()
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.chdir(log.parent)
    os.environ["COLUMNS"] = "200"
