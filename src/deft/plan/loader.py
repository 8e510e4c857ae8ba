"""Examples and their plan -> the micro-batches of each optimizer step. The cursor is one integer: the step."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from deft.core.types import Encoded, MicroBatch, StepBatch
from deft.dataset.store import Examples
from deft.encoding.rows import Example
from deft.plan.order import Batching, Epoch, plan
from deft.plan.packs import pack

Normalize = Literal["tokens", "examples"]


@dataclass(frozen=True)
class Loader:
    """All steps of a run, each a pure function of its number.

    lanes  micro-batches of a step come in multiples of it
    """

    examples: Sequence[Example]
    epochs: tuple[Epoch, ...]
    microbatch_tokens: int
    normalize: Normalize = "tokens"
    limit: int | None = None
    seed: int = 0
    lanes: int = 1

    @property
    def steps(self) -> int:
        total = sum(epoch.steps for epoch in self.epochs)
        return total if self.limit is None else min(total, self.limit)

    def step_batches(self, start: int = 0) -> Generator[StepBatch]:
        """The steps from `start` on; a thread builds the next one while the caller computes."""
        if start >= self.steps:
            return
        with ThreadPoolExecutor(1, "loader") as ahead:
            following = ahead.submit(self.step, start)
            for step in range(start + 1, self.steps):
                step_batch, following = following.result(), ahead.submit(self.step, step)
                yield step_batch
            yield following.result()

    def members(self, step: int) -> list[Example]:
        """The examples of a step in the plan's order."""
        return [self.examples[index] for index in self.indices(step)]

    def indices(self, step: int) -> np.ndarray:
        """Which examples a step has: int64, in the plan's order."""
        epoch, inner = self._locate(step)
        return self.epochs[epoch].members(inner)

    def sizes(self, step: int) -> list[int]:
        """The tokens of each of a step's micro-batches, at most; none of them is built."""
        lengths = [length for index in self.indices(step) for length in _lengths(self.examples, int(index))]
        packs = pack(lengths, self.microbatch_tokens, self.lanes)
        return [sum(lengths[index] - 1 for index in members) for members in packs]

    def spread_steps(self, count: int = 256) -> range:
        """Steps that stand for all, spread evenly over the plan: all, or at least `count` and below twice as many."""
        return range(0, self.steps, max(1, self.steps // count))

    def until(self, step: int) -> list[np.ndarray]:
        """The plan as far as `step` steps follow it: the order of the epoch they are in, and its steps so far.

        Nothing where it has fewer steps.
        """
        if step > sum(epoch.steps for epoch in self.epochs):
            return []
        epoch, inner = self._locate(max(0, step - 1))
        return [np.array([step, epoch]), self.epochs[epoch].order, self.epochs[epoch].starts[: inner + 2]]

    def step(self, step: int) -> StepBatch:
        members = self.members(step)
        parts = [part for example in members for part in example]
        weights = [_scaled(part, example, self.normalize) for example in members for part in example]
        packs = pack([len(part.tokens) for part in parts], self.microbatch_tokens, self.lanes)
        seeds = np.random.SeedSequence((self.seed, step)).generate_state(len(parts), np.uint64).tolist()
        micro_batches = tuple(
            replace(build([(parts[i].tokens, weights[i]) for i in indices]), seeds=tuple(seeds[i] for i in indices))
            for indices in packs
        )
        total = sum(float(w[1:].sum(dtype=np.float64)) for w in weights)
        return StepBatch(
            step=step,
            epoch=self._locate(step)[0],
            micro_batches=micro_batches,
            normalizer=total if self.normalize == "tokens" else float(len(members)),
            tokens=sum(len(part.tokens) for part in parts),
            target_tokens=sum(len(batch.targets) for batch in micro_batches),
            origins=tuple(tuple(parts[i].origin for i in indices) for indices in packs),
        )

    def _locate(self, step: int) -> tuple[int, int]:
        for index, epoch in enumerate(self.epochs):
            if step < epoch.steps:
                return index, step
            step -= epoch.steps
        raise IndexError(step)


def make(
    examples: Sequence[Example],
    batching: Batching | Sequence[tuple[int, Batching]],
    *,
    epochs: int,
    seed: int,
    microbatch_tokens: int,
    normalize: Normalize = "tokens",
    limit: int | None = None,
    lanes: int = 1,
) -> Loader:
    """The plan of a run over `examples`, `limit` steps at most; several `batching` as in `plan`."""
    sizes = examples.sizes() if isinstance(examples, Examples) else _sizes(examples)
    batchings = [(0, batching)] if isinstance(batching, Batching) else batching
    needed = epochs if limit is None else min(epochs, limit)  # each has a step at least
    planned = plan(sizes, batchings, seed, range(needed))
    return Loader(examples, planned, microbatch_tokens, normalize, limit, seed, lanes)


def _sizes(examples: Sequence[Example]) -> np.ndarray:
    return np.array([sum(len(part.tokens) for part in example) for example in examples], np.int64)


def _lengths(examples: Sequence[Example], index: int) -> list[int]:
    if isinstance(examples, Examples):
        return examples.lengths(index)
    return [len(part.tokens) for part in examples[index]]


def build(documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> MicroBatch:
    """Documents (tokens, weights) -> one micro-batch. The one place that shifts: position t predicts token t + 1.

    A document ends with the input that predicts its last target; no target depends on what comes after.

        tokens   [10 11 12 20 21  1]    weights  [0 0 0 1 1 1]
     -> tokens   [10 11 12 20 21]       rows     [2 3 4]         targets  [20 21 1]

    >>> batch = build([(np.array([10, 11, 12, 20, 21, 1]), np.array([0, 0, 0, 1, 1, 1]))])
    >>> batch.tokens.tolist(), batch.rows.tolist(), batch.targets.tolist()
    ([10, 11, 12, 20, 21], [2, 3, 4], [20, 21, 1])
    """
    rows, targets, weights, inputs = [], [], [], []
    offset = 0
    for tokens, learnt in documents:
        predicted = np.flatnonzero(learnt[1:] > 0)
        length = int(predicted[-1]) + 1
        rows.append(predicted + offset)
        targets.append(tokens[1:][predicted])
        weights.append(learnt[1:][predicted])
        inputs.append(tokens[:length])
        offset += length
    return MicroBatch(
        tokens=_tensor(inputs, np.int64),
        positions=_tensor([np.arange(len(document)) for document in inputs], np.int64),
        documents=tuple(len(document) for document in inputs),
        rows=_tensor(rows, np.int64),
        targets=_tensor(targets, np.int64),
        weights=_tensor(weights, np.float32),
    )


def _tensor(arrays: Sequence[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype))


def _scaled(part: Encoded, example: Example, normalize: Normalize) -> np.ndarray:
    """The part's weights; under `examples` divided by the sum over its example, the 1/|y| of the SFT definition."""
    if normalize == "tokens":
        return part.weights
    total = sum(float(each.weights[1:].sum(dtype=np.float64)) for each in example)
    return (part.weights / total).astype(np.float32)
