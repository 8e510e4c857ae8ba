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


@dataclass
class Child:
    """A process that was forked off; what it prints goes to `log`."""

    pid: int
    log: Path
    code: int | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; a process that has ended gets none."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, minus the signal where one ended it, None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code. A process that takes longer than `seconds` is killed: TimeoutError with what it printed."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
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
    import deft.run  # noqa: F401  imported before the fork, so that no child has to

    return fork(lambda: (before(), command(*words)), log)


def command(*words: str) -> None:
    """`deft WORDS` in this process."""
    from deft import cli

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
