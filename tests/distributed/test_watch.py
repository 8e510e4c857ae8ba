"""Ranks that are lost before, or as soon as, anybody watches them, and what is said of the one at fault."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run, said
from torch.distributed import HashStore

from deft.core.errors import LostProcessError
from deft.distributed import watch, world
from deft.distributed.watch import Watch
from deft.distributed.world import joined

CPU = torch.device("cpu")


def test_the_first_sign_of_life_comes_before_anything_else() -> None:
    store: Any = HashStore()
    begun = Watch(lambda: store, rank=1, size=2)
    begun.begin()
    assert store.check(["beat/1"])
    begun.end()


def soon() -> None:
    """Who is gone is gone: nobody has to be waited for."""
    watch.SILENCE, watch.GRACE = 1.0, 0.1


def killed_at_once(rank: int) -> None:
    """Rank 1 is gone before its thread has run once."""
    soon()
    if rank == 1:
        watch.PERIOD = 1e6
    with joined() as found:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        found.start(CPU)


def never_there(rank: int) -> None:
    """Rank 1 is gone before it can give a sign of life."""
    soon()
    watch.ARRIVAL = 0.0
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with joined() as found:
        found.start(CPU)


@pytest.mark.parametrize(("job", "what"), [(killed_at_once, watch.LOST), (never_there, watch.MISSING)])
def test_a_rank_that_dies_before_its_first_step_is_missed(tmp_path: Path, job: Any, what: str) -> None:
    assert run(tmp_path, 2, job) == [6, -9], said(tmp_path)
    assert f"rank 1 {what} (before its first step)" in said(tmp_path)


def test_a_store_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any, **more: Any) -> Any:
        raise RuntimeError("timed out")

    monkeypatch.setattr(world.dist, "TCPStore", refused)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(LostProcessError, match=r"rank 1 cannot reach the store of all ranks at 10\.0\.0\.1:29500"),
        joined(),
    ):
        pass
