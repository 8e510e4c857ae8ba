"""C1: a disk that is full at any point."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deft.core import files
from deft.core.errors import DeftError, DiskError
from deft.training import checkpoint
from faults import disks, runs, saves
from faults.harness import Result, Scale, tally
from faults.scenes import scene

TITLE = "full disks: old steps intact, training goes on, exit 4 if the last save fails, resumed to the same bits"
FIGURE = 50
WHOLE_RUN = 700
"""KB that a run of the scene takes at the most; a disk of less is full at some point."""


def run(scale: Scale) -> Result:
    # Each operation in turn fails alone, and with all after it: no model is needed for that.
    operations = [
        text
        for number in (errno.ENOSPC, errno.EIO)
        for count in (1, 10**9)
        for text in _each_operation(count, number, scale.of(5, 1, 1))
    ]
    whole, sees = _whole_runs(scale.of(3, 12, 50))
    return tally([*operations, *whole], sees)


def control() -> Result:
    """What could not be written is left where it is, under its final name."""
    remove, name = files._remove_tree, files._staging_name
    files._remove_tree, files._staging_name = lambda path: None, lambda path: path.with_name("step-000009")
    try:
        return tally(_each_operation(10**9, errno.ENOSPC, 9))
    finally:
        files._remove_tree, files._staging_name = remove, name


def _each_operation(count: int, number: int, step: int) -> Iterator[str]:
    """From each operation of saving on, `count` fail; then there is room again."""
    first = 1
    while True:
        with tempfile.TemporaryDirectory(prefix="faults-", dir=saves.MEMORY) as name:
            folder = Path(name) / "run"
            saves.prepare(folder)
            disk = disks.FailAt(first, count, number)
            wrong = _save_without_room(folder, disk)
            yield f"{os.strerror(number)} at operation {first}, {count} times: {wrong}" if wrong else ""
            if disk.seen < first:
                return
        first += step


def _save_without_room(folder: Path, disk: disks.FailAt) -> str:
    """Saves steps 2 and 4, then 5 and 8 from a new start; what was wrong in between and at the end."""
    marks: list[str] = []
    with disks.using(disk), suppress(DiskError):
        said = saves.save(folder, (2, 4, 5), marks.append)
        marks += [line for line in said if "still have" not in line and "no checkpoint yet" not in line]
    saved = max((int(mark.split()[1]) for mark in marks if mark.startswith("saved")), default=0)
    if wrong := saves.look(folder, saved, 5):
        return wrong
    if odd := [mark for mark in marks if mark.split()[0] not in ("begin", "saved", "failed", "exported")]:
        return f"said {odd}"
    shutil.rmtree(folder / "final", ignore_errors=True)
    found = checkpoint.find(folder / "checkpoints")
    try:
        saves.save(folder, (8,), first=found.checkpoint.step + 1 if found else 1)
    except DeftError as error:
        return f"no save with room again: {error}"
    return saves.look(folder, 8, 8)


def _whole_runs(count: int) -> tuple[list[str], str]:
    """Runs on a small disk, and again when it has grown."""
    with scene() as folder:
        reference, _ = runs.undisturbed(folder)
        points, sees = [], ""
        for number in range(count):
            room = 1 + WHOLE_RUN * (number + 1) // (count + 1)
            place = _on_a_small_disk if _can_mount() else _with_small_files
            wrong, said = place(folder, f"run-{number}", room, reference)
            points.append(f"{room} KB: {wrong}" if wrong else "")
            sees = said or sees
        return points, sees


def _on_a_small_disk(folder: Path, output: str, room: int, reference: Path) -> tuple[str, str]:
    with _mounted(folder / output, room):
        first = runs.start(folder, output)
        wrong, said = _was_told(first.wait(), first.output)
        if wrong:
            return wrong, said
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder / output)], check=True)
        return runs.finish(folder, output, reference), said


def _with_small_files(folder: Path, output: str, room: int, reference: Path) -> tuple[str, str]:
    size = room * 1024 // 10

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    first = runs.start(folder, output, limit)
    wrong, said = _was_told(first.wait(), first.output)
    return (wrong, said) if wrong else (runs.finish(folder, output, reference), said)


def _was_told(code: int, output: str) -> tuple[str, str]:
    """What is wrong with how a run without room ended, and the complaint that the user saw."""
    told = next((line for line in output.splitlines() if line.startswith("disk full: ")), "")
    if code == 0:
        return "", told
    if code != DiskError.exit_code or "Traceback" in output:
        return f"exit code {code}: {output[-400:]}", told
    return "" if runs.message(output) else "nothing was said", told


@contextmanager
def _mounted(place: Path, kilobytes: int) -> Iterator[None]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", name], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", "-l", name], check=True)
        return done.returncode == 0
