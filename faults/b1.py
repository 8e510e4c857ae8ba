"""B1: a flipped bit in any file of a checkpoint."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from deft.core import files
from deft.core.errors import DamagedError
from deft.training import checkpoint
from faults import saves
from faults.harness import Result, Scale, tally

TITLE = "flipped bits: the file and the block named, the newest good step taken"
FIGURE = 500
SIZE = 4000


def run(scale: Scale) -> Result:
    return thrown(scale.of(100, 500, 500), flip)


def control() -> Result:
    """Files are not hashed when they are read."""
    with unhashed():
        return thrown(60, flip)


@contextmanager
def unhashed() -> Iterator[None]:
    with (
        mock.patch.object(files, "_verify_file", return_value=None),
        mock.patch.object(files.Blocks, "_is_written", return_value=True),
    ):
        yield


def flip(place: Path, draw: random.Random) -> str:
    """Flips a bit of a file drawn by its size; the file's name."""
    there = sorted(place.iterdir())
    (path,) = draw.choices(there, [each.stat().st_size for each in there])
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return path.name


def thrown(count: int, damage: Callable[[Path, random.Random], str]) -> Result:
    """Damages the newer of two checkpoints, `count` times."""
    with tempfile.TemporaryDirectory(prefix="faults-", dir=saves.MEMORY) as name:
        whole, sees = Path(name) / "whole", list[str]()
        for step in (300, 400):
            checkpoint.write(whole, saves.state(step, SIZE))
        draw = random.Random(0)
        points = []
        for number in range(count):
            folder = Path(name) / str(number)
            shutil.copytree(whole, folder)
            file = damage(folder / "step-000400", draw)
            points.append(found_out(folder, file, sees))
            shutil.rmtree(folder)
        return tally(points, sees[0] if sees else "")


def found_out(folder: Path, file: str, sees: list[str]) -> str:
    """What is wrong with how the damage to step 400 is taken: refused, the file named, and step 300 used instead."""
    try:
        found = checkpoint.find(folder)
    except DamagedError as error:
        return f"{file}: step 300 was not used: {error}"
    except Exception as error:
        return f"{file}: {type(error).__name__}: {error}"
    if found is None or found.checkpoint.step != 300 or not saves.is_state(found.checkpoint):
        return f"{file}: trained on"
    (note,) = found.notes
    if file not in note or not note.endswith(". Using step-300; 100 steps will be redone"):
        return f"{file}: {note}"
    sees.append(note[note.index("step-000400") :])
    return ""
