"""What a run shows to people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deft.core.redact import redacted, visible
from deft.core.signals import let_go_of
from deft.tracking.tracker import TrackedRun

LINE_SECONDS = 5.0
"""Least time between two lines where there is no terminal."""
SHOWN_SAMPLES = 3


class _Lasting:
    """See `lasting`."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(_encodable(text, getattr(self._stream, "encoding", None))))
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _tried(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError:
            with suppress(OSError, ValueError):  # a stream in memory has no number
                let_go_of([self._stream.fileno()])
        except ValueError:  # it is closed
            self._stream = io.StringIO()


def _encodable(text: str, encoding: str | None) -> str:
    """The text with numbers in place of the characters that an encoding does not have.

    >>> _encodable("a 日", "ascii")
    'a \\\\u65e5'
    """
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def lasting(stream: IO[str] | None) -> IO[str]:
    """The stream for a writer that outlives it: once a write has failed, what is written goes nowhere.

    A closed terminal, a pipe without a reader, a log on a full disk, a console that lacks a character, and no stream at
    all (None) end no run and change no exit code.
    """
    return cast(IO[str], _Lasting(stream if stream is not None else io.StringIO()))


def of_run() -> Console:
    """A console on standard output, whose errors do not end a run."""
    return Console(file=lasting(sys.stdout))


def say(console: Console, text: str) -> None:
    """A line of text as it is, without secrets."""
    console.print(visible(redacted(text)), highlight=False, soft_wrap=True, markup=False)


@contextmanager
def counting(console: Console, what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar that counts, where there is a terminal; yields what moves it on."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@dataclass
class ConsoleTracker:
    """A bar on a terminal, elsewhere a line every LINE_SECONDS; evaluations and the first samples of each.

    began    time.perf_counter() when the run was asked for
    loading  seconds that the model took to load
    """

    console: Console
    began: float
    loading: float
    _progress: Progress | None = None
    _total: int = 0
    _seen: int = 0
    _first: float = 0.0
    _last_line: float = 0.0
    _shown: Counter[int] = field(default_factory=Counter)

    def begin(self, run: TrackedRun) -> None:
        self._total, self._first = run.steps, time.perf_counter()
        if self.console.is_terminal:
            numbers = TextColumn("{task.fields[numbers]}")
            columns = BarColumn(), MofNCompleteColumn(), numbers, TimeRemainingColumn(compact=True)
            self._progress = Progress(TextColumn("training"), *columns, console=self.console)
            self._progress.add_task("training", total=run.steps, completed=run.done, numbers="")
            self._progress.start()

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind == "step":
            self._step(record)
        elif kind == "eval":
            self._evaluation(record)
        elif kind == "sample":
            self._sample(record)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _evaluation(self, record: Mapping[str, Any]) -> None:
        values = ", ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "step")
        say(self.console, f"step {record['step']}: {values}")
        self._shown[record["step"]] = 0

    def _sample(self, record: Mapping[str, Any]) -> None:
        if record["step"] not in self._shown:  # nothing was measured
            self._evaluation({"step": record["step"]})
        self._shown[record["step"]] += 1
        if self._shown[record["step"]] <= SHOWN_SAMPLES:
            say(self.console, f"  {record['prompt']!r} -> {record['output']!r}")

    def _step(self, record: Mapping[str, Any]) -> None:
        self._seen += 1
        step, now = record["step"], time.perf_counter()
        text = f"loss {record['loss']:.4f}  {_rate(record['tokens'] / max(record['seconds'], 1e-9))}"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, numbers=text)
        elif step == self._total or self._seen == 1 or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = duration((now - self._first) / self._seen * (self._total - step))
            say(self.console, f"step {step}/{self._total}  {text}  {left} left")
        if self._seen == 1:
            say(
                self.console,
                f"first step after {now - self.began:.1f} s ({self.loading:.1f} s of it loading the model)",
            )


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
