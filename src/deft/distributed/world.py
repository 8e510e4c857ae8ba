"""The ranks that compute one run together, and what they share. A world of one rank is a world.

torchrun starts a process for each rank and says in the environment which one it is. The ranks share out a step's
micro-batches, and add their gradients up in the order of those, as one rank does; each holds the whole model, or rows
of its weights (sharding.py).
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from deft.core.errors import DamagedError, InputError, LostProcessError, NumbersError
from deft.core.signals import EXIT_CODE, Preempted
from deft.core.types import Origin
from deft.distributed.watch import KeyStore, Watch

Made = TypeVar("Made")

ALL_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""As torch calls it from 2.13 on, and before."""

PARTING = 5.0
"""Seconds that rank 0, which may keep the store, waits for the others at the end."""
ENDED = "ended"
"""In the store of the job, which stays over torchrun's restarts: the exit code of an end in LASTING."""
LASTING = (InputError.exit_code, DamagedError.exit_code, NumbersError.exit_code, EXIT_CODE)
"""Exit codes after which no restart helps: an error that the user has to mend, or a run that was told to end."""
_RUNS = itertools.count()
"""Numbers of the runs of this process, whose keys in the store are theirs alone; all ranks begin the same ones."""
WAIT = timedelta(days=7)
"""Of collectives: a rank evaluates for as long as it takes, and one that is lost is found by its signs of life."""


@dataclass(frozen=True, slots=True)
class World:
    """One rank's view of all ranks.

    rank        from 0; rank 0 alone writes and speaks
    local_rank  among those of its machine, and the number of its GPU
    watch       None in a world of one

    >>> world = World()
    >>> world.rank, world.size, world.sum(2.5), world.from_first("output", lambda: "runs/today")
    (0, 1, 2.5, 'runs/today')
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    watch: Watch | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def at(self, step: int, round_index: int | None = None, rows: Sequence[Origin] = ()) -> None:
        """This rank begins a round of a step, or has ended the step: known to all, and told where it is lost.

        In each round every rank takes part in a collective.
        """
        if self.watch is None:
            return
        if torch.cuda.is_initialized():
            event = torch.cuda.Event()
            event.record()
            self.watch.follow(event)
        self.watch.at(step, round_index, rows)

    def check(self, arrived: int | None = None) -> None:
        """Raises LostProcessError or Preempted where another rank has failed, or was ended; Preempted as well in the
        round before which all ranks stop, because of a signal that has `arrived` here or elsewhere."""
        if self.watch is not None:
            self.watch.check(arrived)

    def begin_log(self, folder: Path) -> None:
        """From here on this rank has a log, `folder`/rank-N.txt; a world of one has none."""
        if self.watch is not None:
            self.watch.log = folder / f"rank-{self.rank}.txt"
            self.log(
                f"{datetime.now():%Y-%m-%d %H:%M:%S} {socket.gethostname()}: pid {os.getpid()}, of {self.size} ranks"
            )

    def log(self, text: str) -> None:
        """What a rank that does not speak has to say."""
        if self.watch is not None:
            self.watch.note(text)

    @property
    def is_sound(self) -> bool:
        """Whether no rank is known to have failed, or to have been ended by itself."""
        return self.watch is None or self.watch.fault is None

    def see_off_first(self) -> None:
        """Returns once rank 0 has ended: torchrun kills it soon after another rank has, and it may have to save."""
        if self.watch is not None:
            with suppress(LostProcessError, Preempted):
                self.watch.wait_for("left/0")

    def start(self, device: torch.device) -> None:
        """Begins the collectives of all ranks: nothing is sent before, and nothing that takes long is done in between.

        Raises InputError for a device that has none.
        """
        if self.watch is None:
            return
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"device: several ranks compute on cpu or cuda, not on {device.type}")
        for rank in range(self.size):  # what begins a collective waits for ever, and hears no signal
            self.watch.wait_for(f"beat/{rank}")
        store: Any = dist.PrefixStore("collectives", self.watch.connect())  # type: ignore[arg-type]
        backend = "nccl" if device.type == "cuda" else "gloo"
        with self.reaching():
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=WAIT)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's `values`, on every rank. Exact where all but one of them are 0."""
        if self.size > 1:
            with self.reaching():
                dist.all_reduce(values)
                if values.is_cuda:  # it waits here, where it is known to wait for the others
                    torch.cuda.current_stream().synchronize()
        return values

    def exchange(self, parts: Tensor) -> Tensor:
        """[size, ...]: part i of every rank's `parts` [size, ...], by rank, on rank i."""
        found = torch.empty_like(parts)
        with self.reaching():
            dist.all_to_all_single(found.view(torch.uint8), parts.view(torch.uint8))
        return found

    def gather(self, part: Tensor) -> Tensor:
        """[size * n]: every rank's `part` [n], by rank, on every rank."""
        found = part.new_empty(self.size * len(part))
        with self.reaching():
            ALL_GATHER(found, part)
        return found

    def send(self, values: Tensor) -> None:
        """Sends values to rank 0, which has to receive them."""
        with self.reaching():
            dist.send(values, 0)

    def receive(self, into: Tensor, rank: int) -> None:
        """Puts what a rank sends into a contiguous tensor."""
        with self.reaching():
            dist.recv(into, rank)

    def first_complaint(self, own: str) -> str:
        """The lowest rank's complaint, on every rank; "" where none has any. All have to ask, in the same order."""
        if self.watch is None:
            return own
        watch, key = self.watch, f"complaint/{next(self.watch.questions)}"
        watch.store.set(f"{key}/{self.rank}", json.dumps(own))
        every = (json.loads(watch.wait_for(f"{key}/{rank}")) for rank in range(self.size))
        return self.from_first(key, lambda: next(filter(None, every), ""))

    def least(self, name: str, own: int) -> int:
        """The least of every rank's `own`, on every rank.

        name  as of `from_first`
        """
        if self.watch is None:
            return own
        self.watch.store.set(f"least/{name}/{self.rank}", json.dumps(own))
        return min(int(json.loads(self.watch.wait_for(f"least/{name}/{rank}"))) for rank in range(self.size))

    def from_first(self, name: str, make: Callable[[], Made]) -> Made:
        """What rank 0 makes, on every rank: JSON, for what depends on the moment or on the machine.

        name  of what it is; no two are alike in a run
        """
        if self.watch is None:
            return make()
        if self.is_first:
            made = make()
            self.watch.store.set(f"made/{name}", json.dumps(made))
            return made
        found: Made = json.loads(self.watch.wait_for(f"made/{name}"))
        return found

    @contextmanager
    def one_a_machine_first(self, name: str) -> Iterator[None]:
        """The body runs on the first rank of each machine, then on the others, who find what it has kept."""
        if self.watch is None:
            yield
            return
        key = f"done/{name}/{os.environ.get('GROUP_RANK', '0')}"
        if self.local_rank:
            self.watch.wait_for(key)
        yield
        if not self.local_rank:
            self.watch.store.set(key, "1")

    def stop_unless_same(self, name: str, value: str, fix: str) -> None:
        """Raises InputError where this rank has another `value` than rank 0, with what to do."""
        if (first := self.from_first(name, lambda: value)) != value:
            raise InputError(f"{name}: rank {self.rank} has {value}, and rank 0 {first}; {fix}")

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """A collective fails where another rank is lost: raises LostProcessError, or Preempted, as that one ended."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.watch is None:
                raise
            raise self.watch.reason(error) from error


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun has started this process in; a world of one without it. Left once rank 0 is done.

    Raises InputError where the environment says half of it, and SystemExit where torchrun starts ranks again after an
    end that would come again.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if lacks := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        what = f"the environment has WORLD_SIZE={size}, and no {lacks[0]}"
        raise InputError(f"{what}: start several ranks with torchrun, or unset WORLD_SIZE")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    number = next(_RUNS)
    connect = _connecting(rank, number)
    job = connect(f"deft/job/{number}")
    if job.check([ENDED]):
        raise SystemExit(int(job.get(ENDED)))
    watch = Watch(connect, rank, size, rank - local_rank)
    watch.begin()
    try:
        yield World(rank, size, local_rank, watch)
        _part(watch)
    except BaseException as error:
        code = EXIT_CODE if isinstance(error, Preempted) else getattr(error, "exit_code", None)
        if code in LASTING:
            with suppress(RuntimeError):
                job.set(ENDED, str(code))
        watch.tell(error)
        raise
    finally:
        watch.end()


def _part(watch: Watch) -> None:
    """Ends the collectives, once rank 0 is done; the others are not missed from here on. Rank 0 leaves last."""
    if watch.rank == 0:
        watch.store.set("done", "1")
        until = time.monotonic() + PARTING
        others = [f"parted/{rank}" for rank in range(1, watch.size)]
        while not watch.store.check(others) and time.monotonic() < until:
            time.sleep(0.02)
    else:
        watch.retire()
        watch.wait_for("done")
        watch.store.set(f"parted/{watch.rank}", "1")
    if dist.is_initialized():
        dist.destroy_process_group()


def _connecting(rank: int, number: int) -> Callable[..., KeyStore]:
    """What connects to the store: to the keys of this attempt, or others; rank 0 keeps it where torchrun does not."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # Machines may count their restarts differently; a store that a rank keeps is new each time.
    attempt = f"deft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if is_kept else 'once'}/{number}"
    keeps = [rank == 0 and not is_kept]

    def connect(prefix: str = attempt) -> Any:
        is_master = keeps.pop() if keeps else False
        try:
            tcp = dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(minutes=5))
        except RuntimeError as error:
            what = f"rank {rank} cannot reach the store of all ranks at {host}:{port}"
            raise LostProcessError(f"{what}: is rank 0 there, and the port open? ({error})") from error
        return dist.PrefixStore(prefix, tcp)

    return connect
