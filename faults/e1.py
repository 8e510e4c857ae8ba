"""E1: losses, gradients and weights that are not finite, and batches in which nothing is learnt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deft.core.types import StepBatch
from deft.model import selftest
from deft.plan import loader
from deft.training import chunked, loop, step
from deft.training.state import TrainState
from deft.training.step import StepNumbers
from faults.harness import Result, Scale, tally
from faults.scenes import CHATS, arguments, ended, scene

TITLE = "losses and gradients that are not finite: not one weight or moment changes a bit; stop, or skip; replay"
FIGURE = 30
MARK, LINE = "~", 18
"""One row's answer has the mark that no other has."""
KINDS = ("loss", "gradient", "weight", "masked micro-batch", "masked batch")
WAYS = tuple(product(("fp32", "bf16"), (0, 1, 3)))
"""Precision, and how many bad steps may be skipped."""


def run(scale: Scale) -> Result:
    return _thrown(list(product(KINDS, WAYS))[:: scale.of(6, 1, 1)])


def control() -> Result:
    """Whatever the numbers are, the step is taken."""

    def blind() -> None:
        StepNumbers.are_finite = True  # type: ignore[assignment, method-assign]

    return _thrown([("loss", WAYS[0]), ("gradient", WAYS[0])], blind)


def _thrown(points: list[Any], before: Callable[[], None] = lambda: None) -> Result:
    rows = [_marked(row) if line == LINE else row for line, row in enumerate(CHATS, 1)]
    with scene(rows) as folder:
        found = [_point(folder / str(index), folder, *point, before) for index, point in enumerate(points)]
        sees = next((text for _, text in found if text), "")
        return tally(
            (failure for failure, _ in found), sees.replace(f"{folder}/0/run", "RUN").replace(f"{folder}/", "")
        )


def _marked(row: dict[str, Any]) -> dict[str, Any]:
    asked, told = row["messages"]
    return {"messages": [asked, {**told, "content": f"It is {MARK}."}]}


def _point(place: Path, folder: Path, kind: str, way: tuple[str, int], before: Callable[[], None]) -> tuple[str, str]:
    """What went wrong, "" if nothing; and what the user saw."""
    (precision, skips), spied = way, place / "spied"
    place.mkdir()
    words = arguments(
        folder, output=place / "run", precision=precision, skip_bad_steps=skips, microbatch_tokens=64, epochs=2
    )
    plant = partial(_plant, kind, spied)
    done = ended(folder, "train", *words, before=lambda: (before(), plant()))
    steps = [json.loads(line) for line in spied.read_text().splitlines()] if spied.exists() else []
    name = f"{kind}, {precision}, skip_bad_steps={skips}"
    bad = [each for each in steps if not each["finite"]]
    if wrong := _judged(kind, skips, done.code, done.message, steps, bad):
        return f"{name}: {wrong}", done.message
    if bad and (wrong := _replayed(folder, place / "run" / f"bad-step-{bad[0]['step']}", kind)):
        return f"{name}: {wrong}", done.message
    return "", done.message if kind == "loss" else ""


def _judged(kind: str, skips: int, code: int, message: str, steps: list[Any], bad: list[Any]) -> str:
    if changed := [each["step"] for each in bad if not each["same"]]:
        return f"weights or moments changed at step {changed[0]}"
    if kind == "masked micro-batch":
        return "" if code == 0 and not bad else f"exit code {code}, {len(bad)} bad steps"
    expected = 2 if kind in ("loss", "gradient") else len(steps)
    if code != (0 if skips >= expected else 5):
        return f"exit code {code} after {len(bad)} bad steps: {message[-200:]}"
    is_named = kind not in ("loss", "gradient") or code == 0 or f"train.jsonl:{LINE};" in message
    return "" if is_named else f"the row is not named: {message}"


def _replayed(folder: Path, bad_step: Path, kind: str) -> str:
    again = ended(folder, "replay", str(bad_step), before=lambda: _plant(kind, None))
    is_named = kind not in ("loss", "gradient") or f"train.jsonl:{LINE}: loss" in again.output
    is_again = again.code == 5 and is_named and (kind != "weight" or "weights that are not finite: 1" in again.output)
    return "" if is_again else f"replay: exit code {again.code}: {again.output[-300:]}"


def _plant(kind: str, spied: Path | None) -> None:
    """Puts the fault in place, and a witness of every step."""
    {
        "loss": partial(_spoil, lambda total: total * float("nan")),
        "gradient": partial(_spoil, _Spoilt.apply),
        "weight": _break_weight if spied else lambda: None,
        "masked micro-batch": partial(_mask, 1),
        "masked batch": partial(_mask, None),
    }[kind]()
    if spied:
        loop.optimizer_step = partial(_witnessed, step.optimizer_step, spied)  # type: ignore[assignment]


class _Spoilt(torch.autograd.Function):
    """The same number, with a gradient that is not one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return gradient[0] * float("inf")


def _spoil(change: Callable[[Tensor], Tensor]) -> None:
    """Changes the loss of what holds the mark."""
    plain, mark = chunked.loss, _mark_id()

    def loss(hidden: Tensor, head: Any, targets: Tensor, weights: Tensor) -> Tensor:
        total = plain(hidden, head, targets, weights)
        return change(total) if bool((targets == mark).any()) else total

    chunked.loss = loss


def _mark_id() -> int:
    from tiny_tokenizers import byte_level

    return byte_level(puts_bos=True).convert_tokens_to_ids(MARK)


def _break_weight() -> None:
    plain = selftest.choose

    def choose(model: Any) -> Any:
        chosen = plain(model)
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
        return chosen

    selftest.choose = choose


def _mask(count: int | None) -> None:
    """Takes the targets out of so many micro-batches of each step, or of all."""
    plain = loader.Loader.step

    def masked(planned: loader.Loader, number: int) -> StepBatch:
        work = plain(planned, number)
        batches = [
            _without_targets(batch) if count is None or i < count else batch
            for i, batch in enumerate(work.micro_batches)
        ]
        left = sum(float(batch.weights.sum()) for batch in batches)
        return replace(work, micro_batches=tuple(batches), normalizer=left)

    loader.Loader.step = masked  # type: ignore[method-assign]


def _without_targets(batch: Any) -> Any:
    return replace(batch, rows=batch.rows[:0], targets=batch.targets[:0], weights=batch.weights[:0])


def _witnessed(plain: Any, spied: Path, state: TrainState, work: Any, *arguments: Any, **more: Any) -> StepNumbers:
    before = dict(_bits(state))
    numbers = plain(state, work, *arguments, **more)
    after = dict(_bits(state))
    is_finite = abs(numbers.loss) < float("inf") and abs(numbers.grad_norm) < float("inf")
    line = {"step": work.step + 1, "finite": is_finite, "same": before == after}
    with spied.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return numbers


def _bits(state: TrainState) -> Iterator[tuple[str, bytes]]:
    """Every byte of weights, masters, moments and random generators."""
    for name, tensor in (state.masters.state() | state.optimizer.state()).items():
        yield name, tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    yield "random", torch.get_rng_state().numpy().tobytes()
