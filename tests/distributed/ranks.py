"""Several ranks of one world on this machine, as torchrun starts them, but forked: nothing is imported again."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from deft.core.errors import DeftError
from deft.core.signals import EXIT_CODE, Preempted
from deft.distributed.watch import speaks
from deft.distributed.world import World, joined
from deft.run.quiet import BARS, ENVIRONMENT, quiet

SECONDS = 240.0
"""After which the ranks that are still there are killed, and have said where they are."""
FORK = multiprocessing.get_context("fork")


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun says to a rank."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    address["TORCHELASTIC_RUN_ID"] = "test"
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **address}


def run(folder: Path, size: int, job: Callable[[int], Any]) -> list[int]:
    """Processes that do the job of each rank, and their exit codes; what they say goes to folder/rank-N.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with store() as port:
        ranks = [FORK.Process(target=_rank, args=(folder, environment(n, size, port), n, job)) for n in range(size)]
        for each in ranks:
            each.start()
        until = time.monotonic() + SECONDS
        for each in ranks:
            each.join(max(0.0, until - time.monotonic()))
        for each in ranks:
            each.kill()
            each.join()
    return [each.exitcode or 0 for each in ranks]


@contextmanager
def store() -> Iterator[int]:
    """The port of a store, as torchrun keeps one: in a process of its own, as what is forked beside its threads may
    wait for ever for a lock that one of them held."""
    receiving, sending = FORK.Pipe(duplex=False)
    keeper = FORK.Process(target=_keep, args=(sending,))
    keeper.start()
    try:
        yield receiving.recv()
    finally:
        keeper.kill()
        keeper.join()


def _keep(sending: Any) -> None:
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sending.send(kept.port)
    while True:
        signal.pause()


def on_ranks(folder: Path, size: int, job: Callable[[World], Any]) -> list[Any]:
    """What the job gives on each rank."""

    def of_rank(rank: int) -> None:
        with joined() as world:
            world.start(torch.device("cpu"))
            torch.save(job(world), folder / f"{rank}.pt")

    codes = run(folder, size, of_rank)
    assert codes == [0] * size, [said(folder, rank) for rank in range(size)]
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def said(folder: Path, rank: int = 0) -> str:
    return (folder / f"rank-{rank}.txt").read_text()


def _rank(folder: Path, values: Mapping[str, str], rank: int, job: Callable[[int], Any]) -> None:
    """The job of one rank, with the exit codes and the messages of the command line."""
    os.environ.update(values)
    for name in (BARS, *ENVIRONMENT):  # which a command that was called in this process has set
        os.environ.pop(name, None)
    output = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout = sys.stderr = open(output, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.dump_traceback_later(SECONDS - 10, file=output)
    code = 0
    try:
        with quiet():
            job(rank)
    except BaseException as error:
        code = EXIT_CODE if isinstance(error, Preempted) else getattr(error, "exit_code", 70)
        if speaks(error):
            print(f"deft: {error}")
            if not isinstance(error, DeftError | Preempted):
                traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
