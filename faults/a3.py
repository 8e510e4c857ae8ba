"""A3: a kill or a power cut after any operation of save, retention and export."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from deft.core import files
from faults import disks, saves
from faults.disks import Operation
from faults.harness import Result, Scale, tally

TITLE = "kills and power cuts after every disk operation of save, retention and export: the old step or the new, whole"
FIGURE = 1000
SAVED = (2, 4, 5)


def run(scale: Scale) -> Result:
    # Two draws a state give more than 1,000 states; it takes seconds, so the tests have them all.
    return _thrown(scale.of(2, 4, 20))


def control() -> Result:
    """Files are not synced."""

    class Careless(disks.Recorder):
        def before(self, operation: Operation) -> None:
            is_ready = any(each.what == "mark" for each in self.operations)
            if operation.what != "sync" or not is_ready:
                super().before(operation)

    return _thrown(1, Careless)


def _thrown(draws: int, recorder: type[disks.Recorder] = disks.Recorder) -> Result:
    with tempfile.TemporaryDirectory(prefix="faults-", dir=saves.MEMORY) as name:
        folder = Path(name) / "run"
        folder.mkdir()
        operations = _recorded(folder, recorder(folder))
        return tally(
            [_after(Path(name) / "after", operations, *state) for state in disks.states(operations, draws)],
            "resumed step 4 of 5 (verified 8 files)",
        )


def _recorded(folder: Path, recorder: disks.Recorder) -> list[Operation]:
    """A run's operations. The user's own folders were there before, on the disk."""
    with disks.using(recorder):
        for each in ("checkpoints", *(f"checkpoints/{name}" for name in saves.STRANGERS)):
            files.disk.mkdir(folder / each)
        for each in saves.STRANGERS:
            files.write_text(folder / "checkpoints" / each / "mine.txt", each)
        for each in ("checkpoints", "."):
            files.disk.sync_folder(folder / each)
        recorder.mark("ready")
        saves.save(folder, SAVED, recorder.mark)
    return recorder.operations


def _after(place: Path, operations: list[Operation], done: int, name: str, write: object) -> str:
    marks = [operation.path for operation in operations[:done] if operation.what == "mark"]
    if "ready" not in marks:
        return ""
    saved = [int(mark.split()[1]) for mark in marks if mark.startswith("saved")]
    begun = [int(mark.split()[1]) for mark in marks if mark.startswith("begin")]
    write(place)  # type: ignore[operator]
    try:
        wrong = saves.look(place, max(saved, default=0), max(begun, default=0))
        if not wrong and "exported" in marks and not (place / "final").exists():
            wrong = "the export is lost"
        return f"{name}: {wrong}" if wrong else ""
    finally:
        shutil.rmtree(place)
