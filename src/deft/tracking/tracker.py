"""What a run tells while it goes on, and to whom: any number of trackers, none of which can end it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What is known of a run before its first record.

    config  resolved, as JSON, without secrets
    steps   of the whole run; `done` of them by earlier starts
    """

    folder: Path
    config: Mapping[str, Any]
    steps: int
    done: int = 0


class Tracker(Protocol):
    """Where the records of a run go. Whatever a method raises, the run goes on."""

    def begin(self, run: TrackedRun) -> None:
        """Called once, before the first record."""
        ...

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """A record, with its `step`: of a "step" (the fields of StepRecord), an "eval" or a "sample"."""
        ...

    def finish(self) -> None:
        """Called once, however the run ends."""
        ...


@dataclass
class Trackers:
    """All trackers of a run. `say` is told the first error of each; the others get their records all the same."""

    trackers: Sequence[Tracker]
    say: Callable[[str], None]
    _failed: set[int] = field(default_factory=set)

    @contextmanager
    def following(self, run: TrackedRun) -> Iterator[Trackers]:
        """Begins all trackers, and finishes them whatever the body raises."""
        self._call("begin", run)
        try:
            yield self
        finally:
            self._call("finish")

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """The record, to each tracker."""
        self._call("write", kind, record)

    def _call(self, method: str, *given: Any) -> None:
        for index, tracker in enumerate(self.trackers):
            try:
                getattr(tracker, method)(*given)
            except Exception as error:
                if index not in self._failed:
                    self._failed.add(index)
                    what = " ".join(f"{type(error).__name__}: {error}".split())
                    self.say(f"warning: the tracker {type(tracker).__name__} failed ({what}); training goes on")
