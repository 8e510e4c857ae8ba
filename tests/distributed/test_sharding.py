"""A model that ranks share: rows of weights, gradients and optimizer; the bits of one rank, for any number of ranks."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build as architecture
from test_world import differences, on_ranks
from tiny_training import random_examples
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deft.distributed.sharding import Layout
from deft.distributed.world import World
from deft.model import adapters, in_rows, selftest
from deft.model.checkpointing import Checkpointing
from deft.model.config import AdapterConfig
from deft.plan import loader
from deft.plan.order import Batching
from deft.training import chunked
from deft.training.masters import Masters
from deft.training.optim.adamw import AdamW
from deft.training.state import TrainState, spread
from deft.training.step import optimizer_step


def planned(microbatch_tokens: int = 48) -> loader.Loader:
    """Steps of two, three and four micro-batches: ranks are idle in some rounds, and there are several rounds."""
    examples = random_examples((40, 9, 30, 12, 25, 17, 33, 8, 21, 45, 28, 40))
    return loader.make(examples, Batching(4), epochs=1, seed=0, microbatch_tokens=microbatch_tokens)


def state_in(
    world: World,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    copies: int = 1,
    lora: float | None = None,
    frozen: str = "",
    checkpointing: Checkpointing = "none",
    is_ordered: bool = True,
    room: int = 0,
) -> TrainState:
    """lora: the dropout of adapters, where there are any; frozen: what is in the names of parameters that are."""
    torch.manual_seed(0)
    model = architecture(name)
    if lora is not None:
        adapters.attach(model, AdapterConfig(name="lora", r=4, dropout=lora))
    for key, each in model.named_parameters():
        each.requires_grad_(each.requires_grad and not (frozen and frozen in key))
        if "lora_B" in key:
            nn.init.normal_(each, std=0.1)
    if world.size > copies:
        layout, cpu = Layout(world, world.size // copies, is_ordered, room), torch.device("cpu")
        causal_lm, masters, shards = spread(model, in_rows.of_whole(model, dtype), dtype, layout, cpu)
    else:
        masters, shards = Masters(model.named_parameters(), dtype), None
        causal_lm = selftest.choose(model)
    causal_lm.checkpointing = checkpointing
    model.eval()
    adapters.train_dropout(model)
    return TrainState(causal_lm, masters, AdamW(masters, weight_decay=0.1), world, shards=shards)


def steps(world: World, *case: Any, microbatch_tokens: int = 48, **more: Any) -> dict[str, Any]:
    """Losses and norms of all steps, and on rank 0 all that they have changed."""
    state, plan = state_in(world, *case, **more), planned(microbatch_tokens)
    numbers = [optimizer_step(state, batch, chunked.NLL, clip=1.0, lr=1e-2) for batch in plan.step_batches()]
    return {"numbers": [[each.loss, each.grad_norm] for each in numbers], **whole_tensors(state)}


def whole_tensors(state: TrainState) -> dict[str, Tensor]:
    rows, shards = state.rows(), state.shards
    found = {key: each for part in state.tensors().values() for key, each in part.items()}
    return (
        found
        if shards is None
        else {key: shards.whole(each, rows[key]) if key in rows else each for key, each in found.items()}
    )


CASES: dict[str, dict[str, Any]] = {
    "untied": {"name": "llama"},
    "tied, in bf16": {"name": "llama_tied", "dtype": torch.bfloat16},
    "all computed again": {"name": "qwen3", "dtype": torch.bfloat16, "checkpointing": "full"},
    "some computed again": {"name": "llama", "checkpointing": "selective"},
    "windows and norms of its own": {"name": "gemma3"},
    "not fused": {"name": "gpt_neox", "dtype": torch.bfloat16},
    "experts": {"name": "mixtral", "dtype": torch.bfloat16},
    "one document at a time": {"name": "bloom", "microbatch_tokens": 1},
    "adapters": {"name": "llama_tied", "lora": 0.0},
    "adapters in bf16": {"name": "qwen3", "dtype": torch.bfloat16, "lora": 0.0},
    "half of it frozen": {"name": "llama", "dtype": torch.bfloat16, "frozen": "layers.0"},
}


def all_cases(world: World, copies: int = 1, room: int = 0) -> dict[str, dict[str, Any]]:
    return {what: steps(world, copies=copies, room=room, **case) for what, case in CASES.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return all_cases(World())


ROOM = 2**30


@pytest.mark.parametrize(("size", "copies", "room"), [(2, 1, 0), (2, 1, ROOM), (3, 1, 0), (4, 1, 0), (4, 2, ROOM)])
def test_any_number_of_ranks_has_the_bits_of_one(
    tmp_path: Path, alone: dict[str, dict[str, Any]], size: int, copies: int, room: int
) -> None:
    found = on_ranks(tmp_path, size, partial(all_cases, copies=copies, room=room))
    assert {what: differences(found[0][what], alone[what]) for what in CASES} == {what: [] for what in CASES}
    assert all(each[what]["numbers"] == alone[what]["numbers"] for each in found for what in CASES)


def test_what_is_dropped_out_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    """With several ranks it is drawn from the seed of the micro-batch."""
    dropping = partial(steps, name="llama", lora=0.3)
    two, three, hybrid = (
        on_ranks(tmp_path / f"{size}-{copies}", size, partial(dropping, copies=copies))[0]
        for size, copies in ((2, 1), (3, 1), (4, 2))
    )
    assert differences(two, three) == differences(two, hybrid) == []
    assert two["numbers"] != steps(World(), name="llama", lora=0.0)["numbers"]


def gathers(world: World, lora: float | None) -> list[list[int]]:
    """In each step of one, two and two rounds, and in a pass without gradients after these: where a rank lacks one byte
    for all layers, and where none does."""
    found = []
    for short in (world.rank, 0):
        state = state_in(world, lora=lora)
        needed = sum(each.nbytes for layer in state.causal_lm.layers() for each in layer.parameters())
        state = state_in(world, lora=lora, room=needed - short)
        shards, counts = state.shards, []
        assert shards is not None
        counts.append(shards.layout.gathers)
        for batch in planned().step_batches():
            optimizer_step(state, batch, chunked.NLL, clip=1.0, lr=1e-2)
            counts.append(shards.layout.gathers)
        with torch.no_grad(), state.gathering():
            state.causal_lm(batch.micro_batches[0], chunked.NLL)
        counts.append(shards.layout.gathers)
        assert all(isinstance(each, DTensor) for each in state.causal_lm.parameters())
        found.append([after - before for before, after in pairwise(counts)])
    return found


@pytest.mark.parametrize("lora", [None, 0.0])
def test_layers_stay_gathered_through_a_step_where_there_is_room_on_all_ranks(
    tmp_path: Path, lora: float | None
) -> None:
    """Two layers, a head that is gathered for each loss, and one group of all else."""
    let_go, kept = on_ranks(tmp_path, 2, partial(gathers, lora=lora))[0]
    assert let_go == [6, 11, 11, 4]
    assert kept == [4] * 4


def backwards(world: World) -> dict[str, Any]:
    """Gradients that are added from the last rank to the first."""
    plain = World.exchange
    World.exchange = lambda self, parts: plain(self, parts).flip(0)  # type: ignore[method-assign]
    return steps(world)


def test_sums_in_another_order_are_seen(tmp_path: Path, alone: dict[str, dict[str, Any]]) -> None:
    """The negative control of the tests above. An idle rank's zeros would then stand in for a gradient, so 2 ranks."""
    found = on_ranks(tmp_path, 2, backwards)[0]
    assert len(differences(found, alone["untied"])) > 5


def relative(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest ||a - b|| / ||b|| of weights, with a floor of 1e-7 of the global norm."""
    weights = [key for key in theirs if key.startswith("weight.")]
    floor = 1e-7 * sum(float(theirs[key].double().square().sum()) for key in weights) ** 0.5
    errors = [float((mine[key] - theirs[key]).norm()) / max(float(theirs[key].norm()), floor) for key in weights]
    return max(errors)


@pytest.mark.parametrize(("size", "copies"), [(2, 1), (4, 2)])
def test_sums_of_the_backend_are_the_same_within_law_8(
    tmp_path: Path, alone: dict[str, dict[str, Any]], size: int, copies: int
) -> None:
    found = on_ranks(tmp_path, size, partial(steps, copies=copies, is_ordered=False))[0]
    assert relative(found, alone["untied"]) < 1e-5
    for mine, theirs in zip(found["numbers"], alone["untied"]["numbers"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)
