"""Items -> results, in order, with the help of other processes where there is enough to do.

A process of ours is an interpreter of its own that runs this module: it never imports the caller's script again, and
ends with its parent, whose pipe it reads. What goes through the pipes is pickled by both ends for nobody else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from itertools import chain, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from deft.errors import DeftError, LostProcessError
from deft.signals import HANDLED

A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")

HERE = 8
"""So many items are worked on before other processes are started; a small source has no more."""
MOST = 16
"""Reading and writing, which one process does, keep no more than so many busy."""
AHEAD = 3
"""So many items per process are under way, so that none waits for the one whose turn it is."""


def available() -> int:
    """The cores that this process may use, up to `MOST`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


def ordered(
    make: Callable[[R], Callable[[A], B]],
    recipe: R,
    items: Iterable[A],
    processes: int | None = None,
    helpers: Helpers | None = None,
    here: int | None = None,
) -> Iterator[B]:
    """`make(recipe)(item)` for every item, in their order; the same whatever the number of processes.

    make       a function of a module, which other processes import
    processes  how many help; `available()` unless said; one is this process alone
    helpers    processes that were started before, and are used up; where there are none, they are started
    here       so many items are worked on before that; `HERE` unless said

    Raises what the work raises, and LostProcessError where a process is killed.

    >>> list(ordered(len, "", []))
    []
    """
    if helpers and helpers.are_waiting:
        yield from _with_help(helpers, make, recipe, items, make(recipe))
        return
    processes = available() if processes is None else processes
    waiting, work = iter(items), None
    for item in islice(waiting, HERE if here is None else here):
        work = work or make(recipe)
        yield work(item)
    following = list(islice(waiting, 1))
    if work and following:
        rest = chain(following, waiting)
        if processes < 2:
            yield from map(work, rest)
        else:
            yield from _with_help(Helpers(processes), make, recipe, rest, work)


def _with_help(
    helpers: Helpers, make: Callable[[R], Callable[[A], B]], recipe: R, items: Iterable[A], work: Callable[[A], B]
) -> Iterator[B]:
    pending: deque[Future[B]] = deque()
    try:
        helpers.begin(make, recipe)
        for item in items:
            if not helpers.are_ready.is_set():
                yield work(item)
                continue
            pending.append(helpers.submit(item))
            if len(pending) >= AHEAD * helpers.count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        helpers.stop()


class Helpers:
    """Processes that share a queue; each has a thread here that feeds it. They are ready when the first of them is.

    modules  what they import while they wait
    """

    def __init__(self, count: int, modules: Sequence[str] = ()) -> None:
        self.count = count
        self.are_waiting = True
        self.are_ready = threading.Event()
        self._tasks: SimpleQueue[tuple[Any, Future[Any]] | None] = SimpleQueue()
        self._processes = [_start(modules) for _ in range(count)]
        self._threads: list[threading.Thread] = []

    def begin(self, make: Callable[[Any], Any], recipe: Any) -> None:
        """Tells them what their work is: once, for they keep what they have made of the recipe."""
        self.are_waiting = False
        self._threads = [
            threading.Thread(target=self._feed, args=(process, (make, recipe)), daemon=True)
            for process in self._processes
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, item: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((item, future))
        return future

    def stop(self) -> None:
        self.are_waiting = False
        for process in self._processes:
            process.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _feed(self, process: subprocess.Popen[bytes], beginning: Any) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout:
            ask, answers = _connections(process)
            error = _asked(process, ask, answers, beginning)[1]
            self.are_ready.set()
            while task := self._tasks.get():
                item, future = task
                result = None
                if error is None:
                    result, error = _asked(process, ask, answers, item)
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)


def _start(modules: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    alone = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "deft.workers", *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **alone},
    )


def _connections(process: subprocess.Popen[bytes]) -> tuple[Connection, Connection]:
    assert process.stdin is not None
    assert process.stdout is not None
    ask = Connection(os.dup(process.stdin.fileno()), readable=False)
    return ask, Connection(os.dup(process.stdout.fileno()), writable=False)


def _asked(
    process: subprocess.Popen[bytes], ask: Connection, answers: Connection, item: Any
) -> tuple[Any, BaseException | None]:
    """What a process answers, or the error that it met."""
    try:
        ask.send(item)
        result, error = answers.recv()
    except (OSError, EOFError):
        code = process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        what = f"a process that reads rows ended {how}, which deft did not ask for; if memory ran out, use fewer cores"
        return None, LostProcessError(what)
    return result, error


def serve(modules: Sequence[str]) -> None:
    """The life of a helping process: the recipe, then items, until its parent closes the pipe, or is gone."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)  # what is to end with the run ends when its pipe does
    for module in modules:
        import_module(module)
    asked, answer = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # what anybody prints must not go between the answers
    with suppress(EOFError, OSError):
        _answer(asked, answer)


def _answer(asked: Connection, answer: Connection) -> None:
    work: Callable[[Any], Any] | None = None
    found: tuple[Any, DeftError | None]
    while True:
        item = asked.recv()
        try:
            if work is None:
                make, recipe = item
                work, result = make(recipe), None
            else:
                result = work(item)
            found = (result, None)
        except DeftError as error:
            found = (None, error)
        except Exception:
            found = (None, DeftError(f"deft has a bug:\n{traceback.format_exc()}"))
        answer.send(found)


if __name__ == "__main__":
    serve(sys.argv[1:])
