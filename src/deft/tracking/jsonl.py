"""Lines of JSON: metrics, evaluations, samples. Each line is whole when it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from deft.core import files
from deft.core.errors import DiskError
from deft.tracking.tracker import TrackedRun


@dataclass
class JsonLines:
    """A file that grows by a line at a time, from any thread. Lines that the disk does not take wait until it does."""

    path: Path
    _waiting: bytes = b""
    _lock: Lock = field(default_factory=Lock)

    def write(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(_finite(record), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self._lock, suppress(DiskError):
            self._waiting += line
            self._append()

    def flush(self) -> None:
        """Brings all lines onto the disk, safe from a power cut. Raises DiskError."""
        with self._lock:
            self._append()
        if self.path.exists():
            files.sync(self.path)

    def _append(self) -> None:
        if self._waiting:
            files.append(self.path, self._waiting)
            self._waiting = b""


@dataclass(frozen=True)
class Logs:
    """The three logs of a run folder, as a tracker. Lines are on the disk for certain after `flush` alone."""

    metrics: JsonLines
    eval: JsonLines
    samples: JsonLines

    @classmethod
    def of(cls, folder: Path) -> Logs:
        return cls(*(JsonLines(folder / f"{name}.jsonl") for name in ("metrics", "eval", "samples")))

    def begin(self, run: TrackedRun) -> None:
        """Lines are appended to what earlier starts wrote."""

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        {"step": self.metrics, "eval": self.eval, "sample": self.samples}[kind].write(record)

    def finish(self) -> None:
        """Lines that the disk did not take are tried again by `flush`."""

    def flush(self) -> None:
        """Brings all lines onto the disk, safe from a power cut. Raises DiskError."""
        for log in (self.metrics, self.eval, self.samples):
            log.flush()


def cut(path: Path, step: int, is_kept: bool = False) -> list[dict[str, Any]]:
    """Takes away the lines of later steps, and one that was cut short; returns those that stay.

    is_kept  whether a log that has later lines is set aside
    """
    if not path.exists():
        return []
    text = path.read_bytes()
    lines = [line for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
    kept = [(line, record) for line in lines if (record := _record(line)) and record["step"] <= step]
    if (data := b"".join(line for line, _ in kept)) != text:
        if is_kept:
            files.set_aside(path)
        files.write_bytes(path, data)
    return [record for _, record in kept]


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log; none where there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [record for line in lines if (record := _record(line))]


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record, None where it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_one = isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] is not True
    return record if is_one else None


def _finite(value: Any) -> Any:
    """NaN and infinity have no place in JSON: they become text.

    >>> _finite({"loss": float("nan")})
    {'loss': 'nan'}
    """
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
