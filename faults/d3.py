"""D3: signals to a run in each of its phases; the same command afterwards goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from deft.evaluation import generate, heldout
from deft.export import folder as export
from deft.model import load as models
from deft.run import prepare, reading
from deft.training import checkpoint, loop, step
from faults.forking import GENEROUS, HANGS, Child, become, command, deft
from faults.harness import Result, Scale, tally
from faults.scenes import CHATS, arguments, ended, scene

TITLE = "signals in every phase: state saved, exit code 75 within 25 s, no step done twice, same bits in the end"
FIGURE = 60
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS = 25.0
PHASES: dict[str, tuple[Any, str]] = {
    "checking": (reading, "check"),
    "encoding": (prepare, "encode"),
    "loading": (models, "load"),
    "held-out loss": (heldout, "build"),
    "sampling": (generate, "complete"),
    "a step": (step, "mean_share"),
    "an update": (step, "clip_scale"),
    "saving": (checkpoint, "write"),
    "export": (export, "export"),
    "comparing": (export, "verify"),
}
"""A phase, and the function that opens it."""
LATER = {"held-out loss": 3, "sampling": 2, "a step": 5, "an update": 5, "saving": 2}
"""Phases that come several times: the signal comes at so manyeth."""


def run(scale: Scale) -> Result:
    points = [
        *product(PHASES, SIGNALS),
        *((phase, signal.SIGTERM) for phase in ("a step", "saving", "export", "encoding")),
    ]
    doubled = [*product(("a step", "saving", "export", "sampling"), ("TERM, TERM", "INT, INT", "TERM, INT"))]
    chosen = points[:: scale.of(11, 2, 1)]
    with scene(CHATS) as folder:
        whole = _undisturbed(folder)
        found = [_point(folder, whole, phase, (number,)) for phase, number in chosen]
        found += [_point(folder, whole, phase, _pair(pair)) for phase, pair in doubled[:: scale.of(12, 2, 1)]]
        found += [(_imports(folder, number, after), "") for number, after in _starts()[:: scale.of(4, 1, 1)]]
        found += [(_hung_up(folder, whole), "")]
    sees = next((text for _, text in found if "SIGTERM: saved step" in text), "")
    return tally((failure for failure, _ in found), sees)


def control() -> Result:
    """The command line does not handle signals."""

    def deaf() -> None:
        from contextlib import nullcontext

        from deft.core import signals

        signals.handled = lambda: nullcontext(signals.Signals())  # type: ignore[assignment]

    with scene(CHATS) as folder:
        whole = _undisturbed(folder)
        phases = ("a step", "encoding")
        return tally(_point(folder, whole, phase, (signal.SIGTERM,), deaf)[0] for phase in phases)


def _words(folder: Path, **settings: Any) -> list[str]:
    return arguments(
        folder,
        data__eval=0.1,
        evaluate__every=3,
        evaluate__prompts='["What is 2 + 2?"]',
        evaluate__generate="{max_new_tokens: 8}",
        checkpoint__every=4,
        dropout="config",
        microbatch_tokens=256,
        **settings,
    )


def _undisturbed(folder: Path) -> str:
    done = ended(folder, "train", *_words(folder, output=folder / "whole"))
    assert done.code == 0, done.output
    return _result(folder / "whole")


def _point(
    folder: Path, whole: str, phase: str, numbers: tuple[int, ...], before: Callable[[], None] = lambda: None
) -> tuple[str, str]:
    """What went wrong, "" if nothing; and what the user was told."""
    place = folder / f"{phase.replace(' ', '-')}-{'-'.join(str(int(number)) for number in numbers)}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    words = _words(folder, output=place / "run")
    mark, sent, steps = place / "mark", place / "sent", place / "steps"
    child = deft("train", *words, log=place / "log", before=lambda: (before(), _plant(phase, mark, sent, steps)))
    if not child.wait_until(mark.exists):
        return f"{place.name}: the phase did not come: {child.output[-300:]}", ""
    _send(child, numbers, sent)
    again = ended(folder, "train", *words, before=lambda: _watch(steps))
    told = child.output[child.output.rindex("deft: ") :].strip() if "deft: " in child.output else ""
    wrong = _judged(child, numbers, told) or _finished(place, again.code, again.output, whole, numbers, steps)
    shutil.rmtree(place)
    return f"{place.name}: {wrong}" if wrong else "", told


def _send(child: Child, numbers: tuple[int, ...], sent: Path) -> None:
    """Sends the signals, notes that, and waits for the end."""
    for number in numbers:
        child.kill(number)
        time.sleep(0.05)
    sent.touch()
    child.wait(SECONDS + 5)


def _judged(child: Child, numbers: tuple[int, ...], told: str) -> str:
    leaves_at_once = len(numbers) > 1 and numbers[-1] == signal.SIGINT
    name = signal.Signals(numbers[0]).name
    if child.computed > SECONDS:
        return f"took {child.computed:.1f} s"
    if child.code not in ((75, 130) if leaves_at_once else (75,)):
        return f"exit code {child.code}: {child.output[-300:]}"
    is_told = told.startswith(f"deft: {name}: ") and told.endswith("run the same command again to go on")
    return "" if is_told or child.code == 130 else f"said {told!r}"


def _finished(place: Path, code: int, output: str, whole: str, numbers: tuple[int, ...], steps: Path) -> str:
    """What is wrong with the run that went on."""
    if code != 0:
        return f"the second start ended with {code}: {output[-300:]}"
    if _result(place / "run") != whole:
        return "another result than undisturbed"
    if len(numbers) > 1 and numbers[-1] == signal.SIGINT:
        return ""  # who leaves at once may do steps again
    done = [int(line) for line in steps.read_text().split()]
    return "" if done == list(range(1, 13)) else f"steps done: {done}"


def _result(run: Path) -> str:
    """A digest of the weights and of metrics.jsonl but for time and memory."""
    found = hashlib.sha256((run / "final" / "model.safetensors").read_bytes())
    for name in ("metrics", "eval", "samples"):
        for line in (run / f"{name}.jsonl").read_text().splitlines():
            record = {key: value for key, value in json.loads(line).items() if key not in ("seconds", "peak_bytes")}
            found.update(json.dumps(record).encode())
    return found.hexdigest()


def _plant(phase: str, mark: Path, sent: Path, steps: Path) -> None:
    """Marks the moment at which a phase begins, and goes on in it when the signals have been sent."""
    room, name = PHASES[phase]
    plain, left = getattr(room, name), iter(range(LATER.get(phase, 1), 0, -1))

    def marked(*given: Any, **more: Any) -> Any:
        if next(left, 0) == 1:
            mark.touch()
            until = time.monotonic() + HANGS
            while not sent.exists() and time.monotonic() < until:
                time.sleep(0.01)
        return plain(*given, **more)

    setattr(room, name, marked)
    _watch(steps)


def _watch(steps: Path) -> None:
    """Notes each step that is done."""
    loop.optimizer_step = partial(_noted, step.optimizer_step, steps)  # type: ignore[assignment]


def _noted(plain: Any, steps: Path, state: Any, work: Any, *given: Any, **more: Any) -> Any:
    numbers = plain(state, work, *given, **more)
    with steps.open("a") as file:
        file.write(f"{work.step + 1}\n")
        file.flush()
        os.fsync(file.fileno())
    return numbers


def _pair(name: str) -> tuple[int, ...]:
    return tuple(getattr(signal, f"SIG{each}") for each in name.split(", "))


def _hung_up(folder: Path, whole: str) -> str:
    """The terminal is closed in the middle of training: whoever prints to it afterwards would fail."""
    place = folder / "terminal"
    place.mkdir()
    words, steps = _words(folder, output=place / "run"), place / "steps"
    pid, terminal = pty.fork()
    if pid == 0:
        become(lambda: (_watch(steps), command("train", *words)))
    while not steps.exists() or len(steps.read_text().split()) < 5:
        if select.select([terminal], [], [], 0.01)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    child = Child(pid, place / "log")
    child.wait(SECONDS)
    again = ended(folder, "train", *words, before=lambda: _watch(steps))
    wrong = "" if child.code == 75 else f"exit code {child.code}"
    wrong = wrong or _finished(place, again.code, again.output, whole, (signal.SIGHUP,), steps)
    return f"terminal closed: {wrong}" if wrong else ""


def _starts() -> list[tuple[int, float]]:
    """Signals while torch is being imported: so many seconds after the command began to listen."""
    return [*zip(SIGNALS, (0.0, 0.3, 0.6, 1.0), strict=True)]


def _imports(folder: Path, number: int, after: float) -> str:
    """A signal to a command that has only just been started."""
    output = folder / f"start-{int(number)}"
    command = [sys.executable, "-m", "deft", "train", *_words(folder, output=output)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not _listens(child.pid, SIGNALS[-1]):  # earlier, a signal kills a process that has done nothing
        if child.poll() is not None:
            return f"import: ended with {child.returncode} before it listened"
        time.sleep(0.01)
    time.sleep(after)
    child.send_signal(number)
    text, _ = child.communicate(timeout=GENEROUS * SECONDS)
    is_told = "run the same command again to go on" in text and "Traceback" not in text
    return "" if child.returncode == 75 and is_told else f"import: {child.returncode}: {text[-300:]}"


def _listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) & (1 << (number - 1)))
