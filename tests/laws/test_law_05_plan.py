"""Law 5: each example once an epoch; same seed, same plan; packing never changes the members of a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deft.core.types import Encoded, Origin
from deft.plan import loader
from deft.plan.order import Batching, Epoch, plan
from deft.plan.packs import pack

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=60)


def plan_epoch(sizes: np.ndarray, batching: Batching, seed: int, epoch: int) -> Epoch:
    return plan(sizes, [(0, batching)], seed, [epoch])[0]


def examples(lengths: list[int]) -> list[tuple[Encoded, ...]]:
    return [
        (Encoded(Origin("rows", line), np.full(n, line, np.int32), np.ones(n, np.float32)),)
        for line, n in enumerate(lengths, start=1)
    ]


@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**40))
def test_each_example_stands_once_in_an_epoch(lengths: list[int], count: int, seed: int) -> None:
    for batching in (Batching(examples=count), Batching(examples=None, tokens=count * 20)):
        epoch = plan_epoch(np.array(lengths), batching, seed, 0)
        members = np.concatenate([epoch.members(step) for step in range(epoch.steps)])
        assert sorted(members.tolist()) == list(range(len(lengths)))
        assert all(len(epoch.members(step)) for step in range(epoch.steps))


def test_the_plan_is_a_function_of_seed_and_epoch() -> None:
    sizes = np.ones(100, np.int64)
    first, again = (plan_epoch(sizes, Batching(examples=8), 7, 0).order for _ in range(2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != plan_epoch(sizes, Batching(examples=8), 7, 1).order.tolist()
    assert first.tolist() != plan_epoch(sizes, Batching(examples=8), 8, 0).order.tolist()


def test_a_seed_s_plan_does_not_change_between_versions() -> None:
    assert plan_epoch(np.ones(8, np.int64), Batching(examples=8), 0, 0).order.tolist() == [5, 0, 6, 1, 7, 2, 4, 3]


@given(LENGTHS, st.integers(1, 100))
def test_a_pack_holds_whole_documents_within_its_budget(lengths: list[int], budget: int) -> None:
    packs = pack(lengths, budget)
    assert sorted(index for each in packs for index in each) == list(range(len(lengths)))
    for each in packs:
        assert len(each) == 1 or sum(lengths[index] for index in each) <= budget


@pytest.mark.parametrize("normalize", ["tokens", "examples"])
def test_packing_changes_neither_members_nor_normalizer(normalize: loader.Normalize) -> None:
    data = examples([5, 9, 3, 30, 12, 7, 7, 2, 18, 4])
    works = [
        list(
            loader.make(
                data, Batching(examples=4), epochs=2, seed=3, microbatch_tokens=n, normalize=normalize
            ).step_batches()
        )
        for n in (1, 16, 10_000)
    ]
    assert len({len(work[0].micro_batches) for work in works}) > 1
    for same_step in zip(*works, strict=True):
        assert len({work.normalizer for work in same_step}) == 1
        targets = [sorted(int(t) for batch in work.micro_batches for t in batch.targets) for work in same_step]
        assert targets[0] == targets[1] == targets[2]
        assert len({frozenset(row for rows in work.origins for row in rows) for work in same_step}) == 1
        assert all(list(map(len, work.origins)) == [len(b.documents) for b in work.micro_batches] for work in same_step)


def test_the_normalizer_is_the_weight_of_what_is_predicted() -> None:
    """The first token of a document is predicted from nothing: its weight counts nowhere."""
    work = loader.make(examples([5, 9, 3]), Batching(examples=3), epochs=1, seed=0, microbatch_tokens=9).step(0)
    assert work.normalizer == 4 + 8 + 2
    assert work.normalizer == sum(float(batch.weights.sum()) for batch in work.micro_batches)


def test_normalize_by_examples_gives_each_row_one_count_whatever_its_length() -> None:
    data = examples([3, 30, 300])
    (work,) = loader.make(
        data, Batching(examples=3), epochs=1, seed=0, microbatch_tokens=1, normalize="examples"
    ).step_batches()
    assert work.normalizer == 3
    for batch in work.micro_batches:
        assert float(batch.weights.sum()) == pytest.approx(1.0, abs=1e-6)


def test_parts_of_one_row_go_in_one_step_and_share_its_count() -> None:
    (a,), (b,), (c,) = examples([4, 6, 8])
    (work, last) = loader.make(
        [(a, b), (c,)], Batching(examples=1), epochs=1, seed=0, microbatch_tokens=5
    ).step_batches()
    sizes = sorted([work.target_tokens, last.target_tokens])
    assert sizes == [7, 8]
    by_row = loader.make(
        [(a, b), (c,)], Batching(examples=2), epochs=1, seed=0, microbatch_tokens=99, normalize="examples"
    )
    assert by_row.step(0).normalizer == 2
    assert float(sum(batch.weights.sum() for batch in by_row.step(0).micro_batches)) == pytest.approx(2, abs=1e-6)


@settings(max_examples=60)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(2, 60), st.integers(2, 5))
def test_lanes_share_micro_batches_within_the_budget(lengths: list[int], budget: int, lanes: int) -> None:
    """A multiple of them, as far as there are documents, and balanced but for a document; each document once."""
    packs = pack(lengths, budget, lanes)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert len(packs) % lanes == 0 or len(packs) == len(lengths)
    sizes = [sum(lengths[index] for index in members) for members in packs]
    assert all(size <= budget or len(members) == 1 for size, members in zip(sizes, packs, strict=True))
    assert max(sizes) - min(sizes) <= max(lengths)
