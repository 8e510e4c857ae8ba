"""Progress for people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deft.core.signals import let_go_of
from deft.core.types import StepRecord

LINE_SECONDS = 5.0
"""Least time between two lines where there is no terminal."""


class _Lasting:
    """See `lasting`."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _tried(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError:
            let_go_of([self._stream.fileno()])


def lasting(stream: IO[str]) -> IO[str]:
    """The stream for a writer that outlives it: once a write has failed, what is written goes nowhere.

    A closed terminal, a pipe without a reader, a log on a full disk end no run and change no exit code.
    """
    return cast(IO[str], _Lasting(stream))


def of_run() -> Console:
    """A console on standard output, whose errors do not end a run."""
    return Console(file=lasting(sys.stdout))


@dataclass
class Steps:
    """Shows the steps of a run as they come."""

    console: Console
    total: int
    progress: Progress | None
    began: float = field(default_factory=time.perf_counter)
    last_line: float = 0.0
    seen: int = 0

    def show(self, record: StepRecord) -> None:
        self.seen += 1
        now = time.perf_counter()
        text = f"loss {record.loss:.4f}  {_rate(record.tokens / max(record.seconds, 1e-9))}"
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=record.step, numbers=text)
        elif record.step == self.total or self.seen == 1 or now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            left = (now - self.began) / self.seen * (self.total - record.step)
            self.console.print(f"step {record.step}/{self.total}  {text}  {duration(left)} left", highlight=False)


@contextmanager
def steps(console: Console, total: int, done: int = 0) -> Iterator[Steps]:
    """A view on a run of `total` steps, `done` of them earlier."""
    if not console.is_terminal:
        yield Steps(console, total, None)
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:
        progress.add_task("training", total=total, completed=done, numbers="")
        yield Steps(console, total, progress)


def _rate(tokens_per_second: float) -> str:
    """
    >>> _rate(12345.0), _rate(730.0)
    ('12.3k tok/s', '730 tok/s')
    """
    if tokens_per_second >= 1000:
        return f"{tokens_per_second / 1000:.1f}k tok/s"
    return f"{tokens_per_second:.0f} tok/s"


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(3700.0), duration(75.0), duration(9.0)
    ('1 h 01 min', '1 min 15 s', '9 s')
    """
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
