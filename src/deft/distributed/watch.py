"""Whether all ranks of a run are alive: each gives a sign of life, and the first fault of any ends all of them.

In the store that torchrun keeps for a job: beat/RANK (its step, and a count that grows), left/RANK (it has nothing more
to do), fault (the first one). Who waits for a lost rank inside a collective is ended from a thread of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from deft.core.errors import LostProcessError
from deft.core.signals import EXIT_CODE, Preempted

LOST = "was lost: killed or stopped, or its machine is gone"
MISSING = "never came: it ended before it could say so, or its machine does not reach the others"
PERIOD = 0.5
"""Seconds between two signs of life."""
ARRIVAL = 600.0
"""Seconds in which every rank gives its first one: a machine may be slow to load Python's packages."""
SILENCE = 8.0
"""Seconds without one after which a rank is lost; SUSPECTED where a collective has failed, as with a rank that died."""
SUSPECTED = 3.0
GRACE = 5.0
"""Seconds after a fault, until who is stuck in a collective, which nothing else ends, is ended."""


class KeyStore(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


@dataclass(frozen=True)
class Fault:
    """What ended a run first: in which rank, at which step (0 before the first), and whether it was a signal.

    is_silent  the rank cannot say so itself
    """

    rank: int
    step: int
    what: str
    signal: int | None = None
    is_silent: bool = False

    def ending(self) -> BaseException:
        """What the other ranks end with.

        >>> print(Fault(1, 3, "failed first: ValueError: no").ending())
        rank 1 failed first: ValueError: no (at step 3)
        """
        if self.signal is not None:
            return Preempted(self.signal)
        where = f"at step {self.step}" if self.step else "before its first step"
        error = LostProcessError(f"rank {self.rank} {self.what} ({where})")
        error.rank, error.is_silent = self.rank, self.is_silent
        return error


@dataclass
class Watch:
    """One rank's signs of life, and its eye on those of the others.

    connect  a new connection to the store: one serves one thread
    step     that this rank is at
    fault    the first of any rank, once it is known here
    """

    connect: Callable[[], KeyStore]
    rank: int
    size: int
    step: int = 0
    fault: Fault | None = None
    silence: float = field(default_factory=lambda: SILENCE)
    _is_out: bool = False
    _ended: threading.Event = field(default_factory=threading.Event)
    _seen: dict[int, tuple[bytes, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self.store = self.connect()
        self._thread = threading.Thread(target=self._watch, args=(self.connect(),), name="watch", daemon=True)

    def begin(self) -> None:
        """Signs of life begin; the first comes before anything else can happen: who was never seen is not missed."""
        self._beat(self.store, 0)
        self._thread.start()

    def retire(self) -> None:
        """This rank has nothing more to do, and is not missed from here on."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "1")

    def end(self) -> None:
        """Signs of life end."""
        self.retire()
        self._ended.set()
        self._thread.join(2 * PERIOD)

    def check(self) -> None:
        """Raises what the run ends with, where a rank has failed."""
        if self.fault is not None:
            self._is_out = True
            raise self.fault.ending()

    def tell(self, error: BaseException) -> None:
        """What this rank ends with; the others end as well, where it is the first."""
        self._is_out = True
        if isinstance(error, LostProcessError) and error.rank is not None:
            return
        number = error.number if isinstance(error, Preempted) else None
        what = f"failed first: {type(error).__name__}: {' '.join(str(error).split())}"
        self._tell(self.store, Fault(self.rank, self.step, what, number))

    def reason(self, error: Exception) -> BaseException:
        """What a run ends with in which a collective has failed: the fault behind it, once it is known."""
        self._is_out, self.silence = True, SUSPECTED
        until = time.monotonic() + SILENCE
        while self.fault is None and time.monotonic() < until:
            time.sleep(0.05)
        what = f"could not reach the others: {' '.join(str(error).split())}"
        return (self.fault or Fault(self.rank, self.step, what)).ending()

    def wait_for(self, key: str) -> bytes:
        """The value of a key, once it is there. Raises what the run ends with where a rank fails before."""
        while True:
            try:
                if self.store.check([key]):
                    return self.store.get(key)
            except RuntimeError as error:
                raise self.reason(error) from error
            self.check()
            time.sleep(0.02)

    def _tell(self, store: KeyStore, fault: Fault) -> None:
        with suppress(RuntimeError):
            store.compare_set("fault", "", json.dumps(asdict(fault)))

    def _watch(self, store: KeyStore) -> None:
        count, found_at = 0, 0.0
        while not self._ended.wait(PERIOD):
            count += 1
            try:
                self._beat(store, count)
                if self.rank < 2:  # two of them, so that one is left where the other is lost
                    self._look(store)
                if store.check(["fault"]):
                    self.fault = self.fault or Fault(**json.loads(store.get("fault")))
            except RuntimeError:
                self.fault = self.fault or Fault(
                    0, self.step, f"{LOST}, and the store of all ranks with it", is_silent=True
                )
            found_at = found_at or (time.monotonic() if self.fault else 0.0)
            if self.fault and not self._is_out and time.monotonic() - found_at > GRACE:
                self._leave(self.fault)

    def _beat(self, store: KeyStore, count: int) -> None:
        about = {"step": self.step, "pid": os.getpid(), "host": socket.gethostname(), "count": count}
        store.set(f"beat/{self.rank}", json.dumps(about))

    def _look(self, store: KeyStore) -> None:
        """Finds a rank whose signs of life have ended, or never came; one that is stopped, on this machine, is killed."""
        now = time.monotonic()
        for rank in range(self.size):
            if rank == self.rank or store.check([f"left/{rank}"]):
                continue
            if not store.check([f"beat/{rank}"]):
                if now - self._began > ARRIVAL:
                    self._tell(store, Fault(rank, 0, MISSING, is_silent=True))
                continue
            beat = store.get(f"beat/{rank}")
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, now
            elif now - self._seen[rank][1] > self.silence:
                about = json.loads(beat)
                at = max(about["step"], self.step)  # ranks end their steps together
                self._tell(store, Fault(rank, at, LOST, is_silent=True))
                _kill(about)

    def _leave(self, fault: Fault) -> None:
        """Ends this process, whose main thread nothing else gets out of where it is."""
        ending = fault.ending()
        if speaks(ending, self.rank):
            sys.stderr.write(f"deft: {ending}\n")
            sys.stderr.flush()
        os._exit(EXIT_CODE if isinstance(ending, Preempted) else LostProcessError.exit_code)


def speaks(error: BaseException | None, rank: int | None = None) -> bool:
    """Whether this rank says how the run ended: rank 0, and where that is the one that was lost, rank 1.

    Without torchrun, whatever the environment says, each process speaks for itself.

    >>> lost = Fault(0, 3, LOST, is_silent=True).ending()
    >>> speaks(lost, 0), speaks(lost, 1), speaks(None, 0), speaks(None, 1), speaks(None)
    (False, True, True, False, True)
    """
    if rank is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    own = int(os.environ.get("RANK", "0")) if rank is None else rank
    return own == (1 if isinstance(error, LostProcessError) and error.rank == 0 and error.is_silent else 0)


def _kill(about: dict[str, Any]) -> None:
    if about["host"] == socket.gethostname():
        with suppress(OSError):
            os.kill(about["pid"], signal.SIGKILL)
