"""C2: folders that cannot be written to, from the start or from some step on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deft.core import files
from faults import disks, runs
from faults.harness import Result, Scale, tally
from faults.scenes import scene

TITLE = (
    "folders without permission, files in their place, links, no inodes, removed in mid-run: one line, path, way out"
)
FIGURE = 16
NOBODY = 65534
SOON = 5.0

Action = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """What is wrong with the run's folder: `prepare` before the run, `plant` in it, `mend` before the next start.

    output  the folder, below the scene's
    codes   the exit codes that are right; where it is 2, the weights must not have been loaded
    is_lost what was logged is gone, so that there is nothing to compare
    """

    name: str
    prepare: Action = lambda run: None
    plant: Action = lambda run: None
    mend: Action = lambda run: None
    output: str = "run"
    codes: tuple[int, ...] = (2,)
    needs: str = ""
    is_lost: bool = False


def run(scale: Scale) -> Result:
    return _thrown(CASES[:: scale.of(5, 1, 1)])


def control() -> Result:
    """Nobody looks at the folder before the run starts."""

    def careless() -> None:
        import deft.run.folder
        import deft.run.reading

        deft.run.reading.output_folder = lambda output, may_go_on=False: Path(output)
        deft.run.folder.make_folder = lambda folder: None

    return _thrown((CASES[0], CASES[1]), careless)


def _thrown(cases: tuple[Case, ...], before: Callable[[], None] = lambda: None) -> Result:
    points, sees = list[str](), ""
    with scene() as whole:
        reference, _ = runs.undisturbed(whole)
        for case in cases:
            if case.needs == "mount" and os.geteuid() != 0:
                continue
            with scene() as folder:
                wrong, said = _start(folder, case, reference, before)
                points.append(f"{case.name}: {wrong}" if wrong else "")
                sees = sees or said[said.find("run") :]
    return tally(points, sees)


def _start(folder: Path, case: Case, reference: Path, before: Callable[[], None]) -> tuple[str, str]:
    folder.chmod(0o755)
    (folder / "cache").mkdir(exist_ok=True)
    (folder / "cache").chmod(0o777)
    place = folder / case.output
    case.prepare(place)
    try:
        child = runs.start(folder, case.output, lambda: (before(), case.plant(place)))
        code = child.wait()
        said = runs.message(child.output)
        if code not in case.codes or "Traceback" in child.output:
            return f"exit code {code}: {child.output[-600:]}", said
        if code == 2 and ("parameters" in child.output or case.output.split("/")[0][:40] not in child.output):
            return f"found late, or not named: {child.output[-300:]}", said
        case.mend(place)
        if code in (0, 2) or case.is_lost:
            return "", said
        return runs.finish(folder, case.output, reference), said
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def _nobody(run: Path) -> None:
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _closed(run: Path) -> None:
    run.mkdir()
    run.chmod(0o555)


def _mounted(options: str) -> Action:
    def mount(run: Path) -> None:
        run.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(run)], check=True)

    return mount


def _remounted(options: str) -> Action:
    return lambda run: subprocess.run(["mount", "-o", f"remount,{options}", str(run)], check=True)


def _at_save(number: int, action: Action) -> Action:
    """Plants something that happens when the run begins a save."""

    def plant(run: Path) -> None:
        from deft.training.saving import Saver

        begin, calls = Saver.begin, [0]

        def begun(*given: Any) -> None:
            calls[0] += 1
            if calls[0] == number:
                action(run)
            begin(*given)

        Saver.begin = begun

    return plant


def _limit(kind: int, count: int) -> Action:
    return lambda run: resource.setrlimit(kind, (count, resource.getrlimit(kind)[1]))


def _read_only(run: Path) -> None:
    files.disk = disks.FailAt(1, 10**9, errno.EROFS)


def _file_instead(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("not a folder")


def _folder_again(run: Path) -> None:
    (run / "checkpoints").unlink()


CASES = (
    Case("the path is a file", prepare=lambda run: run.write_text("x")),
    Case("a folder above is a file", prepare=lambda run: run.parent.write_text("x"), output="above/run"),
    Case("a dangling link", prepare=lambda run: run.symlink_to("nowhere")),
    Case("a link to itself", prepare=lambda run: run.symlink_to("run")),
    Case("a folder with other things in it", prepare=lambda run: (run.mkdir(), (run / "mine.txt").write_text("x"))),
    Case("no permission in the folder", prepare=_closed, plant=_nobody),
    Case("no permission above", plant=_nobody),
    Case("a read-only file system", prepare=_mounted("ro"), needs="mount"),
    Case("no inodes", prepare=_mounted("nr_inodes=1"), needs="mount"),
    Case("a name that is too long", output="r" * 300),
    Case("few open files", plant=_limit(resource.RLIMIT_NOFILE, 64), codes=(0,)),
    Case(
        "inodes run out",
        prepare=_mounted("nr_inodes=16"),
        codes=(4,),
        mend=_remounted("nr_inodes=1000"),
        needs="mount",
    ),
    Case("the file system turns read-only", plant=_at_save(2, _read_only), codes=(4,)),
    Case("the folder is removed", plant=_at_save(2, shutil.rmtree), codes=(4,), is_lost=True),
    Case("checkpoints becomes a file", plant=_at_save(2, _file_instead), codes=(4,), mend=_folder_again),
    Case("a quota on files", plant=_at_save(2, _limit(resource.RLIMIT_FSIZE, 20_000)), codes=(4,)),
)
