"""The whole of a run, in reading order: prepare, load, train, finish. It knows all rooms."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from deft.core import files, hardware, lock
from deft.core.errors import DiskError
from deft.core.redact import redacted, redacted_json
from deft.core.signals import Preempted
from deft.core.types import StepRecord
from deft.distributed.world import World
from deft.evaluation.evaluate import Evaluator
from deft.export import adapter, card
from deft.export import folder as export
from deft.plan.schedule import lr_multiplier
from deft.run import best, build, finished, forecast, resume
from deft.run import config as configuration
from deft.run import folder as run_folder
from deft.run.config import Config
from deft.run.prepare import Prepared, prepare
from deft.run.reading import Session
from deft.run.resume import EarlierStarts
from deft.tracking import jsonl, report
from deft.tracking.console import ConsoleTracker
from deft.tracking.jsonl import Logs
from deft.tracking.tracker import TrackedRun, Trackers
from deft.training import badstep, compiling, resuming
from deft.training.checkpoint import Keep
from deft.training.loop import train as train_steps
from deft.training.saving import Saver
from deft.training.state import TrainState
from deft.training.step import dry_run_step


@dataclass(frozen=True)
class Run:
    """A finished run. `metrics` are the lines of metrics.jsonl, `folder` is the run folder.

    trained  the model and the tokenizer in memory; None where they were trained by an earlier start, and are loaded
    """

    folder: Path
    metrics: tuple[Mapping[str, Any], ...]
    trained: tuple[Any, Any] | None = None

    def __repr__(self) -> str:
        loss = f", loss={self.metrics[-1]['loss']:.4f}" if self.metrics else ""
        return f"Run(folder={str(self.folder)!r}, steps={len(self.metrics)}{loss})"

    @cached_property
    def model(self) -> Any:
        """The trained model, in evaluation mode."""
        return self.trained[0] if self.trained else AutoModelForCausalLM.from_pretrained(self.folder / "final")

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the chat template that it was trained with."""
        return self.trained[1] if self.trained else AutoTokenizer.from_pretrained(self.folder / "final")

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the exported Hugging Face folder."""
        files.copy(self.folder / "final", Path(folder))


def train(config: Config, session: Session | None = None) -> Run:
    """The main job; goes on where an earlier start in its folder ended. Raises DeftError for what a user can mend."""
    session = session or Session()
    world = World()
    folder = world.from_first(lambda: run_folder.run_folder(config.output))
    with lock.held(folder) as note:
        session.say(note, "" if config.output else f"output: {folder}; output={folder} goes on with this run")
        config = config.model_copy(update={"output": str(folder)})
        if finished.is_finished(config):
            return _finished(config, session)
        return _run(config, session, world, resume.earlier_starts(config, session.say))


def _finished(config: Config, session: Session) -> Run:
    """The run that is there. Raises Problems where another one is asked for."""
    folder = Path(str(config.output))
    run, before = Run(folder, tuple(jsonl.read(folder / "metrics.jsonl"))), finished.recorded(folder)
    quiet = replace(session, console=Console(quiet=True))
    asked = prepare(finished.settled(config, before), quiet)
    finished.stop_unless_same(folder, len(run.metrics), before, asked.request(), asked.fit.planned.steps)
    session.say(f"{folder}: finished at step {len(run.metrics)}; name another output= to train again")
    return run


def _run(config: Config, session: Session, world: World, earlier: EarlierStarts) -> Run:
    saver = _saver(config, session, earlier.step)
    try:
        with saver:
            prepared = prepare(earlier.settled(config), session, earlier)
            began = time.perf_counter()
            state = _load(prepared, session, world)
            shown = ConsoleTracker(session.console, session.began, time.perf_counter() - began)
            with hardware.within_memory(partial(_too_long, prepared, state)):
                _try_largest(prepared, state, session)
            metrics = _begin_folder(prepared, session)
            with session.signals.deferred():
                with hardware.within_memory(partial(_too_long, prepared, state)):
                    unsaved = _train(prepared, state, saver, metrics, shown, session)
                with session.signals.at_once():
                    _finish(prepared, state, session)
    except Preempted as stop:
        raise Preempted(stop.number, saver.newest or None) from None
    checked = prepared.checked
    if unsaved:
        raise DiskError(f"{unsaved}; the run is finished, {checked.folder / 'final'} is whole") from unsaved
    return Run(checked.folder, tuple(metrics), (state.causal_lm.model.eval(), checked.tokenizer.hf))


def _saver(config: Config, session: Session, newest: int) -> Saver:
    settings = config.checkpoint
    keep = Keep(settings.keep, settings.keep_best, settings.keep_every)
    return Saver(Path(str(config.output)) / "checkpoints", settings.every, keep, session.say, newest)


def _load(prepared: Prepared, session: Session, world: World) -> TrainState:
    """The model on its device and the state around it, where the run begins or goes on."""
    checked, fit = prepared.checked, prepared.fit
    with hardware.within_memory(partial(forecast.too_large, checked.base, checked.machine, checked.trainable)):
        state = build.load(prepared.config, checked, fit, world, owns_process=session.owns_process)
        prepared.earlier.restore(state)
    trained = sum(parameter.numel() for parameter in state.masters.parameters.values())
    every = sum(parameter.numel() for parameter in state.causal_lm.model.parameters())
    of_which = "" if trained == every else f" of which {trained / 1e6:.2f} M are trained,"
    session.say(
        state.causal_lm.note,
        f"{prepared.config.model}: {every / 1e6:.2f} M parameters,{of_which} {checked.machine.dtype_name} on "
        f"{checked.machine.device.type}; {fit.planned.steps} steps -> {checked.folder}",
    )
    return state


def _too_long(prepared: Prepared, state: TrainState) -> str:
    longest = max(len(part.tokens) for example in prepared.data.train for part in example)
    return forecast.too_long(state.step + 1, prepared.checked.machine.microbatch_tokens, longest)


def _try_largest(prepared: Prepared, state: TrainState, session: Session) -> None:
    """Compiles layers where that is worth it, and computes the largest micro-batch where it may not fit."""
    planned, objective = prepared.fit.planned, prepared.checked.objective
    compiling.begin(state, planned, objective, session.say)
    if prepared.expected is None or not prepared.expected.is_safe:
        dry_run_step(state, forecast.largest(planned)[0], objective)


def _begin_folder(prepared: Prepared, session: Session) -> list[Mapping[str, Any]]:
    """The run folder with what is known before the next step: config.yaml, manifest.json, ledger.json.

    Nothing in it is then of a later step than the checkpoint; returns the metrics of the earlier ones.
    """
    checked, config = prepared.checked, prepared.config
    run_folder.make_folder(checked.folder)
    metrics = prepared.earlier.cut_back(checked.folder, session.say)
    files.write_text(checked.folder / "config.yaml", redacted(configuration.as_yaml(config)))
    files.write_json(checked.folder / "ledger.json", [source.as_json() for source in prepared.data.ledgers])
    described = run_folder.manifest(
        seed=config.seed,
        device=checked.machine.device.type,
        dtype=checked.machine.dtype_name,
        data=checked.files(),
        tokenizer_json=checked.tokenizer.hf.backend_tokenizer.to_str(),
    )
    files.write_json(checked.folder / "manifest.json", {**described, "request": prepared.request().as_json()})
    return [*metrics]


def _train(
    prepared: Prepared,
    state: TrainState,
    saver: Saver,
    metrics: list[Mapping[str, Any]],
    shown: ConsoleTracker,
    session: Session,
) -> DiskError | None:
    """The loop. What happens between two steps is written here, as statements; whatever ends it, the steps that are
    done are saved first.

    Puts a record per step into `metrics`; returns what was wrong with the last save.
    """
    config, total, logs = prepared.config, prepared.fit.planned.steps, Logs.of(prepared.checked.folder)
    evaluate, is_evaluated = _evaluator(prepared, session), prepared.earlier.is_evaluated
    with Trackers([logs, shown], session.say).following(_tracked(prepared, state)) as tracks:
        try:
            if not is_evaluated:
                with session.signals.at_once():
                    evaluate(state, tracks.write)
                is_evaluated = True
            for record in _steps(prepared, state, session):
                if not record.is_finite:
                    session.say(_skip_or_stop(prepared, state, record))
                saves, loss = saver.is_due(record.step, total), None
                is_evaluated = not (
                    config.evaluate.is_due(record.step, total) or (saves and config.checkpoint.keep_best)
                )
                metrics.append(asdict(record))
                tracks.write("step", metrics[-1])
                if not is_evaluated:
                    with session.signals.at_once():
                        loss = evaluate(state, tracks.write)
                    is_evaluated = True
                if saves:
                    saver.begin(prepared.checkpoint(state, True, loss), logs.flush)
                session.signals.check()
        except BaseException as error:
            unsaved = resuming.save_rest(state, saver, lambda: prepared.checkpoint(state, is_evaluated), logs.flush)
            if isinstance(error, Preempted):
                raise unsaved or error from None
            saved = f"saved step {saver.newest}, run it again to go on" if saver.newest else "no step is saved"
            session.say(str(unsaved or saved))
            raise
        unsaved = saver.finish()
    logs.flush()
    return unsaved


def _steps(prepared: Prepared, state: TrainState, session: Session) -> Iterator[StepRecord]:
    config, planned = prepared.config, prepared.fit.planned
    return train_steps(
        state,
        planned,
        prepared.checked.objective,
        clip=config.optimizer.clip,
        lr=partial(_learning_rate, config, planned.steps),
        poll=session.signals.check,
        wants_to_stop=lambda: session.signals.arrived is not None,
    )


def _skip_or_stop(prepared: Prepared, state: TrainState, record: StepRecord) -> str:
    checked, most = prepared.checked, prepared.config.skip_bad_steps
    step_batch = prepared.fit.planned.step(state.step)
    return badstep.skip_or_stop(state, step_batch, checked.objective, record, folder=checked.folder, most=most)


def _learning_rate(config: Config, total: int, step: int) -> float:
    schedule = config.schedule
    multiplier = lr_multiplier(schedule.name, step, total, warmup=schedule.warmup, decay=schedule.decay)
    return config.optimizer.lr * multiplier


def _evaluator(prepared: Prepared, session: Session) -> Evaluator:
    checked = prepared.checked
    return Evaluator(
        held_out=prepared.data.held_out,
        objective=checked.objective,
        microbatch_tokens=checked.machine.microbatch_tokens,
        tokenizer=checked.tokenizer,
        prompts=checked.prompts,
        settings=prepared.config.evaluate,
        metric_fn=session.metric_fn,
        form=checked.form,
    )


def _tracked(prepared: Prepared, state: TrainState) -> TrackedRun:
    config = redacted_json(prepared.config.model_dump(mode="json"))
    return TrackedRun(prepared.checked.folder, config, prepared.fit.planned.steps, state.step)


def _finish(prepared: Prepared, state: TrainState, session: Session) -> None:
    """final/, compared with what is in memory before it is called done, and the report."""
    checked, data = prepared.checked, prepared.data
    final = checked.folder / "final"
    chosen = best.take(checked.folder, state, prepared.config.checkpoint.keep_best)
    settings = _hyperparameters(prepared) | ({"checkpoint": chosen} if chosen else {})
    model, masters = state.causal_lm.model, state.masters
    if prepared.config.adapter is not None:
        adapter.write(checked.folder / "adapter", model, masters, prepared.config.adapter, prepared.config.model)
        rows = [example[0].tokens.tolist() for example in data.train[: export.EXPORT_ROWS]]
        session.say(str(adapter.merge(model, masters, rows, getattr(torch, checked.base.dtype))))
    facts = card.facts_of_run(checked.folder.name, prepared.config.model, data.ledgers, settings)
    compared = export.hand_over(
        final,
        model,
        checked.tokenizer,
        base=checked.base,
        weights=None if checked.base.dtype == checked.machine.dtype_name else masters,
        marks=data.marks,
        card=card.model_card({**facts, "prompts": redacted(str(checked.form))}),
        form=checked.form,
        examples=data.train,
        chat=checked.train[0][1].first if checked.is_chat else None,
        world=state.world,
        about={"step": state.step},
    )
    report.write(checked.folder)
    session.say(f"{final}: {compared}", f"{final}: {chosen}" if chosen else "")


def _hyperparameters(prepared: Prepared) -> dict[str, Any]:
    config = prepared.config
    return {
        "optimizer": config.optimizer.name,
        "learning rate": config.optimizer.lr,
        "schedule": config.schedule.name,
        "epochs": config.epochs,
        "steps": prepared.fit.planned.steps,
        "batch": config.batch.model_dump(exclude_none=True),
        "max_length": config.max_length,
        "seed": config.seed,
    }
