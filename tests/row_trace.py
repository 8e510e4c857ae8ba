"""What one row passes on its way from a file to its loss: modules, functions and lines of deft that run.

    python tests/row_trace.py [--source SRC] [--modules]

A chat of four messages and a trlx dialogue of four strings each stand alone in a file and are trained by `deft.train`,
traced from the first line that is read to the first call of the loss. Counted once each: files of which a function
runs, functions (comprehensions and lambdas apart), and lines; bodies of modules and classes are not.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROWS = {
    "chat": {
        "messages": [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "It is 4."},
            {"role": "user", "content": "Thanks!"},
            {"role": "assistant", "content": "You are welcome."},
        ]
    },
    "dialogue": ["What is 2 + 2?", " It is 4.", "\nSure?", " Yes."],
}
LOSS = ("deft/loss/nll.py", "deft/training/chunked.py")


class LossReached(BaseException):
    """The row has come to its loss."""


class Trace:
    """Lines and functions of deft that run, by file, until the loss is called."""

    def __init__(self, package: Path) -> None:
        self.package = str(package)
        self.lines: dict[str, set[int]] = {}
        self.functions: dict[str, set[CodeType]] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self.package) or not code.co_flags & inspect.CO_OPTIMIZED:
            return None
        if code.co_filename.endswith(LOSS):
            raise LossReached
        if not code.co_name.startswith("<"):
            self.functions.setdefault(code.co_filename, set()).add(code)
        self.lines.setdefault(code.co_filename, set()).add(frame.f_lineno)
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.lines[frame.f_code.co_filename].add(frame.f_lineno)
        return self._line


def trace(name: str) -> dict[str, Any]:
    """The counts of one row, by module."""
    from tiny_models import write_llama
    from tiny_tokenizers import CHATML

    import deft
    from deft import __file__ as package

    found = Trace(Path(package).parent)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        os.environ["DEFT_CACHE"] = str(here / "cache")
        model = write_llama(here / "model", chat_template=CHATML)
        (here / "train.jsonl").write_text(json.dumps(ROWS[name]) + "\n")
        threading.settrace(found)
        sys.settrace(found)
        try:
            deft.train(model, str(here / "train.jsonl"), epochs=1, device="cpu", output=str(here / "run"))
        except LossReached:
            pass
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
    lines = {path: len(numbers) for path, numbers in found.lines.items()}
    functions = {path: len(codes) for path, codes in found.functions.items()}
    return {os.path.relpath(path, found.package): [functions.get(path, 0), lines[path]] for path in sorted(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1] / "src")
    parser.add_argument("--modules", action="store_true", help="the counts of each module as well")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(trace(arguments.row)))
        return
    for row in ROWS:
        command = [sys.executable, __file__, "--row", row]
        environment = os.environ | {"PYTHONPATH": f"{arguments.source}{os.pathsep}{Path(__file__).parent}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        counts = json.loads(done.stdout.splitlines()[-1])
        report(row, counts, arguments.modules)


def report(row: str, counts: dict[str, list[int]], with_modules: bool) -> None:
    functions, lines = (sum(each[index] for each in counts.values()) for index in (0, 1))
    print(f"{row}: {len(counts)} modules, {functions} functions, {lines} lines before the loss")
    rooms: Counter[str] = Counter()
    for module, (_, count) in counts.items():
        rooms[module.partition("/")[0]] += count
        if with_modules:
            print(f"    {module:<40} {counts[module][0]:>5} {count:>6}")
    if with_modules:
        print("   ", ", ".join(f"{room} {count}" for room, count in rooms.most_common()))


if __name__ == "__main__":
    main()
