"""One run at a time in a folder; a lock that was left behind by a process that is gone stops nobody."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from deft.core import files, lock
from deft.core.errors import DiskError, InputError

FORK = multiprocessing.get_context("fork")


def test_a_second_holder_is_told_who_and_since_when(tmp_path: Path) -> None:
    with lock.held(tmp_path / "out") as note:
        assert note == ""
        with (
            pytest.raises(InputError, match=rf"out is in use by pid {os.getpid()} on host \S+ since \d\d:\d\d; wait"),
            lock.held(tmp_path / "out"),
        ):
            pass


def test_a_folder_that_nothing_was_written_to_is_gone_again(tmp_path: Path) -> None:
    with lock.held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / lock.NAME).is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_or_was_written_stays(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with lock.held(tmp_path / name):
            if name == "new":
                (tmp_path / name / "kept").touch()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["new", "new/kept", "old"]


def test_a_lock_left_behind_is_taken_over_with_a_word(tmp_path: Path) -> None:
    left = {"pid": 812, "host": "a", "started": "2026-03-01T11:02:31+00:00"}
    (tmp_path / lock.NAME).write_text(json.dumps(left))
    with lock.held(tmp_path) as note:
        assert note == f"{tmp_path}: taken over from pid 812 on host a since 2026-03-01 11:02, which is gone"
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_a_lock_without_a_name_in_it_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / lock.NAME).write_text(text)
    with lock.held(tmp_path) as note:
        assert note == ""


def test_a_folder_that_cannot_be_made_is_left_to_the_checks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with lock.held(tmp_path / "file" / "out") as note:
        assert note == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _hold(folder: Path, ready: Barrier, log: Path) -> None:
    ready.wait()
    for _ in range(20):
        try:
            with lock.held(folder):
                (log / str(os.getpid())).write_text("in")
                assert len(list(log.iterdir())) == 1, "two holders"
                time.sleep(0.001)
                (log / str(os.getpid())).unlink()
        except InputError:
            time.sleep(0.001)


def test_many_that_start_together_hold_it_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    ready = FORK.Barrier(4)
    workers = [FORK.Process(target=_hold, args=(tmp_path / "out", ready, tmp_path / "log")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert not list(tmp_path.glob("out/*"))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", ["removed", "replaced", "taken over"])
def test_a_folder_that_is_another_s_by_now_is_left_as_it_is(tmp_path: Path, change: str) -> None:
    run = tmp_path / "run"
    with files.staged(tmp_path / "x") as staging:
        staging.write("one", [b"1"])
    with lock.held(run):
        files.write_text(run / "metrics.jsonl", "first\n")
        if change == "taken over":
            (run / lock.NAME).unlink()
        else:
            run.rename(tmp_path / "moved")
        if change != "removed":
            run.mkdir(exist_ok=True)
            (run / lock.NAME).write_text('{"pid": 7}')
        there = contents(run)
        for write in (
            lambda: files.append(run / "metrics.jsonl", b"second\n"),
            lambda: files.write_text(run / "config.yaml", "second"),
            lambda: files.make_folder(run / "checkpoints"),
            lambda: files.copy(tmp_path / "x", run / "checkpoints" / "step-000001"),
            lambda: files.set_aside(run / "metrics.jsonl"),
        ):
            with pytest.raises(DiskError, match=r"removed or replaced|is another run's by now"):
                write()
    assert contents(run) == there
    assert run.is_dir() == (change != "removed")


def test_a_lock_that_somebody_took_away_is_made_again(tmp_path: Path) -> None:
    with lock.held(tmp_path / "run"):
        (tmp_path / "run" / lock.NAME).unlink()
        files.write_text(tmp_path / "run" / "kept", "")
        with pytest.raises(InputError, match="is in use by"), lock.held(tmp_path / "run"):
            pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


@pytest.mark.parametrize("kind", ["link", "second name", "text", "pipe", "folder"])
def test_what_is_called_lock_and_is_none_is_not_written_to(tmp_path: Path, kind: str) -> None:
    precious, name = tmp_path / "precious", tmp_path / "run" / lock.NAME
    precious.write_text('{"mine": 1}\n')
    name.parent.mkdir()
    if kind == "link":
        name.symlink_to(precious)
    elif kind == "second name":
        name.hardlink_to(precious)
    elif kind == "text":
        name.write_text("mine")
    elif kind == "folder":
        name.mkdir()
    else:
        os.mkfifo(name)
    with (
        pytest.raises(InputError, match=r"\.lock: is .*not a lock of deft's; move it away"),
        lock.held(tmp_path / "run"),
    ):
        pass
    assert precious.read_text() == '{"mine": 1}\n'
    assert os.path.lexists(name)
