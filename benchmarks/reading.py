"""How fast files of rows are read and understood: MB/s, seconds per GB, and the peak of memory.

    python benchmarks/reading.py [MB]

Writes a file of chats (about 1.5 kB a row) and one of question and answer (180 bytes a row) to a temporary folder. One
process, one core. `json.loads` of every line, nothing else, is the baseline.
"""

from __future__ import annotations

import json
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deft.data import shapes, sources
from deft.data.format import Choices

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "naïve", "readers", '"quoted"', "in"]


def chat(draw: random.Random) -> dict[str, Any]:
    turns = (("user", 30), ("assistant", 90), ("user", 20), ("assistant", 80))
    return {"messages": [{"role": role, "content": text(draw, length)} for role, length in turns]}


def question(draw: random.Random) -> dict[str, Any]:
    return {"question": text(draw, 12), "answer": text(draw, 12)}


def text(draw: random.Random, length: int) -> str:
    return " ".join(draw.choices(WORDS, k=length))


def write(path: Path, make: Callable[[random.Random], dict[str, Any]], size: float) -> None:
    draw, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            written += file.write(json.dumps(make(draw)) + "\n")


def parsed(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        yield from map(json.loads, file)


def understood(path: Path) -> Iterator[Any]:
    return shapes.Reader(path.name, "auto", Choices()).each(sources.read(str(path)))


def main(megabytes: float) -> None:
    print(f"python {platform.python_version()}, {platform.machine()}, one process; files of {megabytes:g} MB")
    with tempfile.TemporaryDirectory() as folder:
        for make in (chat, question):
            path = Path(folder) / f"{make.__name__}.jsonl"
            write(path, make, megabytes * 1e6)
            size = path.stat().st_size / 1e6
            for what in (parsed, understood):
                start = time.perf_counter()
                rows = sum(1 for _ in what(path))
                seconds = time.perf_counter() - start
                print(
                    f"{path.name:16} {what.__name__:11} {rows:>9} rows {size / seconds:6.1f} MB/s "
                    f"{1000 * seconds / size:6.1f} s/GB {1e6 * seconds / rows:6.1f} us/row"
                )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the whole process: {peak:.0f} MiB")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 200.0)
