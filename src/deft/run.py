"""The whole of a run, in reading order: prepare, load, train, finish. It knows all rooms."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deft import (
    checkpoint,
    compiling,
    evaluate,
    files,
    forecast,
    hardware,
    lock,
    manifest,
    preflight,
    resume,
)
from deft import config as configuration
from deft.checkpoint import Checkpoint, Found, Keep
from deft.config import Config
from deft.errors import DiskError, InputError, NumbersError
from deft.finish import finish
from deft.hardware import Machine
from deft.logs import console as display
from deft.logs import jsonl
from deft.logs.jsonl import Logs
from deft.model import load as models
from deft.model import selftest, towers
from deft.model.load import Base
from deft.model.outline import outline
from deft.optim.adamw import AdamW
from deft.prepare import Prepared, prepare
from deft.reading import Session
from deft.redact import redacted
from deft.saving import Saver
from deft.schedule import factor
from deft.signals import Preempted
from deft.training import badstep
from deft.training.heldout import held_out_loss
from deft.training.loop import train as train_steps
from deft.training.rehearse import rehearse
from deft.training.state import TrainState, random_state, set_random_state
from deft.types import StepRecord

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
    folder = preflight.run_folder(config.output)
    with lock.held(folder) as note:
        if note:
            session.say(note)
        config = config.model_copy(update={"output": str(folder)})
        if (earlier := _finished(config)) is not None:
            session.say(f"{folder}: finished at step {len(earlier.metrics)}; name another output= to train again")
            return earlier
        return _run(config, session, _checkpoint_of(config, session))


def _run(config: Config, session: Session, found: Found | None) -> Run:
    saved = found.checkpoint.step if found else None
    try:
        prepared = prepare(_settled(config, found), session, found)
        hardware.bound_kernel_caches(prepared.kernels)
        with hardware.within_memory(partial(_too_large, prepared)):
            loading = time.perf_counter()
            state = _load(prepared, session)
            loading = time.perf_counter() - loading
        hardware.keep_freed_memory()
        with hardware.within_memory(partial(_too_long, prepared, state)):
            compiling.begin(state, prepared.loader, prepared.checked.loss, session.say)
            if prepared.expected is None or not prepared.expected.is_safe:
                rehearse(state, forecast.largest(prepared.loader)[0], prepared.checked.loss)
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
    return Run(prepared.checked.folder, tuple(metrics), (state.learner.model, prepared.checked.tokenizer.hf))


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


def assemble(config: Config, base: Base, machine: Machine) -> tuple[TrainState, str]:
    """The model with its fp32 masters, and the learner that the self-test chose with its note for the user."""
    torch.manual_seed(config.seed)
    model = models.load(base, device=machine.device, dtype=_loaded_dtype(base, machine))
    learner, note = selftest.choose(model)
    optimizer = AdamW(
        towers.trained_parameters(model),
        dtype=machine.dtype,
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )
    model.train(config.dropout == "config")
    return TrainState(learner, optimizer), note


def _load(prepared: Prepared, session: Session) -> TrainState:
    checked = prepared.checked
    state, note = assemble(prepared.config, checked.base, checked.machine)
    state.learner = replace(state.learner, checkpointing=prepared.checkpointing)
    if note:
        session.say(note)
    parameters = sum(parameter.numel() for parameter in state.optimizer.parameters.values())
    dtype = checked.machine.dtype_name
    session.say(
        f"{prepared.config.model}: {parameters / 1e6:.2f} M parameters, {dtype} on {checked.machine.device.type}; "
        f"{prepared.loader.steps} steps -> {checked.folder}"
    )
    if prepared.found:
        stored = prepared.found.checkpoint
        state.restore(stored.tensors, stored.step)
        state.skipped = stored.values["cursor"]["skipped"]
        set_random_state(stored.values["random-00000"])
    return state


def _too_large(prepared: Prepared) -> str:
    base, dtype = prepared.checked.base, prepared.checked.machine.dtype
    need = outline(base).state_bytes(dtype) / 2**30
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


def _loaded_dtype(base: Base, machine: Machine) -> torch.dtype:
    """bf16 weights need no fp32 copy to be read into; all others are read in fp32, so that masters lose nothing."""
    is_half = base.dtype == machine.dtype_name == "bfloat16"
    return torch.bfloat16 if is_half else torch.float32


def _train(
    prepared: Prepared, state: TrainState, earlier: Sequence[Mapping[str, Any]], session: Session, loading: float
) -> tuple[list[Mapping[str, Any]], DiskError | None]:
    """The loop. What happens between two steps is written here, as statements.

    Returns the metrics, with those of `earlier` starts, and what was wrong with the last save.

    loading  seconds that the model took to load
    """
    config, planned, folder = prepared.config, prepared.loader, prepared.checked.folder
    logs = Logs.of(folder)
    keep = Keep(config.checkpoint.keep, config.checkpoint.keep_best, config.checkpoint.keep_every)
    saver = Saver(folder / "checkpoints", config.checkpoint.every, keep, session.say, newest=state.step)
    multiplier = partial(
        factor, config.schedule.name, total=planned.steps, warmup=config.schedule.warmup, decay=config.schedule.decay
    )
    lines = list(earlier)
    is_evaluated, random = _is_evaluated(prepared), random_state()
    with saver, display.steps(session.console, planned.steps) as shown:
        try:
            if not is_evaluated:
                with session.signals.at_once():
                    _evaluate(prepared, state, logs, session)
                is_evaluated = True
            for record in train_steps(
                state,
                planned,
                prepared.checked.loss,
                clip=config.optimizer.clip,
                factor=multiplier,
                poll=session.signals.check,
            ):
                if not record.is_finite:
                    _skip_or_stop(prepared, state, record, session)
                logs.metrics.write(asdict(record))
                lines.append(asdict(record))
                shown.show(record)
                if len(lines) == len(earlier) + 1:
                    seconds = time.perf_counter() - session.began
                    session.say(f"first step after {seconds:.1f} s ({loading:.1f} s of it loading the model)")
                is_due, loss = saver.is_due(record.step, planned.steps), None
                if _is_due(config, record, planned.steps) or (is_due and config.checkpoint.keep_best):
                    is_evaluated, random = False, random_state()
                    with session.signals.at_once():
                        loss = _evaluate(prepared, state, logs, session)
                    is_evaluated = True
                if is_due:
                    saver.begin(_checkpoint(prepared, state, is_evaluated, loss), logs.flush)
                session.signals.check()
        except Preempted as stop:
            if not is_evaluated:  # the next start evaluates
                set_random_state(random)
            unsaved = _save(prepared, state, saver, logs, is_evaluated)
            raise unsaved or Preempted(stop.number, state.step or None) from None
        except NumbersError:
            _save(prepared, state, saver, logs, is_evaluated)
            raise
        unsaved = saver.finish()
    logs.flush()
    return lines, unsaved


def _is_evaluated(prepared: Prepared) -> bool:
    """Whether the evaluation that is due before the next step was done by an earlier start."""
    return prepared.found is not None and prepared.found.checkpoint.values["cursor"]["is_evaluated"]


def _save(prepared: Prepared, state: TrainState, saver: Saver, logs: Logs, is_evaluated: bool) -> DiskError | None:
    """Saves the steps that are done, unless they are saved; what was wrong with that."""
    unsaved = saver.finish()
    if state.step and (unsaved or saver.newest != state.step):
        saver.begin(_checkpoint(prepared, state, is_evaluated, None), logs.flush)
        unsaved = saver.finish()
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
        "random-00000": random_state(),
        "inputs": asdict(prepared.inputs_until(state.step)),
    }
    return Checkpoint(state.step, {**state.tensors(), "rows": columns}, values, loss)


def _skip_or_stop(prepared: Prepared, state: TrainState, record: StepRecord, session: Session) -> None:
    """Goes past a step whose numbers are not finite, or raises NumbersError; either way the step can be replayed."""
    most, work = prepared.config.skip_bad_steps, prepared.loader.step(state.step)
    folder = prepared.checked.folder / f"bad-step-{record.step}"
    diagnosis = badstep.examine(state.learner, work, prepared.checked.loss)
    badstep.write(folder, state, work, diagnosis)
    what = "gradient" if math.isfinite(record.loss) else "loss"
    rows = badstep.named(diagnosis.rows(work))
    told = f"{what} is not finite at step {record.step}, {rows}; weights unchanged; replay: deft replay {folder}"
    if state.skipped >= most:
        fix = f"skip_bad_steps={most + 1} goes past it, a lower optimizer.lr may avoid it"
        raise NumbersError(f"{told}; {fix}")
    session.say(f"{told}; skipped ({state.skipped + 1} of {most} at most)")
    state.skip()


def _is_due(config: Config, record: StepRecord, total: int) -> bool:
    """Evaluation comes every so many steps and after the last one."""
    every = config.evaluate.every
    return record.step == total or (every is not None and record.step % every == 0)


def _evaluate(prepared: Prepared, state: TrainState, logs: Logs, session: Session) -> float | None:
    """Held-out loss and sampled answers, as far as either is asked for, to eval.jsonl and samples.jsonl; the loss."""
    checked, evaluation = prepared.checked, prepared.config.evaluate
    found: dict[str, Any] = {}
    if prepared.data.held_out:
        tokens = checked.machine.microbatch_tokens
        found["loss"] = held_out_loss(state.learner, prepared.data.held_out, checked.loss, tokens)
        found["perplexity"] = math.exp(min(found["loss"], 700))
    samples = evaluate.sample(
        state.learner.model,
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
