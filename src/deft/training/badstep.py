"""A step whose loss or gradient is not finite: the rows and layers at fault, and a folder to see it again from.

bad-step-37/  step.json  batches.safetensors  random.json  weights/*.safetensors  manifest.json
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from deft.core import files
from deft.core.errors import DamagedError, NumbersError
from deft.core.types import MicroBatch, Objective, Origin, StepBatch, StepRecord
from deft.distributed.sharding import Sharded
from deft.model.causal_lm import CausalLM
from deft.training import randomness
from deft.training.pieces import Stored, StoredTensors
from deft.training.state import TrainState

SHOWN_ROWS = 5
_TENSORS = ("tokens", "positions", "rows", "targets", "weights")


@dataclass(frozen=True, slots=True)
class PartNumbers:
    """A micro-batch, or one of its documents run alone: loss in nats per unit of weight, norm of its gradient.

    row  None for the micro-batch as a whole
    """

    microbatch: int
    row: Origin | None
    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A step taken apart. The documents of micro-batches that are finite are not looked at.

    layer      the first module whose output was not finite, in the first part that was not; "" where none was
    gradients  parameters whose gradient was not finite there, the one nearest to the loss first
    weights    parameters that are not finite themselves
    """

    parts: tuple[PartNumbers, ...]
    layer: str
    gradients: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def is_finite(self) -> bool:
        return all(part.is_finite for part in self.parts)

    def microbatches(self) -> list[int]:
        """Those at fault; all that were looked at where each was finite this time."""
        bad = [part for part in self.parts if not part.is_finite]
        return list(dict.fromkeys(part.microbatch for part in bad or self.parts))

    def rows(self, step_batch: StepBatch) -> tuple[Origin, ...]:
        """The rows at fault, as narrowly as they are known."""
        alone = [part.row for part in self.parts if not part.is_finite and part.row is not None]
        together = [row for index in self.microbatches() for row in step_batch.origins[index]]
        return tuple(dict.fromkeys(alone or together))


def skip_or_stop(
    state: TrainState, step_batch: StepBatch, objective: Objective, record: StepRecord, *, folder: Path, most: int
) -> str:
    """Goes past a step whose numbers are not finite, and says so; NumbersError where `most` have been skipped.

    All ranks do it, and rank 0 writes.

    Either way the step can be replayed from `folder`/bad-step-N. NumbersError as well where the update before it is at
    fault, which left values that are not finite: no step can be done from there. Ranks that share one copy of the model
    do it together.
    """
    state.stop_if_broken(f"the update of step {state.step} left values that are not finite")
    place = folder / f"bad-step-{record.step}"
    diagnosis = examine(state.causal_lm, step_batch, objective, state.suspects, state.shards)
    write(place, state, step_batch, diagnosis)
    what = "gradient" if math.isfinite(record.loss) else "loss"
    ranks = {index % state.world.size for index in diagnosis.microbatches()}
    rank = f", rank {min(ranks)}" if len(ranks) == 1 < state.world.size else ""
    rows = named(diagnosis.rows(step_batch))
    told = f"{what} is not finite at step {record.step}{rank}, {rows}; weights unchanged; replay: deft replay {place}"
    if state.skipped >= most:
        fix = f"skip_bad_steps={most + 1} goes past it, a lower optimizer.lr may avoid it"
        raise NumbersError(f"{told}; {fix}")
    state.skip()
    return f"{told}; skipped ({state.skipped} of {most} at most)"


def examine(
    causal_lm: CausalLM,
    step_batch: StepBatch,
    objective: Objective,
    suspects: Sequence[int] = (),
    shards: Sharded | None = None,
) -> Diagnosis:
    """Runs the step's micro-batches again, and the documents of those that are not finite each alone.

    Weights stay as they are, gradients and random generators too. Every rank runs the same ones.

    suspects  those to run; all where there are none
    shards    what this rank has of the model, where ranks share one copy of it
    """
    measure, batches = partial(_measure, causal_lm, objective, step_batch.normalizer, shards), step_batch.micro_batches
    with randomness.preserved(), causal_lm.uncompiled():
        wholes = [measure(index, None, batches[index]) for index in suspects or range(len(batches))]
        alone = [
            measure(index, row, document)
            for index in (whole.part.microbatch for whole in wholes if not whole.part.is_finite)
            for row, document in zip(step_batch.origins[index], documents(batches[index]), strict=True)
        ]
    bad = next((measured for measured in wholes if not measured.part.is_finite), None)
    return Diagnosis(
        parts=tuple(measured.part for measured in wholes + alone),
        layer=bad.layer if bad else "",
        gradients=bad.gradients if bad else (),
        weights=tuple(name for name, (_, odd) in _totals(_weights(causal_lm, shards), shards).items() if odd),
    )


def documents(batch: MicroBatch) -> list[MicroBatch]:
    """The documents of a micro-batch, each as one of its own."""
    found, start = [], 0
    for index, length in enumerate(batch.documents):
        targets = (batch.rows >= start) & (batch.rows < start + length)
        here = slice(start, start + length)
        found.append(
            MicroBatch(
                tokens=batch.tokens[here],
                positions=batch.positions[here],
                documents=(length,),
                rows=batch.rows[targets] - start,
                targets=batch.targets[targets],
                weights=batch.weights[targets],
                seeds=batch.seeds[index : index + 1],
            )
        )
        start += length
    return found


def write(folder: Path, state: TrainState, step_batch: StepBatch, diagnosis: Diagnosis) -> None:
    """The step as a folder that `read` gives back; one that is there is set aside. DiskError where that fails."""
    if not state.world.is_first:
        deque(state.weights(), maxlen=0)  # rank 0 gathers them
        return
    if os.path.lexists(folder):
        files.set_aside(folder)
    with files.staged(folder) as staging:
        staging.write_json("step.json", _as_json(step_batch, diagnosis))
        batches = enumerate(step_batch.micro_batches)
        tensors = {f"{i}.{name}": getattr(batch, name) for i, batch in batches for name in _TENSORS}
        staging.write("batches.safetensors", [as_safetensors(tensors)])
        staging.write_json("random.json", randomness.as_json(randomness.snapshot()))
        for index, (name, weight) in enumerate(state.weights()):
            staging.write(f"weights/{index:05}.safetensors", [as_safetensors({name: weight.cpu().contiguous()})])


def read(folder: Path) -> tuple[StepBatch, dict[str, Any]]:
    """The step, and the random generators' state (`randomness.snapshot`).

    Raises DamagedError where the folder is not as it was written.
    """
    records = files.verify(folder).files

    def as_json(name: str) -> Any:
        return json.loads(files.read(folder / name, records[name]))

    found = as_json("step.json")
    tensors = StoredTensors([Stored(folder / "batches.safetensors", records["batches.safetensors"])])
    batches = tuple(
        MicroBatch(
            documents=tuple(lengths), seeds=tuple(seeds), **{name: tensors[f"{index}.{name}"] for name in _TENSORS}
        )
        for index, (lengths, seeds) in enumerate(zip(found["documents"], found["seeds"], strict=True))
    )
    step_batch = StepBatch(
        step=found["step"] - 1,
        epoch=found["epoch"],
        micro_batches=batches,
        normalizer=found["normalizer"],
        tokens=found["tokens"],
        target_tokens=found["target_tokens"],
        origins=tuple(tuple(map(Origin.at, rows)) for rows in found["rows"]),
    )
    return step_batch, randomness.from_json(as_json("random.json"))


@torch.no_grad()
def put_weights(folder: Path, model: nn.Module) -> None:
    """Writes the saved weights into a model; DamagedError where one is not in it."""
    parameters = dict(model.named_parameters())
    for file, record in files.read_manifest(folder).files.items():
        for name, weight in (
            StoredTensors([Stored(folder / file, record)]).items() if file.startswith("weights/") else ()
        ):
            if name not in parameters or parameters[name].shape != weight.shape:
                raise DamagedError(f"{folder / file}: {name} does not fit the model of the run")
            parameters[name].copy_(weight)


def named(rows: tuple[Origin, ...]) -> str:
    """
    >>> named((Origin("a.jsonl", 1), Origin("a.jsonl", 7)))
    'rows a.jsonl:1, a.jsonl:7'
    """
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"{'rows' if len(rows) > 1 else 'row'} {', '.join(map(str, rows[:SHOWN_ROWS]))}{more}"


@dataclass(frozen=True, slots=True)
class _Measured:
    part: PartNumbers
    layer: str
    gradients: tuple[str, ...]


def _measure(
    causal_lm: CausalLM,
    objective: Objective,
    normalizer: float,
    shards: Sharded | None,
    microbatch: int,
    row: Origin | None,
    batch: MicroBatch,
) -> _Measured:
    """A batch forward and backward; its gradient is dropped."""
    share = 1.0 if shards is None else shards.begin(1)
    with _bad_layers(causal_lm.model) as layers:
        nll = causal_lm(batch, objective).nll_sum
        (nll * share / normalizer).backward()
    gradients = _totals(_gradients(causal_lm.model) if shards is None else shards.take(), shards)
    norm = sum(square for square, _ in gradients.values()) ** 0.5
    bad = tuple(name for name, (_, odd) in reversed(gradients.items()) if odd)
    total, weight = float(nll.detach()), float(batch.weights.sum())
    return _Measured(
        PartNumbers(microbatch, row, total / weight if weight else total, norm), next(iter(layers), ""), bad
    )


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, which are gone from the parameters."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def _weights(causal_lm: CausalLM, shards: Sharded | None) -> Mapping[str, Tensor]:
    return dict(causal_lm.model.named_parameters()) if shards is None else shards.parameters


def _totals(tensors: Mapping[str, Tensor], shards: Sharded | None) -> dict[str, tuple[float, bool]]:
    """Of each tensor, or of all ranks' rows of it: the sum of its squares, and whether a value is not finite."""
    if not tensors:
        return {}
    wide = [each.detach().float() for each in tensors.values()]
    odd = torch.stack([(~each.isfinite()).any() for each in wide]).float()
    numbers = torch.stack([torch.stack([each.square().sum() for each in wide]), odd])
    squares, is_odd = (numbers if shards is None else shards.sum(numbers)).tolist()
    return {name: (square, flag > 0) for name, square, flag in zip(tensors, squares, is_odd, strict=True)}


@contextmanager
def _bad_layers(model: nn.Module) -> Iterator[list[str]]:
    """Inside, modules whose output is not finite leave their names, in the order in which they ran."""
    names: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.is_floating_point() and not bool(first.isfinite().all()):
                names.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield names
    finally:
        for each in hooks:
            each.remove()


def _as_json(step_batch: StepBatch, diagnosis: Diagnosis) -> dict[str, Any]:
    parts = [{**asdict(part), "row": str(part.row) if part.row else None} for part in diagnosis.parts]
    numbers = [{**part, "loss": str(part["loss"]), "grad_norm": str(part["grad_norm"])} for part in parts]
    return {
        "step": step_batch.step + 1,
        "epoch": step_batch.epoch,
        "normalizer": step_batch.normalizer,
        "tokens": step_batch.tokens,
        "target_tokens": step_batch.target_tokens,
        "rows": [[str(row) for row in rows] for rows in step_batch.origins],
        "documents": [list(batch.documents) for batch in step_batch.micro_batches],
        "seeds": [list(batch.seeds) for batch in step_batch.micro_batches],
        "parts": numbers,
        "layer": diagnosis.layer,
        "gradients": list(diagnosis.gradients),
        "weights": list(diagnosis.weights),
    }
