"""Ranks that are lost before, or as soon as, anybody watches them, and what is said of the one at fault."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment, run, said, store
from torch.distributed import HashStore

from deft.core.errors import InputError, LostProcessError
from deft.core.signals import Preempted
from deft.core.types import Origin
from deft.distributed import watch, world
from deft.distributed.watch import Fault, Place, Watch
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


@pytest.mark.parametrize(
    ("job", "what"),
    [
        (killed_at_once, f"was lost before its first step: {watch.LOST}"),
        (never_there, f"never came before its first step: {watch.MISSING}"),
    ],
)
def test_a_rank_that_dies_before_its_first_step_is_missed(tmp_path: Path, job: Any, what: str) -> None:
    assert run(tmp_path, 2, job) == [6, -9], said(tmp_path)
    assert f"rank 1 {what}" in said(tmp_path)


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


@pytest.mark.parametrize(("is_kept", "prefix"), [("True", "deft/2/5"), ("False", "deft/once/5")])
def test_machines_that_count_their_restarts_differently_meet(
    is_kept: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that torchrun keeps is that of all attempts; one that rank 0 keeps is new each time."""
    named = {"MASTER_ADDR": "h", "MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    for name, value in {**named, "TORCHELASTIC_USE_AGENT_STORE": is_kept}.items():
        monkeypatch.setenv(name, value)
    masters: list[bool] = []
    monkeypatch.setattr(world.dist, "TCPStore", lambda *given, is_master, **more: masters.append(is_master))
    monkeypatch.setattr(world.dist, "PrefixStore", lambda name, store: name)
    connect: Any = world._connecting(0, 5)
    assert [connect(), connect()] == [prefix, prefix]
    assert masters == [is_kept == "False", False]


def test_where_all_wait_for_each_other_the_one_that_is_behind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HANG", -1.0)
    monkeypatch.setattr(Watch, "_waits", lambda self: True)
    store: Any = HashStore()
    both = [Watch(lambda: store, rank=rank, size=2) for rank in (0, 1)]
    for each, round_index in zip(both, (4, 3), strict=True):
        each.at(7, round_index, [Origin("a.jsonl", 5)])
        each._beat(store, 1)
    both[0]._look_at_self(store)
    assert "rank 1 hangs at step 7, a.jsonl:5: all ranks wait for each other" in str(
        Fault.of(store.get("fault")).ending()
    )


@pytest.mark.parametrize("place", [Place(), Place(3)])
def test_nobody_hangs_between_steps(place: Place) -> None:
    """To load, evaluate or save takes as long as it takes."""
    store: Any = HashStore()
    alone = Watch(lambda: store, rank=0, size=2)
    alone.at(3, 0)
    alone.at(place.step, place.round_index)
    alone._since -= 1e6
    alone._look_at_self(store)
    assert not store.check(["fault"])


def test_a_rank_may_take_many_times_its_longest_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HANG", 10.0)
    store: Any = HashStore()
    alone = Watch(lambda: store, rank=0, size=2)
    alone.at(1, 0)
    alone._since -= 5.0  # the round took that long
    alone.at(1, 1)
    alone._since -= 90.0
    alone._look_at_self(store)
    assert not store.check(["fault"])
    alone._since -= 15.0
    alone._look_at_self(store)
    assert "hangs at step 1: nothing is done for 105 s" in str(Fault.of(store.get("fault")).ending())


def test_ranks_watch_the_next_two_so_that_a_whole_machine_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two machines with two ranks each the first is lost; who has found it says so, as rank 0 cannot."""
    store: Any = HashStore()
    every = [Watch(lambda: store, rank=rank, size=4, silence=-1.0) for rank in range(4)]
    for each in every:
        each._beat(store, 1)
    monkeypatch.setattr(watch, "PERIOD", -1.0)
    for _ in range(2):
        every[2]._look(store)  # sees 3, which is well, and 0
    assert Fault.of(store.get("fault")).rank in (0, 3)
    assert set(every[2]._seen) == {0, 3}
    assert set(every[3]._seen) == set()
    every[3]._look(store)
    assert set(every[3]._seen) == {0, 1}


def test_all_stop_before_the_round_after_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = HashStore()
    both = [Watch(lambda: store, rank=rank, size=2) for rank in (0, 1)]
    for step, round_index, arrived in ((3, 1, signal.SIGTERM), (3, 2, None), (4, 5, None)):
        for each in both:
            each.at(step, round_index)
        both[1].check(arrived)
        both[0].check()
    for each in both:
        each.at(3, 3)
        with pytest.raises(Preempted, match="SIGTERM"):
            each.check()


def test_torchrun_is_told_by_the_rank_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    store: Any = HashStore()
    failed = Watch(lambda: store, rank=1, size=2, log=tmp_path / "logs" / "rank-1.txt")
    failed.at(3, 0, [Origin("g.jsonl", 22), Origin("g.jsonl", 7)])
    failed.tell(ValueError("no\nluck"))
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "ValueError: no\nluck"
    assert "ValueError: no\nluck" in (tmp_path / "logs" / "rank-1.txt").read_text()
    what = "rank 1 failed first at step 3, g.jsonl:22 and 1 more: ValueError: no luck"
    assert str(Fault.of(store.get("fault")).ending()) == what


def test_a_gpu_is_one_round_behind_at_most() -> None:
    """Else a rank could have begun rounds that come after the one before which all stop."""
    waited: list[int] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            waited.append(self.number)

    store: Any = HashStore()
    alone = Watch(lambda: store, rank=0, size=2)
    for number in range(3):
        alone.follow(Event(number))
        assert waited == list(range(number))


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("no"), 2), (Preempted(15), 75), (LostProcessError("gone"), None), (KeyError(), None)],
)
def test_what_would_end_the_same_way_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int | None
) -> None:
    """torchrun keeps its store over restarts."""
    monkeypatch.setattr(watch, "LAG", 0.0)
    monkeypatch.setattr(world, "_RUNS", itertools.count())
    with store() as port:
        for name, value in environment(1, 2, port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(type(error)), joined():
            raise error
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setattr(world, "_RUNS", itertools.count())
        if code is None:
            with joined() as again:
                assert again.watch is not None
                again.watch.store.set("done", "1")
            return
        with pytest.raises(SystemExit) as ended, joined():
            pass
    assert ended.value.code == code
