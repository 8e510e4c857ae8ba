"""Items -> results, in order, computed by worker processes where there are enough of them.

A worker is an interpreter of its own that runs this module: it never imports the caller's script again, and ends with
its parent, whose pipe it reads. What goes through the pipe is pickled by both ends for each other alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from deft.core.errors import DeftError, LostProcessError
from deft.core.signals import HANDLED

A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")

HERE = 8
"""Workers are started for more items than these; a small source has no more."""
MOST = 16
"""Reading and writing, which one process does, keep no more workers than these busy."""
AHEAD = 3
"""Items per worker that are under way, so that none waits for the one whose turn it is."""


def available() -> int:
    """The cores that this process may use, up to `MOST`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


def ordered(
    make: Callable[[R], Callable[[A], B]],
    recipe: R,
    items: Iterable[A],
    processes: int | None = None,
    here: int | None = None,
) -> Iterator[B]:
    """`make(recipe)(item)` for every item, in their order; the same whatever the number of processes.

    make       a function of a module, which workers import
    processes  how many workers; `available()` unless said; with one, this process does all
    here       this process does all where there are no more items; `HERE` unless said

    Raises what the work raises, and LostProcessError where a worker is killed.

    >>> list(ordered(len, "", []))
    []
    """
    processes, here = available() if processes is None else processes, HERE if here is None else here
    waiting = iter(items)
    first = list(islice(waiting, here + 1))
    if processes > 1 and len(first) > here:
        yield from _by_workers(make, recipe, chain(first, waiting), processes)
    elif first:
        yield from map(make(recipe), chain(first, waiting))


def _by_workers(make: Callable[[R], Callable[[A], B]], recipe: R, items: Iterable[A], processes: int) -> Iterator[B]:
    """This process works as well until the first worker is ready."""
    pool, pending = _Pool(make, recipe, processes), deque[Future[B]]()
    try:
        work = make(recipe)
        for item in items:
            if not pool.is_ready.is_set():
                yield work(item)
                continue
            pending.append(pool.submit(item))
            if len(pending) >= AHEAD * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.stop()


class _Pool:
    """Workers, and as many threads that ask them; `is_ready` when the first worker is."""

    def __init__(self, make: Callable[[Any], Any], recipe: Any, count: int) -> None:
        self.is_ready = threading.Event()
        self._workers = [Worker() for _ in range(count)]
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, "worker")
        for worker in self._workers:
            self._threads.submit(self._begin, worker, (make, recipe))

    def submit(self, item: Any) -> Future[Any]:
        return self._threads.submit(self._ask, item)

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.process.wait()
            worker.pipe.close()

    def _begin(self, worker: Worker, beginning: Any) -> None:
        try:
            worker.ask(beginning)
        except DeftError as error:
            worker.broken = error
        self._idle.put(worker)
        self.is_ready.set()

    def _ask(self, item: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker.ask(item)
        finally:
            self._idle.put(worker)


class Worker:
    """A process that takes (make, recipe), then items, and answers each. broken: why it answers none."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        self.broken: DeftError | None = None
        alone = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env={**os.environ, **alone},
                pass_fds=[theirs.fileno()],
            )

    def ask(self, item: Any) -> Any:
        """Its answer. Raises what the work raised there, or LostProcessError where the process ended."""
        if self.broken:
            raise self.broken
        try:
            self.pipe.send(item)
            result, error = self.pipe.recv()
        except (OSError, EOFError):
            code = self.process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            what = f"a process that reads rows ended {how}, which deft did not ask for"
            raise LostProcessError(f"{what}; if memory ran out, use fewer cores") from None
        if error is not None:
            raise error
        return result


def serve(pipe: Connection) -> None:
    """The life of a worker, until its parent closes the pipe or ends."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)  # what is to end with the run ends when its pipe does
    with suppress(EOFError, OSError):
        make, recipe = pipe.recv()
        work, error = _tried(make, recipe)
        pipe.send((None, error))
        while True:
            pipe.send(_tried(work, pipe.recv()))


def _tried(work: Callable[[Any], Any], item: Any) -> tuple[Any, DeftError | None]:
    try:
        return work(item), None
    except DeftError as error:
        return None, error
    except Exception:
        return None, DeftError(f"deft has a bug:\n{traceback.format_exc()}")


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
