"""B2: files of a checkpoint that are cut, have a page of zeros, are missing, or are those of another step."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from deft.core import files
from deft.training import checkpoint
from faults import b1, saves
from faults.harness import Result, Scale

TITLE = "truncated files, zeroed pages, missing files, files of another step"
FIGURE = 230
PAGE = 4096


def run(scale: Scale) -> Result:
    count = scale.of(25, 100, 100)
    swaps = scale.of(7, 20, 20)
    results = [b1.thrown(count, cut), b1.thrown(count, zero), b1.thrown(swaps, swap), _each_file_deleted()]
    failures = tuple(text for result in results for text in result.failures)
    points = sum(result.points for result in results)
    return Result(points, points - len(failures), failures, results[0].sees)


def control() -> Result:
    """Files are not hashed when they are read."""
    with b1.unhashed():
        return b1.thrown(30, zero)


def cut(place: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(place.iterdir()))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    return path.name


def zero(place: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(place.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data) // PAGE) * PAGE
    data[start : start + PAGE] = bytes(min(PAGE, len(data) - start))
    path.write_bytes(data)
    return path.name


def swap(place: Path, draw: random.Random) -> str:
    """The same file of the other step in its place."""
    there = [path for path in sorted(place.iterdir()) if path.read_bytes() != (_other(place) / path.name).read_bytes()]
    path = draw.choice(there)
    shutil.copyfile(_other(place) / path.name, path)
    # A whole manifest of another step is told by its step, under the folder's name.
    return path.name if path.name != files.MANIFEST else ""


def _other(place: Path) -> Path:
    return place.with_name("step-000300")


def _each_file_deleted() -> Result:
    with tempfile.TemporaryDirectory(dir=saves.MEMORY) as name:
        names = [path.name for path in checkpoint.write(Path(name), saves.state(1)).iterdir()]
    left = iter(names)

    def delete(place: Path, draw: random.Random) -> str:
        path = place / next(left)
        path.unlink()
        return path.name

    return b1.thrown(len(names), delete)
