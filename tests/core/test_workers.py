"""Several processes give what one gives, in order; what goes wrong in one of them is said as if it were here."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deft.core import workers
from deft.core.errors import (
    DeftError,
    InputError,
    LostProcessError,
    Problem,
    Problems,
)
from deft.core.signals import HANDLED


def doubling(recipe: int) -> Callable[[Any], Any]:
    """What workers run: it doubles numbers, and does what other items ask for."""

    def work(item: Any) -> Any:
        if item == "who":
            return os.getpid(), recipe
        if item == "print":
            print("this must not go between the answers", flush=True)
        elif item == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif item == "wrong row":
            raise Problems("rows are wrong", [Problem("a.jsonl:7", "no answer", "add it")], more=3)
        elif item == "wrong source":
            raise InputError("a.jsonl: cannot be read")
        elif item == "bug":
            raise KeyError("oops")
        return 2 * item

    return work


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two items are enough for workers, and all of them are theirs."""
    monkeypatch.setattr(workers, "HERE", 1)
    start = workers._Pool.__init__

    def start_and_wait(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        self.is_ready.wait()

    monkeypatch.setattr(workers._Pool, "__init__", start_and_wait)


def done(*items: Any, processes: int = 2) -> list[Any]:
    return list(workers.ordered(doubling, 5, [1, *items], processes))


def test_results_come_in_the_order_of_the_items_from_other_processes() -> None:
    assert done(*range(50), "print") == [2, *(2 * n for n in range(50)), "printprint"]
    pids = {pid for pid, _ in done(*["who"] * 20)[1:]}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2


def test_few_items_and_one_process_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert done("who", processes=1)[1] == (os.getpid(), 5)
    monkeypatch.setattr(workers, "Worker", None)
    assert done() == [2]
    with pytest.raises(TypeError):
        done(1)


@pytest.mark.parametrize(
    ("item", "kind", "says"),
    [
        ("die", LostProcessError, "ended by signal 9"),
        ("wrong row", Problems, "a.jsonl:7: no answer; add it"),
        ("wrong source", InputError, "a.jsonl: cannot be read"),
        ("bug", DeftError, "deft has a bug:\n.*KeyError: 'oops'"),
    ],
)
def test_what_goes_wrong_there_is_raised_here(item: str, kind: type[DeftError], says: str) -> None:
    before = threading.active_count()
    with pytest.raises(kind, match=f"(?s){says}") as raised:
        done(1, item, 2, 3)
    assert type(raised.value) is kind
    assert getattr(raised.value, "more", 3) == 3
    assert threading.active_count() == before


def test_no_process_outlives_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[workers.Worker] = []
    start = workers.Worker
    monkeypatch.setattr(workers, "Worker", lambda: started.append(start()) or started[-1])
    given = workers.ordered(doubling, 5, iter([1, *range(40)]), 2)
    assert [next(given) for _ in range(4)] == [2, 0, 2, 4]
    given.close()
    assert [worker.process.returncode for worker in started] == [-signal.SIGKILL] * 2


def test_this_process_works_until_a_worker_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first answers are there although no worker ever gets ready."""
    monkeypatch.setattr(workers._Pool, "__init__", workers_that_wait)
    assert list(workers.ordered(doubling, 5, ["who"] * 9, 2)) == [(os.getpid(), 5)] * 9


def workers_that_wait(self: Any, make: Any, recipe: Any, count: int) -> None:
    self.is_ready, self._workers = threading.Event(), []
    self._threads = workers.ThreadPoolExecutor(1)


def broken_there(parent: int) -> Callable[[Any], Any]:
    if os.getpid() != parent:
        raise InputError("a worker cannot begin")
    return lambda item: item


def test_what_keeps_workers_from_beginning_is_raised_and_nothing_hangs() -> None:
    with pytest.raises(InputError, match="a worker cannot begin"):
        list(workers.ordered(broken_there, os.getpid(), range(9), 2))


def test_a_worker_ends_with_its_parent_and_with_no_signal_before() -> None:
    worker = workers.Worker()
    assert worker.ask((doubling, 5)) is None
    for number in HANDLED:
        worker.process.send_signal(number)
    assert worker.ask(4) == 8
    worker.pipe.close()
    assert worker.process.wait(300) == 0


def test_a_worker_whose_parent_is_killed_while_it_works_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    worker = workers.Worker()
    assert worker.ask((doubling, 5)) is None
    worker.pipe.send(4)
    worker.pipe.close()
    assert worker.process.wait(300) == 0
    assert capfd.readouterr().err == ""


def test_items_are_taken_no_faster_than_they_are_done() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    given = workers.ordered(doubling, 5, items(), 2)
    for _ in range(5):
        next(given)
    assert len(taken) <= 5 + workers.AHEAD * 2 + 2
    given.close()


def test_the_caller_s_script_is_not_run_again(tmp_path: Path) -> None:
    """As a script without a guard would be, if processes were started in multiprocessing's way."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "print('started')\nfrom deft.core import workers\nfrom test_workers import doubling\nworkers.HERE = 1\n"
        "print(sum(workers.ordered(doubling, 0, range(2000), 2)))\n"
    )
    said = workers.subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert said == "started\n3998000\n"
