"""The next step is built while one is computed: in order, one ahead and no more, its errors told, its thread ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tiny_training import dropout_state, random_examples

from deft.core.types import StepBatch
from deft.plan import loader
from deft.plan.loader import Loader
from deft.plan.order import Batching
from deft.training import chunked, loop


def planned(lengths: tuple[int, ...]) -> Loader:
    examples = random_examples(lengths)
    return loader.make(examples, Batching(examples=8), epochs=2, seed=0, microbatch_tokens=128)


@dataclass(frozen=True)
class Watched(Loader):
    """Notes which steps are built, and by which thread."""

    built: Any = None

    def step(self, step: int) -> StepBatch:
        self.built.append((step, threading.current_thread()))
        if step == 3:
            raise ValueError("row 17 is gone")
        return super().step(step)


@pytest.fixture
def watched() -> Iterator[Watched]:
    yield Watched(**{**vars(planned((40,) * 40)), "built": []})
    until(lambda: not any(each.name.startswith("loader") for each in threading.enumerate()))


def until(is_so: Any) -> None:
    deadline = time.monotonic() + 300
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_step_is_built_while_the_one_before_it_is_computed(watched: Watched) -> None:
    works = watched.step_batches(0)
    first = next(works)
    until(lambda: len(watched.built) == 2)
    time.sleep(0.05)
    assert [step for step, _ in watched.built] == [0, 1], "no more than one ahead"
    assert threading.main_thread() not in [thread for _, thread in watched.built]
    assert [first.step, next(works).step, next(works).step] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 17 is gone"):
        next(works)


def test_the_steps_are_those_that_the_plan_names() -> None:
    plan = planned((40, 50, 60, 70) * 10)
    for start in (0, 4, plan.steps - 1, plan.steps):
        assert [work.step for work in plan.step_batches(start)] == [*range(start, plan.steps)]
    same = zip(plan.step_batches(0), map(plan.step, range(plan.steps)), strict=True)
    assert all(ours.micro_batches[0].tokens.equal(theirs.micro_batches[0].tokens) for ours, theirs in same)


def test_what_ends_the_loop_ends_the_thread(watched: Watched) -> None:
    def poll() -> None:
        if len(watched.built) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        for _ in loop.train(dropout_state(), watched, chunked.NLL, clip=1.0, lr=lambda step: 1e-4, poll=poll):
            pass
    alive = [each.name for each in threading.enumerate()]
    assert not any(name.startswith("loader") for name in alive), (alive, caught)
