"""Whether all ranks of a run are alive and go on, and when they stop together: the first fault of any ends them all.

In the store that torchrun keeps for a job: beat/RANK (a count that grows, whether it waits in a collective), at/RANK
(where it is), left/RANK (it has nothing more to do), stop (the round before which all stop), fault (the first one).
Who is stuck in a collective, which nothing else ends, is ended from a thread of its own.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from deft.core.errors import DiskError, LostProcessError
from deft.core.redact import redacted
from deft.core.signals import EXIT_CODE, Preempted

if TYPE_CHECKING:
    from deft.core.types import Origin

LOST = "killed or stopped, or its machine is gone"
FAILED = "failed first"
MISSING = "it ended before it could say so, or its machine does not reach the others"
PERIOD = 0.5
"""Seconds between two signs of life."""
ARRIVAL = 600.0
"""Seconds in which every rank gives its first one: a machine may be slow to load Python's packages."""
SILENCE = 8.0
"""Seconds without one after which a rank is lost; SUSPECTED where a collective has failed, as with a rank that died."""
SUSPECTED = 3.0
HANG = 1800.0
"""Seconds in one round of a step after which a rank hangs, or as many times its longest round as TIMES says. What may
take long (to load, evaluate, save, export) is done between steps, where nobody is taken to hang."""
TIMES = 20
GRACE = 5.0
"""Seconds after a fault, until who is stuck, as in a collective, is ended."""
LAG = 3.0
"""Seconds for which the others outlive the rank that failed first: torchrun names the one that it sees end first."""
_WAITING = tuple(os.path.join("torch", name) for name in ("distributed", "cuda"))
"""Where the main thread is while it waits for other ranks, or for a device that does."""


class KeyStore(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is: in a round of a step, from 0, with some rows; or, where `round_index` is None, after the step.

    >>> print(Place(3, 0, "g.jsonl:22 and 1 more"), Place(3), Place(), sep="; ")
    at step 3, g.jsonl:22 and 1 more; after step 3; before its first step
    """

    step: int = 0
    round_index: int | None = None
    rows: str = ""

    def __str__(self) -> str:
        if self.round_index is None:
            return f"after step {self.step}" if self.step else "before its first step"
        return f"at step {self.step}" + (f", {self.rows}" if self.rows else "")


@dataclass(frozen=True)
class Fault:
    """What ended a run first: in which rank, where, and whether it was a signal.

    why      after a colon
    speaker  the rank that says so
    """

    rank: int
    place: Place
    what: str
    why: str
    signal: int | None = None
    speaker: int = 0

    @classmethod
    def of(cls, text: bytes) -> Fault:
        """What was written as JSON."""
        found = json.loads(text)
        return cls(**{**found, "place": Place(**found["place"])})

    def ending(self) -> BaseException:
        """What the other ranks end with.

        >>> print(Fault(1, Place(3, 0, "g.jsonl:22"), "failed first", "ValueError: no").ending())
        rank 1 failed first at step 3, g.jsonl:22: ValueError: no
        """
        if self.signal is not None:
            return Preempted(self.signal)
        error = LostProcessError(f"rank {self.rank} {self.what} {self.place}: {self.why}")
        error.rank, error.speaker = self.rank, self.speaker
        return error


@dataclass
class Watch:
    """One rank's signs of life, and its eye on those of the next two, in a ring.

    connect    a new connection to the store: one serves one thread
    first      the first rank of this machine
    place      where this rank is; a new one with each round
    fault      the first of any rank, once it is known here
    log        the file for what this rank says, unless it is the one that speaks
    questions  numbers of those that all ranks have asked each other
    """

    connect: Callable[[], KeyStore]
    rank: int
    size: int
    first: int = 0
    place: Place = Place()
    fault: Fault | None = None
    log: Path | None = None
    silence: float = field(default_factory=lambda: SILENCE)
    questions: Iterator[int] = field(default_factory=itertools.count)
    _is_out: bool = False
    _ended: threading.Event = field(default_factory=threading.Event)
    _seen: dict[int, tuple[bytes, float]] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)
    _longest: float = 0.0
    _before: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began, self._main = time.monotonic(), threading.get_ident()
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

    def follow(self, event: Any) -> None:
        """Waits for the event given the time before, as of a GPU, so that it is one round behind at most."""
        self._before.append(event)
        for each in self._before[:-1]:
            each.synchronize()
        del self._before[:-1]

    def at(self, step: int, round_index: int | None = None, rows: Sequence[Origin] = ()) -> None:
        """This rank is there from now on; known to all at once, so that what is said of a rank that is killed is so."""
        now = time.monotonic()
        if self.place.round_index is not None:
            self._longest = max(self._longest, now - self._since)
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        self.place, self._since = Place(step, round_index, f"{rows[0]}{more}" if rows else ""), now
        self._tried(lambda: self.store.set(f"at/{self.rank}", json.dumps(asdict(self.place))))

    def check(self, arrived: int | None = None) -> None:
        """Raises what the run ends with, where a rank has failed; Preempted in the round before which all stop.

        With a signal that has `arrived` here it is the next but one: no rank can be further by then, as no round ends
        on one before it has begun on all, and a GPU is one round behind at most.
        """
        if self.fault is not None:
            self._is_out = True
            raise self.fault.ending()
        step, round_index = self.place.step, self.place.round_index
        if round_index is None:
            return
        if arrived is not None:
            asked = json.dumps([step, round_index + 2, arrived])
            self._tried(lambda: self.store.compare_set("stop", "", asked))
        if self._tried(lambda: self.store.check(["stop"])):
            *at, number = json.loads(self._tried(lambda: self.store.get("stop")))
            if at[0] == step and at[1] <= round_index:
                raise Preempted(number)

    def tell(self, error: BaseException) -> None:
        """What this rank ends with; the others end as well, where it is the first.

        Where it is another that failed, it has ended when this returns.
        """
        self._is_out = True
        self.note("".join(traceback.format_exception(error)))
        if not isinstance(error, Preempted):
            record(error)
        if isinstance(error, LostProcessError) and error.rank is not None:
            if self.fault and self.fault.what == FAILED and "TORCHELASTIC_RUN_ID" in os.environ:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, within 0.1 s
                time.sleep(LAG)
            return
        number = error.number if isinstance(error, Preempted) else None
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._tell(self.store, Fault(self.rank, self.place, FAILED, why, number))

    def reason(self, error: Exception) -> BaseException:
        """What a run ends with in which a collective has failed: the fault behind it, once it is known."""
        self._is_out, self.silence = True, SUSPECTED
        until = time.monotonic() + SILENCE
        while self.fault is None and time.monotonic() < until:
            time.sleep(0.05)
        if self.fault is None:
            what, why = "could not reach the others", " ".join(str(error).split())
            self.fault = Fault(self.rank, self.place, what, why, speaker=self.rank)
            self._tell(self.store, self.fault)
        return self.fault.ending()

    def wait_for(self, key: str) -> bytes:
        """The value of a key, once it is there. Raises what the run ends with where a rank fails before."""
        while not self._tried(lambda: self.store.check([key])):
            self.check()
            time.sleep(0.02)
        return self._tried(lambda: self.store.get(key))

    def note(self, text: str) -> None:
        """Puts lines into this rank's log."""
        from deft.core import files  # not for `deft --help`

        if self.log is not None:
            with suppress(DiskError):
                files.make_folder(self.log.parent)
                files.append(self.log, (redacted(text).rstrip("\n") + "\n").encode("utf-8", "backslashreplace"))

    def _tried(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RuntimeError as error:
            raise self.reason(error) from error

    def _tell(self, store: KeyStore, fault: Fault) -> None:
        with suppress(RuntimeError):
            store.compare_set("fault", "", json.dumps(asdict(fault)))

    def _watch(self, store: KeyStore) -> None:
        count, found_at = 0, 0.0
        while not self._ended.wait(PERIOD):
            count += 1
            try:
                self._beat(store, count)
                self._look(store)
                self._look_at_self(store)
                if self.fault is None and store.check(["fault"]):
                    self.fault = Fault.of(store.get("fault"))
                    self._kill(store, self.fault.rank)
            except RuntimeError:
                why = f"{LOST}, and the store of all ranks with it"
                place = Place(self.place.step, self.place.round_index)
                self.fault = self.fault or Fault(0, place, "was lost", why, speaker=max(1, self.first))
            found_at = found_at or (time.monotonic() if self.fault else 0.0)
            if self.fault and not self._is_out:
                lag = LAG if self.fault.rank != self.rank else 0.0
                if time.monotonic() - found_at > GRACE + lag:
                    self._leave(self.fault)

    def _beat(self, store: KeyStore, count: int) -> None:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "waits": self._waits(), "count": count}
        store.set(f"beat/{self.rank}", json.dumps(about))

    def _waits(self) -> bool:
        """Whether this rank is inside a collective."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        return frame is not None and any(name in frame.f_code.co_filename for name in _WAITING)

    def _look(self, store: KeyStore) -> None:
        """Finds one of the next two ranks whose signs of life have ended, or never came."""
        now = time.monotonic()
        for rank in {(self.rank + ahead) % self.size: None for ahead in (1, 2)}:
            if rank == self.rank or store.check([f"left/{rank}"]):
                continue
            if not store.check([f"beat/{rank}"]):
                if now - self._began > ARRIVAL:
                    self._tell(store, Fault(rank, Place(), "never came", MISSING, speaker=self._speaker(rank, now)))
                continue
            beat = store.get(f"beat/{rank}")
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, now
            elif now - self._seen[rank][1] > self.silence:
                fault = Fault(rank, _place(store, rank), "was lost", LOST, speaker=self._speaker(rank, now))
                self._tell(store, fault)

    def _speaker(self, lost: int, now: float) -> int:
        """Rank 0; the one that has found it where that is lost itself, or seems to be lost too."""
        is_well = lost != 0 and (0 not in self._seen or now - self._seen[0][1] < 4 * PERIOD)
        return 0 if is_well else self.rank

    def _look_at_self(self, store: KeyStore) -> None:
        """Tells where this rank hangs in a round of a step; or, where it waits for the others, that all of them do."""
        taken = time.monotonic() - self._since
        if self.place.round_index is None or taken < max(HANG, TIMES * self._longest) or store.check(["fault"]):
            return
        if not self._waits():
            self._tell(store, Fault(self.rank, self.place, "hangs", f"nothing is done for {taken:.0f} s"))
            return
        beats = [f"beat/{rank}" for rank in range(self.size)]
        if store.check(beats) and all(json.loads(store.get(each))["waits"] for each in beats):
            places = [_place(store, rank) for rank in range(self.size)]
            rank = min(range(self.size), key=lambda rank: (places[rank].step, places[rank].round_index or 0))
            why = (
                f"all ranks wait for each other for {taken:.0f} s, and none is before this one; is their network whole?"
            )
            self._tell(store, Fault(rank, places[rank], "hangs", why))

    def _kill(self, store: KeyStore, rank: int) -> None:
        """Kills a rank of this machine that is stopped: it would never see that the run has ended."""
        if rank not in self._seen or time.monotonic() - self._seen[rank][1] < self.silence:
            return
        about = json.loads(store.get(f"beat/{rank}"))
        if about["host"] == socket.gethostname():
            with suppress(OSError):
                os.kill(about["pid"], signal.SIGKILL)

    def _leave(self, fault: Fault) -> None:
        """Ends this process, whose main thread nothing else gets out of where it is; its log has where that is."""
        ending = fault.ending()
        with suppress(Exception):
            self.note(str(ending))
            if self.log is not None:
                with self.log.open("a") as file:
                    faulthandler.dump_traceback(file)
            if not isinstance(ending, Preempted):
                record(ending)
        if speaks(ending, self.rank):
            sys.stderr.write(f"deft: {ending}\n")
            sys.stderr.flush()
        os._exit(EXIT_CODE if isinstance(ending, Preempted) else LostProcessError.exit_code)


def _place(store: KeyStore, rank: int) -> Place:
    return Place(**json.loads(store.get(f"at/{rank}"))) if store.check([f"at/{rank}"]) else Place()


def speaks(error: BaseException | None, rank: int | None = None) -> bool:
    """Whether this rank says how the run ended: rank 0, and where that is lost, the one that has found it so.

    Without torchrun, whatever the environment says, each process speaks for itself.

    >>> lost = Fault(0, Place(3), "was lost", LOST, speaker=2).ending()
    >>> speaks(lost, 0), speaks(lost, 2), speaks(None, 0), speaks(None, 1), speaks(None)
    (False, True, True, False, True)
    """
    if rank is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    own = int(os.environ.get("RANK", "0")) if rank is None else rank
    return own == (error.speaker if isinstance(error, LostProcessError) else 0)


def record(error: BaseException) -> None:
    """Writes what torchrun shows of a rank that has failed, where it asks for that."""
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

    with suppress(OSError):
        ErrorHandler().record_exception(error)
