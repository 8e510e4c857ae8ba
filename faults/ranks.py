"""Several ranks of a run on this machine, as torchrun starts them; torch is imported once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from deft.training import step as steps
from faults import runs
from faults.forking import GENEROUS, Child, deft
from faults.scenes import arguments

SETTINGS = {**runs.SETTINGS, "dropout": "off", "precision": "fp32", "lanes": 2}
"""What one rank computes is then what several do, to the bit."""


@dataclass
class Ranks:
    """The ranks of one start, and the store that torchrun keeps for them."""

    store: TCPStore
    children: list[Child]

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Their exit codes. Those that are still there afterwards are killed."""
        until = time.monotonic() + GENEROUS * seconds
        while any(each.poll() is None for each in self.children) and time.monotonic() < until:
            time.sleep(0.02)
        for each in self.children:
            each.kill()
        return [each.wait() for each in self.children]


def start(
    folder: Path, output: str, size: int, before: Callable[[int], object] = lambda rank: None, **settings: Any
) -> Ranks:
    """`deft train` on each of `size` ranks, as `runs.start`; `before` gets the rank first."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = arguments(folder, output=folder / output, **{**SETTINGS, **settings})

    def begin(rank: int) -> None:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "TORCHELASTIC_RUN_ID": "faults"}
        os.environ.update({**address, **ranks})
        before(rank)

    logs = [folder / f"{output}-{rank}.log" for rank in range(size)]
    return Ranks(store, [deft("train", *words, log=log, before=lambda n=n: begin(n)) for n, log in enumerate(logs)])


def said(folder: Path, output: str, rank: int) -> str:
    """The last message of a rank."""
    return runs.message((folder / f"{output}-{rank}.log").read_text())


def in_folder(folder: Path, text: str) -> str:
    """The text without the folder of this try, which is another each time."""
    return text.replace(f"{folder}/", "")


def finish(folder: Path, output: str, size: int, reference: Path, **settings: Any) -> str:
    """Starts the ranks again and waits for their end; what is not as in `reference`, "" if all is, to the bit."""
    codes = start(folder, output, size, **settings).wait()
    if any(codes):
        return f"exit codes {codes}: {said(folder, output, 0)}"
    return runs.differences(reference, folder / output)


def at_step(number: int, fault: Callable[[], object], mark: Path) -> None:
    """In this process `fault` comes in the first micro-batch of a step; `mark` gets its rows, as messages name them."""
    plain, computes, now = steps._accumulate, steps._backward, list[Any]()

    def accumulate(state: Any, step_batch: Any, *given: Any) -> Any:
        now[:] = [step_batch]
        return plain(state, step_batch, *given)

    def backward(state: Any, *given: Any) -> Any:
        if now and now[0].step + 1 == number:
            rows = now.pop().origins[state.world.rank]
            mark.write_text(f"{rows[0]}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else ""))
            fault()
        return computes(state, *given)

    steps._accumulate, steps._backward = accumulate, backward
