"""Several ranks as a step sees them: micro-batches dealt out, sums in order, one decision to stop; the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from states import state_around
from tiny_training import dropout_model, random_examples

from deft.core.errors import InputError
from deft.distributed import sums
from deft.distributed.sums import OrderedSums
from deft.distributed.world import World, joined
from deft.model import adapters
from deft.model.config import AdapterConfig
from deft.plan import loader
from deft.plan.order import Batching
from deft.training import chunked, loop
from deft.training.masters import Masters
from deft.training.state import TrainState
from deft.training.step import optimizer_step


def planned(lanes: int = 2) -> loader.Loader:
    """Steps of two, three and four micro-batches: ranks are idle in some rounds."""
    examples = random_examples((40, 9, 30, 12, 25, 17, 33, 8, 21, 45, 28, 40))
    return loader.make(examples, Batching(4), epochs=2, seed=0, microbatch_tokens=48, lanes=lanes)


def state_in(world: World, dtype: torch.dtype, is_lora: bool = False) -> TrainState:
    causal_lm = dropout_model()
    if is_lora:
        torch.manual_seed(1)
        adapters.attach(causal_lm.model, AdapterConfig(name="lora", r=4))
        for name, each in causal_lm.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(each, std=0.1)
    causal_lm.model.eval()
    state = state_around(causal_lm, dtype)
    state.world = world
    return state


def steps(world: World, dtype: torch.dtype, is_lora: bool) -> dict[str, Any]:
    """Losses and norms of all steps, and all that they have changed."""
    state, plan = state_in(world, dtype, is_lora), planned()
    numbers = [optimizer_step(state, batch, chunked.NLL, clip=1.0, lr=1e-2) for batch in plan.step_batches()]
    live = state.masters.state() | state.optimizer.state()
    return {"numbers": [[each.loss, each.grad_norm] for each in numbers], **live}


CASES = [(dtype, is_lora) for dtype in (torch.float32, torch.bfloat16) for is_lora in (False, True)]


def all_cases(world: World) -> list[dict[str, Any]]:
    return [steps(world, *case) for case in CASES]


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    assert mine.keys() == theirs.keys()
    return [
        key
        for key, each in mine.items()
        if (each != theirs[key] if key == "numbers" else not torch.equal(each, theirs[key]))
    ]


def test_any_number_of_ranks_has_the_bits_of_one(tmp_path: Path) -> None:
    """fp32 and bf16, full and LoRA, steps of one to four micro-batches, gradients that are sent in several buckets."""
    alone = all_cases(World())
    assert {len(planned().step(each).micro_batches) for each in range(planned().steps)} >= {2, 4}
    for size in (2, 3):
        for found in on_ranks(tmp_path / str(size), size, all_cases):
            assert [differences(*pair) for pair in zip(found, alone, strict=True)] == [[]] * len(CASES)


def broken(world: World) -> list[Any]:
    """Sums that are wrong: added from the last rank to the first, and a normalizer of each rank's own."""
    found = []
    plain = World.exchange

    def backwards(self: World, parts: torch.Tensor) -> torch.Tensor:
        return plain(self, parts).flip(0)

    World.exchange = backwards  # type: ignore[method-assign]
    found.append(steps(world, torch.float32, False))
    World.exchange = plain  # type: ignore[method-assign]
    state, plan = state_in(world, torch.float32), planned()
    batches = [replace(each, normalizer=each.normalizer / world.size) for each in plan.step_batches()]
    found.append([optimizer_step(state, batch, chunked.NLL, clip=1.0, lr=1e-2).loss for batch in batches])
    return found


def test_sums_in_another_order_and_another_denominator_are_seen(tmp_path: Path) -> None:
    """The negative control of the test above."""
    alone = steps(World(), torch.float32, False)
    backwards, losses = on_ranks(tmp_path, 3, broken)[0]
    assert len(differences(backwards, alone)) > 5
    assert losses[0] == pytest.approx(3 * alone["numbers"][0][0])


def odd_sums(world: World) -> dict[str, Any]:
    """Parameters without a gradient on some ranks, or on all of them, and -0.0."""
    sums.BUCKET = 4
    like = {name: torch.zeros(3) for name in ("all", "first", "last", "none", "zero")}
    found = OrderedSums(world, like)
    given = {"all": torch.full((3,), 1.0 + world.rank), "zero": torch.full((3,), -0.0)}
    if world.is_first:
        given["first"] = torch.full((3,), 7.0)
    if world.rank == 1:
        given["last"] = torch.full((3,), 9.0)
    found.add(dict(given), 2)
    found.add({name: each.clone() for name, each in given.items() if name == "all"}, 1)
    return {name: each.view(torch.int32) for name, each in found.take().items()}


def test_a_parameter_without_a_gradient_on_one_rank_or_on_all(tmp_path: Path) -> None:
    values = {"all": 1.0 + 2.0 + 1.0, "first": 7.0, "last": 9.0, "zero": -0.0}
    for found in on_ranks(tmp_path, 2, odd_sums):
        assert {name: each.tolist() for name, each in found.items()} == {
            name: torch.full((3,), value).view(torch.int32).tolist() for name, value in values.items()
        }


def stopped(world: World) -> list[int]:
    """The steps that are done where rank 1 wants to stop after the second."""
    state = state_in(world, torch.float32)
    wants = lambda: world.rank == 1 and state.step == 1  # noqa: E731
    done = loop.train(state, planned(), chunked.NLL, clip=None, lr=lambda step: 1e-3, wants_to_stop=wants)
    return [record.step for record in done]


def test_all_end_after_the_step_at_whose_end_any_rank_wanted_to_stop(tmp_path: Path) -> None:
    assert on_ranks(tmp_path, 2, stopped) == [[1, 2], [1, 2]]


def diverged(world: World) -> str:
    state = state_in(world, torch.float32)
    plain = Masters.squared_norm
    if world.rank == 1:
        Masters.squared_norm = lambda self: plain(self) * 1.001  # type: ignore[method-assign]
    try:
        optimizer_step(state, planned().step(0), chunked.NLL, clip=None, lr=1e-3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_ranks_that_compute_otherwise_are_told(tmp_path: Path) -> None:
    assert all(each.startswith("NumbersError: rank 1 has") for each in on_ranks(tmp_path, 2, diverged))


def met(world: World) -> list[Any]:
    made = world.from_first("number", lambda: [world.rank, "made"])
    assert world.least("number", 5 - world.rank) == 4
    with world.one_a_machine_first("turn"):
        turn = json.dumps(made)
    world.stop_unless_same("all", "same", "")
    try:
        world.stop_unless_same("the plan", f"plan {world.rank}", "make them the same")
    except Exception as error:
        return [turn, str(error)]
    return [turn]


def test_what_rank_0_makes_and_where_ranks_differ(tmp_path: Path) -> None:
    what = "the plan: rank 1 has plan 1, and rank 0 plan 0; make them the same"
    assert on_ranks(tmp_path, 2, met) == [['[0, "made"]'], ['[0, "made"]', what]]


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="no RANK: start several ranks with torchrun"), joined():
        pass


def test_a_world_of_one_shares_nothing() -> None:
    numbers = torch.tensor([1.0, 2.0])
    with joined() as world:
        assert world == World()
        assert world.sum(numbers) is numbers
        assert world.from_first("number", lambda: 7) == 7
        assert world.least("number", 7) == 7
