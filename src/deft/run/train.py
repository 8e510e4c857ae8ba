"""The whole of a run, in reading order: prepare, load, train, finish. It knows all rooms."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deft.core import files, hardware, lock
from deft.core.errors import DiskError, InputError, NumbersError
from deft.core.redact import redacted
from deft.core.signals import Preempted
from deft.core.types import StepRecord
from deft.distributed.world import World
from deft.evaluation import samples as evaluate
from deft.evaluation.heldout import held_out_loss
from deft.model.load import summarise
from deft.plan.schedule import lr_multiplier
from deft.run import config as configuration
from deft.run import (
    forecast,
    manifest,
    preflight,
    resume,
)
from deft.run.build import build, pretrained, settle_process
from deft.run.config import Config
from deft.run.finish import finish
from deft.run.prepare import Prepared, prepare
from deft.run.reading import Session
from deft.tracking import console as display
from deft.tracking import jsonl
from deft.tracking.jsonl import Logs
from deft.training import badstep, checkpoint, compiling, randomness
from deft.training.checkpoint import Checkpoint, Found, Keep
from deft.training.loop import train as train_steps
from deft.training.saving import Saver
from deft.training.state import TrainState
from deft.training.step import dry_run_step

SHOWN_SAMPLES = 3


@dataclass(frozen=True)
class Run:
    """A finished run. `metrics` are the lines of metrics.jsonl, `folder` is the run folder.

    trained  the model and the tokenizer in memory; None where they were trained by an earlier start, and are loaded
    """

    folder: Path
    metrics: tuple[Mapping[str, Any], ...]
    trained: tuple[Any, Any] | None = None

    @cached_property
    def model(self) -> Any:
        return self.trained[0] if self.trained else AutoModelForCausalLM.from_pretrained(self.folder / "final")

    @cached_property
    def tokenizer(self) -> Any:
        return self.trained[1] if self.trained else AutoTokenizer.from_pretrained(self.folder / "final")

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the exported Hugging Face folder."""
        files.copy(self.folder / "final", Path(folder))


def train(config: Config, session: Session | None = None) -> Run:
    """The main job; goes on where an earlier start in its folder ended. Raises DeftError for what a user can mend."""
    session = session or Session()
    world = World()
    folder = world.from_first(lambda: preflight.run_folder(config.output))
    with lock.held(folder) as note:
        if note:
            session.say(note)
        config = config.model_copy(update={"output": str(folder)})
        if (earlier := _finished(config)) is not None:
            session.say(f"{folder}: finished at step {len(earlier.metrics)}; name another output= to train again")
            return earlier
        return _run(config, session, world, _checkpoint_of(config, session))


def _run(config: Config, session: Session, world: World, found: Found | None) -> Run:
    saved = found.checkpoint.step if found else None
    try:
        prepared = prepare(_settled(config, found), session, found)
        with hardware.within_memory(partial(_too_large, prepared)):
            loading = time.perf_counter()
            state = _load(prepared, session, world)
            loading = time.perf_counter() - loading
        with hardware.within_memory(partial(_too_long, prepared, state)):
            compiling.begin(state, prepared.loader, prepared.checked.objective, session.say)
            if prepared.expected is None or not prepared.expected.is_safe:
                dry_run_step(state, forecast.largest(prepared.loader)[0], prepared.checked.objective)
        earlier = _write_beginnings(prepared, session)
        with session.signals.deferred():
            with hardware.within_memory(partial(_too_long, prepared, state)):
                metrics, unsaved = _train(prepared, state, earlier, session, loading)
            saved = None if unsaved or config.checkpoint.every is None else state.step
            with session.signals.at_once():
                finish(prepared, state, session)
    except Preempted as stop:
        raise Preempted(stop.number, stop.saved or saved) from None
    if unsaved:
        raise DiskError(f"{unsaved}; the run is finished, {prepared.checked.folder / 'final'} is whole") from unsaved
    return Run(prepared.checked.folder, tuple(metrics), (state.causal_lm.model, prepared.checked.tokenizer.hf))


def _finished(config: Config) -> Run | None:
    """The run that an earlier start brought to its end: final/, compared, and its report."""
    folder = _earlier_run(config)
    if folder is None or not ((folder / "final").is_dir() and (folder / "report.html").is_file()):
        return None
    if config.resume != "auto":
        raise InputError(f"resume: {folder} is finished; move its final/ away to go back to {config.resume}")
    return Run(folder, tuple(jsonl.read(folder / "metrics.jsonl")))


def _earlier_run(config: Config) -> Path | None:
    """The output folder, if there is a run in it to go on with."""
    may_go_on = config.output is not None and config.resume != "never" and preflight.is_run(Path(config.output))
    return Path(config.output) if config.output and may_go_on else None


def _checkpoint_of(config: Config, session: Session) -> Found | None:
    """The checkpoint to go on from; what earlier starts left half written is removed."""
    for each in (Path(str(config.output)), Path(str(config.output)) / "checkpoints"):
        files.sweep(each)
    folder = _earlier_run(config)
    if folder is None:
        return None
    found = checkpoint.find(folder / "checkpoints", config.resume)
    for note in found.notes if found else ():
        session.say(note)
    return found


def _settled(config: Config, found: Found | None) -> Config:
    """The configuration with the `auto`s that the run began with."""
    if found is None:
        return config
    values = resume.settled(config.model_dump(mode="json"), found.checkpoint.values["inputs"]["config"])
    return configuration.make(values)


def _write_beginnings(prepared: Prepared, session: Session) -> list[Mapping[str, Any]]:
    """The run folder with what is known before the next step: config.yaml, manifest.json, ledger.json.

    Nothing in it is then of a later step than the checkpoint; returns the metrics of the earlier ones.
    """
    checked, config = prepared.checked, prepared.config
    preflight.make_folder(checked.folder)
    step = prepared.found.checkpoint.step if prepared.found else -1
    for note in checkpoint.set_aside(checked.folder / "checkpoints", step):
        session.say(note)
    earlier = jsonl.cut(checked.folder / "metrics.jsonl", step)
    for name in ("eval", "samples"):
        jsonl.cut(checked.folder / f"{name}.jsonl", step if _is_evaluated(prepared) else step - 1)
    files.write_text(checked.folder / "config.yaml", redacted(configuration.as_yaml(config)))
    files.write_json(checked.folder / "ledger.json", [source.as_json() for source in prepared.data.ledgers])
    described = manifest.collect(
        seed=config.seed,
        device=checked.machine.device.type,
        dtype=checked.machine.dtype_name,
        data={
            name: digest for _, survey in checked.train + checked.held_out for name, digest in survey.content.items()
        },
        tokenizer_json=checked.tokenizer.hf.backend_tokenizer.to_str(),
    )
    files.write_json(checked.folder / "manifest.json", described)
    return [*earlier]


def _load(prepared: Prepared, session: Session, world: World) -> TrainState:
    checked = prepared.checked
    state = build(prepared.config, partial(_model, prepared, session), checked.machine, world)
    state.causal_lm.checkpointing = prepared.checkpointing
    if state.causal_lm.note:
        session.say(state.causal_lm.note)
    parameters = sum(parameter.numel() for parameter in state.masters.parameters.values())
    dtype = checked.machine.dtype_name
    session.say(
        f"{prepared.config.model}: {parameters / 1e6:.2f} M parameters, {dtype} on {checked.machine.device.type}; "
        f"{prepared.loader.steps} steps -> {checked.folder}"
    )
    if prepared.found:
        stored = prepared.found.checkpoint
        state.restore(stored.tensors, stored.step)
        state.skipped = stored.values["cursor"]["skipped"]
        randomness.restore(randomness.from_json(stored.values["random-00000"]))
    return state


def _model(prepared: Prepared, session: Session) -> PreTrainedModel:
    model = pretrained(prepared.checked.base, prepared.checked.machine)
    if session.owns_process:
        settle_process(model, prepared.loader)
    return model


def _too_large(prepared: Prepared) -> str:
    base, dtype = prepared.checked.base, prepared.checked.machine.dtype
    need = summarise(base).state_bytes(dtype) / 2**30
    return f"{base.path} needs {need:.1f} GiB for weights, gradients and optimizer alone; take a smaller model"


def _too_long(prepared: Prepared, state: TrainState) -> str:
    """What did not fit into memory, and what may: smaller micro-batches, or shorter rows where one fills it alone."""
    tokens = prepared.checked.machine.microbatch_tokens
    longest = max(len(part.tokens) for example in prepared.data.train for part in example)
    if longest < tokens:
        fix = f"microbatch_tokens={max(longest, tokens // 2)} needs less memory and changes no result"
    else:
        fix = f"the longest row has {longest} tokens; max_length={longest // 2} cuts such rows"
    return f"step {state.step + 1} with micro-batches of {tokens} tokens; {fix}"


def _train(
    prepared: Prepared, state: TrainState, earlier: Sequence[Mapping[str, Any]], session: Session, loading: float
) -> tuple[list[Mapping[str, Any]], DiskError | None]:
    """The loop. What happens between two steps is written here, as statements.

    Whatever ends it, the steps that are done are saved first. `pending` are the random numbers before an evaluation
    that is due and not done, None where there is none.

    Returns the metrics, with those of `earlier` starts, and what was wrong with the last save.

    loading  seconds that the model took to load
    """
    config, planned, folder = prepared.config, prepared.loader, prepared.checked.folder
    logs = Logs.of(folder)
    keep = Keep(config.checkpoint.keep, config.checkpoint.keep_best, config.checkpoint.keep_every)
    saver = Saver(folder / "checkpoints", config.checkpoint.every, keep, session.say, newest=state.step)
    schedule = config.schedule
    multiplier = partial(
        lr_multiplier, schedule.name, total=planned.steps, warmup=schedule.warmup, decay=schedule.decay
    )
    lines = list(earlier)
    pending = None if _is_evaluated(prepared) else randomness.snapshot()
    with saver, display.steps(session.console, planned.steps) as shown:
        try:
            if pending is not None:
                with session.signals.at_once():
                    _evaluate(prepared, state, logs, session)
                pending = None
            for record in train_steps(
                state,
                planned,
                prepared.checked.objective,
                clip=config.optimizer.clip,
                lr=lambda step: config.optimizer.lr * multiplier(step),
                poll=session.signals.check,
                wants_to_stop=lambda: session.signals.arrived is not None,
            ):
                if not record.is_finite:
                    _skip_or_stop(prepared, state, record, session)
                is_due, loss = saver.is_due(record.step, planned.steps), None
                if _is_due(config, record, planned.steps) or (is_due and config.checkpoint.keep_best):
                    pending = randomness.snapshot()
                logs.metrics.write(asdict(record))
                lines.append(asdict(record))
                shown.show(record)
                if len(lines) == len(earlier) + 1:
                    seconds = time.perf_counter() - session.began
                    session.say(f"first step after {seconds:.1f} s ({loading:.1f} s of it loading the model)")
                if pending is not None:
                    with session.signals.at_once():
                        loss = _evaluate(prepared, state, logs, session)
                    pending = None
                if is_due:
                    saver.begin(_checkpoint(prepared, state, True, loss), logs.flush)
                session.signals.check()
        except BaseException as error:
            if pending is not None:  # the next start evaluates
                randomness.restore(pending)
            unsaved = _save(prepared, state, saver, logs, is_evaluated=pending is None)
            if isinstance(error, Preempted):
                raise unsaved or Preempted(error.number, saver.newest or None) from None
            saved = f"saved step {saver.newest}, run it again to go on" if saver.newest else "no step is saved"
            session.say(str(unsaved or saved))
            raise
        unsaved = saver.finish()
    logs.flush()
    return lines, unsaved


def _is_evaluated(prepared: Prepared) -> bool:
    """Whether the evaluation that is due before the next step was done by an earlier start."""
    return prepared.found is not None and prepared.found.checkpoint.values["cursor"]["is_evaluated"]


def _save(prepared: Prepared, state: TrainState, saver: Saver, logs: Logs, is_evaluated: bool) -> DiskError | None:
    """Saves the steps that are done, unless they are saved; what was wrong with that."""
    try:
        unsaved = saver.finish()
        if state.step and not state.is_torn and (unsaved or saver.newest != state.step):
            saver.begin(_checkpoint(prepared, state, is_evaluated, None), logs.flush)
            unsaved = saver.finish()
    except Exception as error:  # What ended the run may have taken the device with it; it is what the user must see.
        return DiskError(f"step {state.step} could not be saved ({type(error).__name__}: {error})")
    return unsaved


def _checkpoint(prepared: Prepared, state: TrainState, is_evaluated: bool, loss: float | None) -> Checkpoint:
    """All that the run needs to go on from here, copied; `loss` is the held-out one."""
    rows, config = prepared.rows, prepared.config
    columns = {name: torch.from_numpy(getattr(rows, name)) for name in ("digest", "line", "source")}
    cursor = {
        "step": state.step,
        "skipped": state.skipped,
        "is_evaluated": is_evaluated,
        "batchings": [[since, asdict(batching)] for since, batching in prepared.batchings],
        "sources": list(rows.sources),
    }
    values = {
        "cursor": cursor,
        "schedule": {**config.schedule.model_dump(), "step": state.step, "total": prepared.loader.steps},
        "random-00000": randomness.as_json(randomness.snapshot()),
        "inputs": asdict(prepared.inputs_until(state.step)),
    }
    return Checkpoint(state.step, {**state.tensors(), "rows": columns}, values, loss)


def _skip_or_stop(prepared: Prepared, state: TrainState, record: StepRecord, session: Session) -> None:
    """Goes past a step whose numbers are not finite, or raises NumbersError; either way the step can be replayed."""
    most, step_batch = prepared.config.skip_bad_steps, prepared.loader.step(state.step)
    folder = prepared.checked.folder / f"bad-step-{record.step}"
    diagnosis = badstep.examine(state.causal_lm, step_batch, prepared.checked.objective)
    badstep.write(folder, state, step_batch, diagnosis)
    what = "gradient" if math.isfinite(record.loss) else "loss"
    rows = badstep.named(diagnosis.rows(step_batch))
    told = f"{what} is not finite at step {record.step}, {rows}; weights unchanged; replay: deft replay {folder}"
    if state.skipped >= most:
        fix = f"skip_bad_steps={most + 1} goes past it, a lower optimizer.lr may avoid it"
        raise NumbersError(f"{told}; {fix}")
    session.say(f"{told}; skipped ({state.skipped + 1} of {most} at most)")
    state.skip()


def _is_due(config: Config, record: StepRecord, total: int) -> bool:
    """Evaluation comes every `evaluate.every` steps and after the last one."""
    every = config.evaluate.every
    return record.step == total or (every is not None and record.step % every == 0)


def _evaluate(prepared: Prepared, state: TrainState, logs: Logs, session: Session) -> float | None:
    """Held-out loss and sampled answers, as far as either is asked for, to eval.jsonl and samples.jsonl; the loss."""
    checked, evaluation = prepared.checked, prepared.config.evaluate
    found: dict[str, Any] = {}
    if prepared.data.held_out:
        tokens = checked.machine.microbatch_tokens
        found["loss"] = held_out_loss(state.causal_lm, prepared.data.held_out, checked.objective, tokens)
        found["perplexity"] = math.exp(min(found["loss"], 700))
    samples = evaluate.sample(
        state.causal_lm.model,
        checked.tokenizer,
        checked.prompts,
        evaluation.generate,
        evaluation.stop_sequences,
        session.metric_fn,
    )
    for row in samples.rows:
        logs.samples.write({"step": state.step, **asdict(row)})
    found |= samples.means
    if found:
        logs.eval.write({"step": state.step, **found})
    if found or samples.rows:
        session.say(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    for row in samples.rows[:SHOWN_SAMPLES]:
        session.say(f"  {row.prompt!r} -> {row.output!r}")
    return found.get("loss")
