"""The whole of a run, in reading order: prepare, load, train, finish. It knows all rooms."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

from deft.core import files, hardware, lock
from deft.core.errors import DiskError, InputError, NumbersError
from deft.core.redact import redacted, redacted_json
from deft.core.signals import Preempted
from deft.core.types import StepRecord
from deft.distributed.owners import Owners, agree
from deft.distributed.world import World, joined
from deft.evaluation import generate as generation
from deft.evaluation.evaluate import Evaluator
from deft.export import adapter, card
from deft.export import folder as export
from deft.export.weights import Shared
from deft.model import load as models
from deft.model import quantized
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
from deft.training import badstep, checkpoint, compiling, resuming
from deft.training.checkpoint import Keep
from deft.training.loop import train as train_steps
from deft.training.masters import Masters
from deft.training.saving import Saver
from deft.training.state import TrainState
from deft.training.step import dry_run_step


@dataclass(frozen=True)
class Run:
    """A finished run. `metrics` are the lines of metrics.jsonl, `folder` is the run folder, `device` where its model is
    loaded to."""

    folder: Path
    metrics: tuple[Mapping[str, Any], ...]
    device: str = "cpu"

    def __repr__(self) -> str:
        loss = f", loss={self.metrics[-1]['loss']:.4f}" if self.metrics else ""
        return f"Run(folder={str(self.folder)!r}, steps={len(self.metrics)}{loss})"

    @cached_property
    def result(self) -> Path:
        """The exported Hugging Face folder; of virtual tokens, which cannot be merged, their folder of peft's form."""
        final = self.folder / "final"
        return final if final.is_dir() else self.folder / "adapter"

    @cached_property
    def model(self) -> Any:
        """What the run has left, loaded afresh: in its dtype, in evaluation mode.

        Of virtual tokens it has them, but its own forward is the base's.

        Raises DamagedError where the run's result is not as it was written.
        """
        return generation.load(self._result, device=self.device)[0]

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the chat template that it was trained with."""
        return AutoTokenizer.from_pretrained(self._result)

    @cached_property
    def _result(self) -> Path:
        finished.verify(self.result)
        return self.result

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the exported Hugging Face folder, each file verified as it is copied. Raises DamagedError."""
        files.copy(self.result, Path(folder), but=(files.CARD,))


def train(config: Config, session: Session | None = None) -> Run:
    """The main job; goes on where an earlier start in its folder ended. Raises DeftError for what a user can mend."""
    with joined() as world:
        return _train_within((session or Session()).within(world), config)


def _train_within(session: Session, config: Config) -> Run:
    world = session.world
    folder = Path(world.from_first("output", lambda: str(run_folder.run_folder(config.output))))
    with lock.held(folder) if world.is_first else nullcontext("") as note:
        session.say(note, "" if config.output else f"output: {folder}; output={folder} goes on with this run")
        config = config.model_copy(update={"output": str(folder)})
        run_folder.stop_unless_plain(folder)
        if world.from_first("whether it is finished", lambda: finished.is_finished(config)):
            return _finished(config, session) if world.is_first else Run(folder, ())
        return _run(config, session, resume.earlier_starts(config, session.say, world))


def _finished(config: Config, session: Session) -> Run:
    """The run that is there. Raises Problems where another one is asked for."""
    folder = Path(str(config.output))
    run, before = Run(folder, tuple(jsonl.read(folder / "metrics.jsonl"))), finished.recorded(folder)
    quiet = replace(session, console=Console(quiet=True))
    result, asked = finished.result_of(config), prepare(finished.settled(config, before), quiet)
    steps = max((record["step"] for record in run.metrics), default=0)
    finished.stop_unless_same(result, steps, before, asked.request(), asked.fit.planned.steps)
    for each in finished.results_of(config):
        finished.verify(each)
    session.say(f"{folder}: finished at step {steps}; name another output= to train again")
    return run


def _run(config: Config, session: Session, earlier: EarlierStarts) -> Run:
    saver, world = _saver(config, session, earlier.step), session.world
    try:
        with saver:
            settled = earlier.settled(config)
            session = replace(session, memory=_least_memory(settled, world))
            with world.one_a_machine_first("encoding"):
                prepared = prepare(settled, session, earlier)
            _join(prepared, world)
            began = time.perf_counter()
            state = _load(prepared, session)
            prepared = _in_single_documents(prepared, state)
            shown = ConsoleTracker(session.console, session.began, time.perf_counter() - began)
            with hardware.within_memory(partial(_too_long, prepared, state)):
                _try_largest(prepared, state, session)
            metrics = _begin_folder(prepared, session) if world.is_first else []
            with session.signals.deferred():
                with hardware.within_memory(partial(_too_long, prepared, state)):
                    if world.is_first:
                        unsaved = _train(prepared, state, saver, metrics, shown, session)
                    else:
                        followed = _follow(prepared, state, saver, session)
                        if state.shards is not None:
                            _finish_with_first(prepared, state, session)
                        return followed
                with session.signals.at_once():
                    _finish(prepared, state, session)
    except Preempted as stop:
        raise Preempted(stop.number, saver.newest or None) from None
    checked = prepared.checked
    if unsaved:
        raise DiskError(f"{unsaved}; the run is finished, {finished.result_of(config)} is whole") from unsaved
    return Run(checked.folder, tuple(metrics), checked.machine.device.type)


def _saver(config: Config, session: Session, newest: int) -> Saver:
    settings = config.checkpoint
    keep = Keep(settings.keep, settings.keep_best, settings.keep_every)
    return Saver(Path(str(config.output)) / "checkpoints", settings.every, keep, session.say, newest, session.world)


def _least_memory(config: Config, world: World) -> int:
    """What every rank may use, so that all decide alike; 0 where there is no such device, which is told later."""
    own = 0
    with suppress(InputError):
        own = hardware.memory_bytes(hardware.device(config.device))
    return world.least("memory", own)


def _join(prepared: Prepared, world: World) -> None:
    """The ranks begin to compute together, once each knows the same run and the same plan."""
    _stop_unless_asked_alike(prepared, world)
    plan = prepared.fit.planned
    fix = "are the rows, the packages and the memory of both the same?"
    world.stop_unless_same("the plan", resume.plan_digest(plan.until(plan.steps)), fix)
    way = f"{prepared.checked.machine}, {prepared.fit.checkpointing} checkpointing"
    world.stop_unless_same("the machine", way, "name device=, precision= and microbatch_tokens=")
    world.begin_log(prepared.checked.folder / "logs")
    world.start(prepared.checked.machine.device)


def _stop_unless_asked_alike(prepared: Prepared, world: World) -> None:
    """Raises InputError where this rank has another configuration than rank 0, other rows, or another model."""
    asked = prepared.inputs
    changed = resume.changed_keys(world.from_first("the configuration", lambda: asked.config), asked.config)
    for key, (first, own) in changed.items():
        raise InputError(f"{key}: rank {world.rank} has {own}, and rank 0 {first}; give all ranks the same run file")
    parts = {"the rows": resume.plan_digest([prepared.rows.digest]), "the held-out rows": asked.held_out}
    parts |= {"the model": asked.model, "the tokenizer": asked.tokenizer, "the template": asked.template}
    for name, digest in parts.items():
        world.stop_unless_same(name, digest, "are its files the same on every machine?")


def _follow(prepared: Prepared, state: TrainState, saver: Saver, session: Session) -> Run:
    """The loop of a rank that only computes: rank 0 writes, evaluates and saves. Where ranks share the model, they
    evaluate and save together."""
    metrics: list[Mapping[str, Any]] = []
    evaluate = partial(_evaluator(prepared, session), state, lambda kind, record: None)
    is_shared, total = state.shards is not None, prepared.fit.planned.steps
    try:
        if is_shared and not prepared.earlier.is_evaluated:
            evaluate()
        for record in _steps(prepared, state, session):
            if not record.is_finite:
                session.say(_skip_or_stop(prepared, state, record))
            metrics.append(asdict(record))
            if is_shared:
                saves = saver.is_due(record.step, total)
                loss = evaluate() if _evaluates(prepared, record.step, saves) else None
                if saves:
                    saver.begin(prepared.checkpoint(state, True, loss), lambda: None)
    except (Preempted, KeyboardInterrupt, NumbersError) as error:
        if is_shared:
            _save_rest(prepared, state, saver, error)
        if not isinstance(error, NumbersError):
            session.world.see_off_first()
        raise
    saver.finish()
    return Run(prepared.checked.folder, tuple(metrics))


def _evaluates(prepared: Prepared, step: int, saves: bool) -> bool:
    """Whether an evaluation is due after a step: whenever it is asked for, and with each checkpoint of which the best
    are kept."""
    config = prepared.config
    return config.evaluate.is_due(step, prepared.fit.planned.steps) or bool(saves and config.checkpoint.keep_best)


def _ended_by_signals(state: TrainState, session: Session) -> AbstractContextManager[None]:
    """An evaluation that a signal ends at once; not where the others take part in it."""
    return session.signals.at_once() if state.shards is None else nullcontext()


def _load(prepared: Prepared, session: Session) -> TrainState:
    """The model on its device and the state around it, where the run begins or goes on."""
    checked, fit = prepared.checked, prepared.fit
    given = (checked.base, checked.machine, checked.trainable, prepared.share)
    with hardware.within_memory(partial(forecast.too_large, *given)):
        state = build.load(prepared.config, checked, fit, session.world, owns_process=session.owns_process)
        _stop_unless_seen(checked.folder, state)
        state.odd = frozenset(state.not_finite())
        prepared.earlier.restore(state)
    trained, every = state.trained, quantized.size(state.causal_lm.model)
    of_which = "" if trained == every else f" of which {trained / 1e6:.2f} M are trained,"
    if state.shards is not None:
        of_which += f" each of {state.shards.layout.copies} copies over {checked.shard} ranks,"
    session.say(
        state.causal_lm.note,
        _about_codes(prepared.config, state),
        f"{prepared.config.model}: {every / 1e6:.2f} M parameters,{of_which} {checked.machine.dtype_name} on "
        f"{checked.machine.device.type}; {fit.planned.steps} steps -> {checked.folder}",
    )
    return state


def _in_single_documents(prepared: Prepared, state: TrainState) -> Prepared:
    """Micro-batches of one document each, where documents are computed one by one and several ranks have begun the run:
    ranks that share the model call it equally often then, and its sums are in the same order for any number of them."""
    planned = prepared.fit.planned
    if state.causal_lm.mode == "packed" or (state.shards is None and planned.lanes == 1):
        return prepared
    return replace(prepared, fit=replace(prepared.fit, planned=replace(planned, microbatch_tokens=1)))


def _stop_unless_seen(folder: Path, state: TrainState) -> None:
    """Raises InputError, on all ranks, where one that has to write to the run folder does not see it."""
    if state.shards is not None:
        where = f"output: {folder} cannot be seen on {socket.gethostname()}; all ranks need one folder that they share"
        if complaint := state.world.first_complaint("" if folder.is_dir() else where):
            raise InputError(complaint)


def _about_codes(config: Config, state: TrainState) -> str:
    model = state.causal_lm.model
    if config.quantize == "off":
        return ""
    took = f"{len(quantized.layers(model))} linear layers in {quantized.code_bytes(model) / 2**20:,.1f} MiB"
    return f"quantize={config.quantize}: {took}; layers with codes are transformers' own, not deft's fused ones"


def _too_long(prepared: Prepared, state: TrainState) -> str:
    longest = max(len(part.tokens) for example in prepared.data.train for part in example)
    ways = forecast.ways_out(prepared.checked.trainable, prepared.share)
    return forecast.too_long(state.step + 1, prepared.checked.machine.microbatch_tokens, longest, ways)


def _try_largest(prepared: Prepared, state: TrainState, session: Session) -> None:
    """Compiles layers where that is worth it, and computes the largest micro-batch where it may not fit."""
    planned, objective = prepared.fit.planned, prepared.checked.objective
    compiling.begin(state, planned, objective, session.say)
    if session.world.from_first("a dry run", lambda: prepared.expected is None or not prepared.expected.is_safe):
        dry_run_step(state, forecast.largest(planned)[0], objective)


def _begin_folder(prepared: Prepared, session: Session) -> list[Mapping[str, Any]]:
    """The run folder with what is known before the next step: config.yaml, manifest.json, ledger.json.

    Nothing in it is then of a later step than the checkpoint; returns the metrics of the earlier ones.
    """
    checked, config = prepared.checked, prepared.config
    run_folder.make_folder(checked.folder)
    text = redacted(configuration.as_yaml(config))
    if prepared.earlier.found is None:
        session.say(*run_folder.begin_anew(checked.folder, text))
    elif prepared.earlier.step < prepared.fit.planned.steps:
        _set_aside(checked.folder / "final", "is of an earlier end", session)
    metrics = prepared.earlier.cut_back(checked.folder, prepared.inputs, session.say)
    files.write_text(checked.folder / "config.yaml", text)
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


def _set_aside(final: Path, why: str, session: Session) -> None:
    if os.path.lexists(final):
        session.say(f"{final}: {why}, and is set aside as {files.set_aside(final).name}")


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
    total, logs = prepared.fit.planned.steps, Logs.of(prepared.checked.folder)
    evaluate, is_evaluated = _evaluator(prepared, session), prepared.earlier.is_evaluated
    with Trackers([logs, shown], session.say).following(_tracked(prepared, state)) as tracks:
        try:
            if not is_evaluated:
                with _ended_by_signals(state, session):
                    evaluate(state, tracks.write)
                is_evaluated = True
            for record in _steps(prepared, state, session):
                if not record.is_finite:
                    session.say(_skip_or_stop(prepared, state, record))
                saves, loss = saver.is_due(record.step, total), None
                is_evaluated = not _evaluates(prepared, record.step, saves)
                metrics.append(asdict(record))
                tracks.write("step", metrics[-1])
                files.stop_unless_ours(logs.metrics.path)
                if not is_evaluated:
                    with _ended_by_signals(state, session):
                        loss = evaluate(state, tracks.write)
                    is_evaluated = True
                if saves:
                    saver.begin(prepared.checkpoint(state, True, loss), logs.flush)
                if session.world.size == 1:
                    session.signals.check()
        except BaseException as error:
            unsaved = _save_rest(prepared, state, saver, error, is_evaluated, logs.flush)
            if isinstance(error, Preempted):
                raise unsaved or error from None
            saved = f"saved step {saver.newest}, run it again to go on" if saver.newest else "no step is saved"
            if isinstance(error, NumbersError) and state.is_torn:
                raise NumbersError(f"{error}; {_before(saver.newest)}") from error
            session.say(str(unsaved or saved))
            raise
        unsaved = saver.finish()
    logs.flush()
    return unsaved


def _save_rest(
    prepared: Prepared,
    state: TrainState,
    saver: Saver,
    error: BaseException,
    is_evaluated: bool = True,
    flush: Callable[[], None] = lambda: None,
) -> DiskError | None:
    """Saves the steps that are done; where ranks share the model, if all have come to this end after the same step."""
    is_common = isinstance(error, Preempted | KeyboardInterrupt | NumbersError) and state.world.is_sound
    if state.shards is not None and not is_common:
        with suppress(Exception):  # what a lost rank leaves undone
            saver.finish()
        return None
    return resuming.save_rest(state, saver, lambda: prepared.checkpoint(state, is_evaluated), flush)


def _before(step: int) -> str:
    name = checkpoint.name(step)
    return f"{name} is the one before, and the same command goes on from it" if step else "the same command begins anew"


def _steps(prepared: Prepared, state: TrainState, session: Session) -> Iterator[StepRecord]:
    """A signal to any rank ends the run on all: alone at once, with several two rounds on, or after the step."""
    config, planned, signals = prepared.config, prepared.fit.planned, session.signals
    is_stopped = yield from train_steps(
        state,
        planned,
        prepared.checked.objective,
        clip=config.optimizer.clip,
        lr=partial(_learning_rate, config, planned.steps),
        poll=signals.check if session.world.size == 1 else lambda: session.world.check(signals.arrived),
        wants_to_stop=lambda: signals.arrived is not None,
    )
    if is_stopped:
        signals.arrived = signals.arrived or signal.SIGTERM
        signals.check()


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
        microbatch_tokens=checked.machine.microbatch_tokens,
        tokenizer=checked.tokenizer,
        prompts=checked.prompts,
        settings=prepared.config.evaluate,
        metric_fn=session.metric_fn if session.world.is_first else None,
        form=checked.form,
    )


def _tracked(prepared: Prepared, state: TrainState) -> TrackedRun:
    config = redacted_json(prepared.config.model_dump(mode="json"))
    return TrackedRun(prepared.checked.folder, config, prepared.fit.planned.steps, state.step)


def _finish(prepared: Prepared, state: TrainState, session: Session) -> None:
    """What leaves the run, and the report."""
    checked, adapting = prepared.checked, prepared.config.adapter
    chosen = _settle(prepared, state)
    settings = _hyperparameters(prepared) | ({"checkpoint": chosen} if chosen else {})
    facts = card.facts_of_run(checked.folder.name, prepared.config.model, prepared.data.ledgers, settings)
    is_virtual = adapting is not None and adapting.is_virtual
    about = card.model_card({**facts, "prompts": redacted(str(checked.form)), "is_virtual": is_virtual})
    if is_virtual:
        said = _leave_virtual_tokens(prepared, state, about)
    else:
        said = _hand_over(prepared, state, about, session)
    report.write(checked.folder)
    result = finished.result_of(prepared.config)
    session.say(f"{result}: {said}", f"{result}: {chosen}" if chosen else "")


def _finish_with_first(prepared: Prepared, state: TrainState, session: Session) -> None:
    """What rank 0 needs of another rank, to finish a model that they share out."""
    _settle(prepared, state)
    _hand_over(prepared, state, "", session)


def _settle(prepared: Prepared, state: TrainState) -> str:
    """The weights become those to hand over; what is said of their choice. Ranks that share the model all do it."""
    state.stop_if_broken(f"the update of step {state.step} leaves values that are not finite")
    chosen = best.take(prepared.checked.folder, state, prepared.config.checkpoint.keep_best)
    state.serve()
    return chosen


def _owners(state: TrainState) -> Owners:
    """Who holds which rows of the parameters, by name."""
    rows = {key.removeprefix("weight."): each for key, each in state.rows().items() if key.startswith("weight.")}
    return agree("export", rows, state.world) if rows else Owners()


def _leave_virtual_tokens(prepared: Prepared, state: TrainState, about: str) -> str:
    """adapter/, as virtual tokens cannot be merged; says what it is for."""
    checked, model, masters = prepared.checked, state.causal_lm.model, state.masters
    folder, base = checked.folder / "adapter", prepared.config.model
    step = {"step": state.step}
    adapter.write_virtual(folder, model, masters, base, checked.tokenizer, about, checked.form, step)
    return (
        "virtual tokens in peft's form; they cannot be merged, so there is no final/: deft generate reads this folder"
    )


def _hand_over(prepared: Prepared, state: TrainState, about: str, session: Session) -> str:
    """final/, compared with what is in memory before it is called done, and what of it was compared."""
    checked, data = prepared.checked, prepared.data
    model, masters, owners = state.causal_lm.model, state.masters, _owners(state)
    shared = Shared(owners)
    dtype = prepared.config.export.dtype_of(checked.base.dtype)
    if prepared.config.adapter is not None:
        _write_adapter(prepared, model, masters, session, owners)
    if owners.rows and prepared.config.adapter is not None:
        shared, said = adapter.merge_shared(model, masters, owners)
        session.say(said)
    elif prepared.config.adapter is not None:
        rows = [example[0].tokens.tolist() for example in data.train[: export.EXPORT_ROWS]]
        if prepared.config.quantize != "off":
            session.say(adapter.dequantize(model, masters, rows))
        session.say(str(adapter.merge(model, masters, rows, getattr(torch, dtype))))
    final, made_of = checked.folder / "final", finished.about_final(prepared.request(), state.step)
    if owners.world.is_first and not finished.is_of(final, made_of):
        _set_aside(final, "is not what this run makes", session)
    compared = export.hand_over(
        final,
        model,
        checked.tokenizer,
        base=checked.base,
        dtype=getattr(torch, dtype),
        weights=None if dtype == checked.machine.dtype_name else masters,
        marks=data.marks,
        card=about,
        form=checked.form,
        examples=data.train,
        chat=checked.train[0][1].first if checked.is_chat else None,
        about=made_of,
        shared=shared,
    )
    session.say(compared.warning)
    return str(compared)


def _write_adapter(prepared: Prepared, model: Any, masters: Masters, session: Session, owners: Owners) -> None:
    config, folder = prepared.config, prepared.checked.folder / "adapter"
    assert config.adapter is not None
    if config.merge is not None:
        what = f"{config.model} with {config.merge} merged into it, which is no folder"
        session.say(f"{folder}: not written, as its base is {what}; final/ holds all of it")
        return
    base = resume.fingerprint(models.folder(prepared.checked.base))
    tokenizer = prepared.checked.tokenizer
    about = {"base": base, "quantize": config.quantize}
    adapter.write(folder, model, masters, config.adapter, config.model, tokenizer, about, owners)


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
