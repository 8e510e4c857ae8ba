"""D7: steps of every uneven shape, on one rank and on two."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from states import state_around
from tiny_training import dropout_model, random_examples
from torch.distributed import TCPStore

from deft.distributed.world import World, joined
from deft.plan import loader
from deft.plan.order import Batching
from deft.training import chunked, step
from faults.forking import fork
from faults.harness import Result, Scale, tally

TITLE = "1 to 40 rows, one and two ranks, accumulation 1 to 3: no rank waits for ever, each row once an epoch"
FIGURE = 240
TOKENS = 9


def run(scale: Scale) -> Result:
    return _thrown(list(product(range(1, 41, scale.of(13, 1, 1)), (1, 2, 3))))


def control() -> Result:
    """Both ranks take themselves for the first, so that rows are computed twice, and others never."""
    return _thrown([(5, 1)], is_mistaken=True)


def _thrown(shapes: list[tuple[int, int]], is_mistaken: bool = False) -> Result:
    found = []
    for size in (2,) if is_mistaken else (1, 2):
        with tempfile.TemporaryDirectory() as name:
            done = _computed(Path(name), size, shapes, is_mistaken)
        for (rows, accumulation), each in zip(shapes, done, strict=True):
            wrong = "" if each == Counter(range(rows)) else f"computed {sorted(each.elements())}"
            found.append(f"{rows} rows, {size} ranks, {accumulation} rounds: {wrong}" if wrong else "")
    return tally(found)


def _computed(folder: Path, size: int, shapes: list[tuple[int, int]], is_mistaken: bool) -> list[Counter[int]]:
    """How often all ranks together have computed each row, for each shape."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def of_rank(rank: int) -> None:
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": store.port}
        os.environ.update({key: str(value) for key, value in named.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
        with joined() as world:
            world.start(torch.device("cpu"))
            seen = [_epoch(replace(world, rank=0) if is_mistaken else world, *shape) for shape in shapes]
            (folder / f"{rank}.json").write_text(json.dumps(seen))

    children = [fork(lambda rank=rank: of_rank(rank), folder / f"{rank}.log") for rank in range(size)]
    codes = [each.wait() for each in children]
    if any(codes):
        return [Counter() for _ in shapes]
    each_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return [sum((Counter(seen[index]) for seen in each_rank), Counter()) for index in range(len(shapes))]


def _epoch(world: World, rows: int, accumulation: int) -> list[int]:
    """The rows that this rank computes in an epoch of steps of `accumulation` rounds of one row a rank."""
    state, seen, plain, now = state_around(dropout_model(), torch.float32), [], step._backward, list[Any]()
    state.world = world
    examples = random_examples((TOKENS,) * rows)
    batching = Batching(accumulation * world.size)
    plan = loader.make(examples, batching, epochs=1, seed=0, microbatch_tokens=TOKENS, lanes=world.size)

    def backward(state: Any, micro_batch: Any, *given: Any) -> Any:
        index = next(i for i, each in enumerate(now[0].micro_batches) if each is micro_batch)
        seen.extend(origin.line - 1 for origin in now[0].origins[index])
        return plain(state, micro_batch, *given)

    step._backward = backward
    try:
        for step_batch in plan.step_batches():
            now[:] = [step_batch]
            step.optimizer_step(state, step_batch, chunked.NLL, clip=1.0, lr=1e-3)
    finally:
        step._backward = plain
    return seen
