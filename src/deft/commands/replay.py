"""`deft replay`: a step whose numbers were not finite once more, by micro-batch, row and layer."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from deft.core import hardware
from deft.core.errors import InputError, NumbersError
from deft.core.types import StepBatch
from deft.distributed.world import World
from deft.encoding import tokenizer
from deft.model import load as models
from deft.run import config as configuration
from deft.run.build import build, pretrained
from deft.training import badstep, randomness
from deft.training import objectives as losses
from deft.training.badstep import Diagnosis, PartNumbers


def run(path: str) -> None:
    """Prints what the step gives with the weights it had. Raises NumbersError where that is not finite again."""
    folder = Path(path)
    if not (folder / "step.json").is_file():
        raise InputError(f"{folder}: not a bad step; name a folder RUN/bad-step-N that deft train has written")
    config = configuration.load(str(folder.parent / "config.yaml"))
    step_batch, random = badstep.read(folder)
    machine = hardware.resolve(config.device, config.precision, config.microbatch_tokens)
    base, new_ids = models.inspect(config.model), tokenizer.load(config.model, config.data.add_tokens).new_ids
    state = build(
        config, lambda: pretrained(base, machine, config.merge, config.quantize), machine, World(), new_ids, base
    )
    badstep.put_weights(folder, state.causal_lm.model)
    randomness.restore(random)
    objective = losses.load(config.loss.name, config.loss.options)
    diagnosis = badstep.examine(state.causal_lm, step_batch, objective)
    console = Console()
    for line in _described(step_batch, diagnosis):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if not diagnosis.is_finite:
        rows = badstep.named(diagnosis.rows(step_batch))
        raise NumbersError(f"step {step_batch.step + 1} is not finite again: {rows}")


def _described(step_batch: StepBatch, diagnosis: Diagnosis) -> list[str]:
    """A diagnosis for people."""
    count, rows = len(step_batch.micro_batches), sum(map(len, step_batch.origins))
    about = f"{count} micro-batches, {rows} documents, normalizer {step_batch.normalizer:g}"
    lines = [f"step {step_batch.step + 1}: {about}"]
    for index in range(count):
        parts = [part for part in diagnosis.parts if part.microbatch == index]
        lines += [_line(part, count) for part in parts]
    if diagnosis.layer:
        lines.append(f"first layer that is not finite: {diagnosis.layer}")
    for what, names in (("gradients", diagnosis.gradients), ("weights", diagnosis.weights)):
        if names:
            lines.append(f"{what} that are not finite: {len(names)}, {names[0]} first")
    return lines if not diagnosis.is_finite else [*lines, "every number is finite here"]


def _line(part: PartNumbers, microbatches: int) -> str:
    where = f"    {part.row}" if part.row else f"  micro-batch {part.microbatch + 1} of {microbatches}"
    return f"{where}: loss {part.loss:.4f}, gradient norm {part.grad_norm:.4f}"
