"""The whole of a run, in reading order: check, read, encode, plan, load, train, export. It knows all rooms."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from deft import (
    cache,
    checkpoint,
    compiling,
    dataset,
    evaluate,
    export,
    files,
    fits,
    forecast,
    hardware,
    ledger,
    loader,
    lock,
    manifest,
    preflight,
    rates,
    registry,
    report,
    resume,
)
from deft import config as configuration
from deft import tokenizer as edge
from deft.cache import Cache
from deft.checkpoint import Checkpoint, Found, Keep
from deft.config import Config
from deft.data.shapes import Survey
from deft.dataset import Advance, Dataset, Named, Way
from deft.encoding.rows import Policy, RowEncoder, as_chat
from deft.errors import DiskError, InputError, NumbersError, Problem, Problems
from deft.evaluate import MetricFn, Prompt
from deft.export import ExportError
from deft.forecast import Fit, Forecast
from deft.hardware import Machine
from deft.loader import Loader
from deft.logs import console as display
from deft.logs import jsonl
from deft.logs.jsonl import Logs
from deft.model import load as models
from deft.model import selftest, towers
from deft.model.checkpointing import Checkpointing
from deft.model.load import Base
from deft.model.outline import outline
from deft.optim.adamw import AdamW
from deft.plan.order import Batching
from deft.redact import redacted, redacted_json
from deft.render.chat import Rules
from deft.render.choose import Chosen, choose
from deft.resume import Inputs, Rows
from deft.saving import Saver
from deft.schedule import factor
from deft.signals import Preempted, Signals
from deft.tokenizer import Tokenizer
from deft.training import badstep
from deft.training.heldout import held_out_loss
from deft.training.loop import train as train_steps
from deft.training.rehearse import rehearse
from deft.training.state import TrainState, random_state, set_random_state
from deft.types import Fate, StepRecord
from deft.workers import Helpers

SHOWN_SAMPLES = 3
SOON_ENCODED = 20_000
"""So many rows are encoded before those that cannot be read stop the run."""
EXPORT_ROWS = 3
"""So many training examples are compared between the model in memory and the exported one."""


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


@dataclass(frozen=True)
class Caller:
    """What only a Python caller can give: rows in memory, a metric function; where the run reports to, what may end it.

    signals  nothing ends the run unless the caller handles signals
    helpers  processes that encode rows, if the caller has started some; they are stopped when no more are to come
    began    time.perf_counter() when the run was asked for
    """

    samples: Sequence[Any] | None = None
    metric_fn: MetricFn | None = None
    console: Console = field(default_factory=Console)
    signals: Signals = field(default_factory=Signals)
    helpers: Helpers | None = None
    began: float = field(default_factory=time.perf_counter)

    def say(self, text: str) -> None:
        self.console.print(redacted(text), highlight=False, soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Reading:
    """The rows, understood, and how they become tokens."""

    tokenizer: Tokenizer
    chosen: Chosen
    policy: Policy
    is_chat: bool
    stop_ids: tuple[int, ...]
    train: list[tuple[Named, Survey]]
    held_out: list[tuple[Named, Survey]]

    def encoder(self) -> RowEncoder:
        return dataset.encoder(self.tokenizer, self.chosen, self.policy, self.stop_ids)


@dataclass(frozen=True)
class Checked(Reading):
    """What is known once nothing in the input is wrong."""

    base: Base
    loss: ModuleType
    machine: Machine
    prompts: tuple[Prompt, ...]
    folder: Path


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the model's weights are loaded.

    config     resolved
    expected   None where the architecture has to be seen running
    batchings  what cuts steps, and from which step on
    found      the checkpoint that the run goes on from
    """

    config: Config
    checked: Checked
    row_encoder: RowEncoder
    data: Dataset
    loader: Loader
    checkpointing: Checkpointing
    expected: Forecast | None
    rows: Rows
    inputs: Inputs
    batchings: tuple[tuple[int, Batching], ...]
    found: Found | None

    def inputs_until(self, step: int) -> Inputs:
        """What the first `step` steps are trained on."""
        return replace(self.inputs, plan=resume.plan_digest(self.loader.until(step)))


def train(config: Config, caller: Caller | None = None) -> Run:
    """The main job; goes on where an earlier start in its folder ended. Raises DeftError for what a user can mend."""
    caller = caller or Caller()
    hardware.bound_kernel_caches()
    folder = preflight.run_folder(config.output)
    with lock.held(folder) as note:
        if note:
            caller.say(note)
        config = config.model_copy(update={"output": str(folder)})
        if (earlier := _finished(config)) is not None:
            caller.say(f"{folder}: finished at step {len(earlier.metrics)}; name another output= to train again")
            return earlier
        return _run(config, caller, _checkpoint_of(config, caller))


def _run(config: Config, caller: Caller, found: Found | None) -> Run:
    saved = found.checkpoint.step if found else None
    try:
        prepared = prepare(_settled(config, found), caller, found)
        with hardware.within_memory(partial(_too_large, prepared)):
            loading = time.perf_counter()
            state = _load(prepared, caller)
            loading = time.perf_counter() - loading
        hardware.keep_freed_memory()
        with hardware.within_memory(partial(_too_long, prepared, state)):
            compiling.begin(state, prepared.loader, prepared.checked.loss, caller.say)
            if prepared.expected is None or not prepared.expected.is_safe:
                rehearse(state, forecast.largest(prepared.loader)[0], prepared.checked.loss)
        earlier = _write_beginnings(prepared, caller)
        with caller.signals.deferred():
            with hardware.within_memory(partial(_too_long, prepared, state)):
                metrics, unsaved = _train(prepared, state, earlier, caller, loading)
            saved = None if unsaved or config.checkpoint.every is None else state.step
            with caller.signals.at_once():
                _finish(prepared, state, caller)
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


def _checkpoint_of(config: Config, caller: Caller) -> Found | None:
    """The checkpoint to go on from; what earlier starts left half written is removed."""
    for each in (Path(str(config.output)), Path(str(config.output)) / "checkpoints"):
        files.sweep(each)
    folder = _earlier_run(config)
    if folder is None:
        return None
    found = checkpoint.find(folder / "checkpoints", config.resume)
    for note in found.notes if found else ():
        caller.say(note)
    return found


def _settled(config: Config, found: Found | None) -> Config:
    """The configuration with the `auto`s that the run began with."""
    if found is None:
        return config
    values = resume.settled(config.model_dump(mode="json"), found.checkpoint.values["inputs"]["config"])
    return configuration.make(values)


def prepare(config: Config, caller: Caller, found: Found | None = None) -> Prepared:
    """Checks, reads, encodes and plans, without loading the model."""
    checked = check(config, caller)
    row_encoder = checked.encoder()
    data = encode(config, checked, row_encoder, caller)
    if caller.helpers:
        caller.helpers.stop()
    for line in _described(checked, data):
        caller.say(line)
    stop_unless_trainable(config, checked, data)
    batchings = _batchings(config, found)
    fit = fitted(config, checked, data, plan(config, checked, data, batchings), caller)
    expected = forecast.forecast(fit, checked.machine.device, rates.saved(checked.machine.device))
    if expected is not None:
        caller.say(f"expected: {expected}")
    checked = replace(checked, machine=replace(checked.machine, microbatch_tokens=fit.planned.microbatch_tokens))
    resolved = _resolved(config, checked)
    prepared = Prepared(
        config=resolved,
        checked=checked,
        row_encoder=row_encoder,
        data=data,
        loader=fit.planned,
        checkpointing=fit.checkpointing,
        expected=expected,
        rows=Rows.of(data.train),
        inputs=_inputs(resolved, checked, data),
        batchings=batchings,
        found=found,
    )
    if found is not None:
        _compare(prepared, found, caller)
    return prepared


def _compare(prepared: Prepared, found: Found, caller: Caller) -> None:
    """Says what changed since the checkpoint; raises Problems where the run cannot go on with it."""
    step, stored = found.checkpoint.step, found.checkpoint.tensors["rows"]
    before = Inputs(**found.checkpoint.values["inputs"])
    sources = found.checkpoint.values["cursor"]["sources"]
    rows = Rows(tuple(sources), *(stored[name].numpy() for name in ("digest", "line", "source")))
    changes = resume.compare(step, before, prepared.inputs_until(step), rows, prepared.rows)
    if changes.refused:
        folder = prepared.checked.folder
        heading = f"{folder}: not what was trained until step {step}; put it back, or train anew with another output=:"
        raise Problems(heading, changes.refused)
    for change in changes.applied:
        caller.say(f"since step {step}: {change}")
    caller.say(f"resumed step {step} of {prepared.loader.steps} (verified {found.files} files)")


def _inputs(config: Config, checked: Checked, data: Dataset) -> Inputs:
    """What the run is trained on; the plan is that of no step yet."""
    hf = checked.tokenizer.hf
    return Inputs(
        config=redacted_json(config.model_dump(mode="json")),
        model=resume.fingerprint(models.folder(checked.base)),
        tokenizer=resume.digest(hf.backend_tokenizer.to_str(), *map(str, sorted(hf.special_tokens_map.items()))),
        template=resume.digest(checked.chosen.source) if checked.is_chat else "",
        held_out=resume.digest(*map(str, Rows.of(data.held_out).digest.tolist())),
        ledger=resume.digest(*(json.dumps(source.as_json(), sort_keys=True) for source in data.ledgers)),
        plan="",
        versions=manifest.versions(),
        processes=1,
    )


def _batchings(config: Config, found: Found | None) -> tuple[tuple[int, Batching], ...]:
    """What cuts steps, and from which step on: as in the checkpoint, and from there on as it is asked for."""
    asked = Batching(config.batch.examples, config.batch.tokens)
    if found is None:
        return ((0, asked),)
    earlier = tuple((since, Batching(**each)) for since, each in found.checkpoint.values["cursor"]["batchings"])
    return earlier if earlier[-1][1] == asked else (*earlier, (found.checkpoint.step, asked))


def check(config: Config, caller: Caller, needs_weights: bool = True) -> Checked:
    """Every check that needs no weights; what is wrong comes in one error."""
    (base, tokenizer), loss, machine, prompts, _, folder, *rows = preflight.collect(
        [
            lambda: (models.inspect(config.model, needs_weights), edge.load(config.model)),
            lambda: registry.load("loss", config.loss.name, "loss.name"),
            lambda: hardware.resolve(config.device, config.precision, config.microbatch_tokens),
            lambda: evaluate.parse_prompts(config.evaluate.prompts, "evaluate.prompts"),
            lambda: evaluate.settings(config.evaluate.generate),
            lambda: preflight.output_folder(config.output, may_go_on=config.resume != "never"),
            *(partial(_read, sources, caller) for sources in _sources(config, caller)),
        ]
    )
    reading = _reading(config, base, tokenizer, *rows)
    prompts = tuple(_as_user(prompt) for prompt in prompts) if reading.is_chat else prompts
    return Checked(**vars(reading), base=base, loss=loss, machine=machine, prompts=prompts, folder=folder)


def read(config: Config, caller: Caller) -> Reading:
    """The part of `check` that showing rows needs: of a large source only the beginning, of the model a tokenizer."""
    (base, tokenizer), *rows = preflight.collect(
        [
            lambda: (_base_if_any(config.model), edge.load(config.model)),
            *(partial(dataset.glance, sources, way(caller)) for sources in _sources(config, caller)),
        ]
    )
    return _reading(config, base, tokenizer, *rows)


def _base_if_any(path: str) -> Base | None:
    folder = Path(path).expanduser()
    is_tokenizer_alone = folder.is_dir() and not (folder / "config.json").is_file()
    return None if is_tokenizer_alone else models.inspect(path, needs_weights=False)


def _reading(
    config: Config,
    base: Base | None,
    tokenizer: Tokenizer,
    train: list[tuple[Named, Survey]],
    held_out: list[tuple[Named, Survey]],
) -> Reading:
    chosen, length = preflight.collect(
        [
            lambda: choose(config.template, tokenizer.chat_template, tokenizer.puts_bos, tokenizer.special_tokens),
            lambda: preflight.max_length(config.max_length, base.max_positions if base else None),
        ]
    )
    rules = Rules(config.reasoning, config.data.learn_reasoning, config.data.learn_tool_calls)
    policy = Policy(
        length,
        config.data.train_on,
        config.data.render,
        config.overflow,
        config.truncation_side,
        rules,
        config.template_kwargs,
    )
    is_chat = _is_chat(policy, train)
    return Reading(
        tokenizer=tokenizer.with_template(chosen.source) if is_chat and not chosen.is_own else tokenizer,
        chosen=chosen,
        policy=policy,
        is_chat=is_chat,
        stop_ids=base.stop_ids if base else (),
        train=train,
        held_out=held_out,
    )


def plan(
    config: Config, checked: Checked, data: Dataset, batchings: Sequence[tuple[int, Batching]] | None = None
) -> Loader:
    """Which example stands in which step, for the whole run."""
    return loader.make(
        data.train,
        batchings or _batchings(config, None),
        epochs=config.epochs,
        seed=config.seed,
        microbatch_tokens=checked.machine.microbatch_tokens,
        normalize=config.loss.normalize,
        limit=config.steps,
    )


def fitted(config: Config, checked: Checked, data: Dataset, planned: Loader, caller: Caller) -> Fit:
    """The plan with micro-batches that fit in memory, and what the largest of them takes.

    It is kept where rows are, unless the loss is a user's: what its code does may change without a sign.
    """
    is_auto = config.microbatch_tokens == "auto"
    make = partial(forecast.fit, planned, checked.base, checked.loss, checked.machine, is_auto)
    if ":" in config.loss.name or not all(survey.content for _, survey in checked.train):
        return make()
    model = (models.folder(checked.base) / "config.json").read_text(encoding="utf-8")
    key = fits.key(planned, data.train, checked.machine, model, config.loss.name, str(is_auto))
    return fits.kept(Cache(cache.root(), caller.say), key, planned, make)


def _is_chat(policy: Policy, understood: Sequence[tuple[Named, Survey]]) -> bool:
    """Whether the training rows go through the chat template."""
    if policy.render != "auto":
        return policy.render == "chat"
    return any(survey.first is not None and survey.first.kind == "chat" for _, survey in understood)


def _as_user(prompt: Prompt) -> Prompt:
    """A text prompt as the user's message: a model that was trained on chats is asked in a chat."""
    if not isinstance(prompt.prompt, str):
        return prompt
    return replace(prompt, prompt=[{"role": "user", "content": prompt.prompt}])


def _sources(config: Config, caller: Caller) -> tuple[list[Named], list[Named]]:
    held_out = config.data.eval if isinstance(config.data.eval, tuple) else ()
    train_sources = [dataset.named(source, "train") for source in config.data.train]
    if caller.samples is not None:
        train_sources = [Named("samples", rows=tuple(caller.samples))]
    return train_sources, [dataset.named(source, "test") for source in held_out]


def _read(sources: Sequence[Named], caller: Caller) -> list[tuple[Named, Survey]]:
    """Reads sources from beginning to end."""
    with _progress(caller, "reading", None) as advance:
        return dataset.understand(sources, way(caller, advance))


def way(caller: Caller, advance: Advance = lambda rows: None) -> Way:
    """Whatever is made of rows is kept in the user's cache."""
    return Way(Cache(cache.root(), caller.say), helpers=caller.helpers, advance=advance)


def encode(config: Config, checked: Checked, row_encoder: RowEncoder, caller: Caller) -> Dataset:
    """Every row's tokens and fate.

    Raises Problems where rows of a large source cannot be read, before any is encoded: of a small one they are told
    together with those that its template refuses.
    """
    _stop_if_many_cannot_be_read(config, checked)
    share = config.data.eval if isinstance(config.data.eval, float) else 0.0
    rows = sum(survey.rows for _, survey in checked.train + checked.held_out)
    with _progress(caller, "encoding", rows) as advance:
        return dataset.encode_sources(
            checked.train,
            row_encoder,
            held_out=checked.held_out,
            share=share,
            seed=config.seed,
            way=way(caller, advance),
        )


def _stop_if_many_cannot_be_read(config: Config, reading: Reading) -> None:
    surveys = [survey for _, survey in reading.train + reading.held_out]
    rows, refused = sum(survey.rows for survey in surveys), sum(survey.refused_rows for survey in surveys)
    if rows > SOON_ENCODED and refused > config.data.allow_refused:
        named = [problem for survey in surveys for problem in survey.refused]
        heading = f"{refused} of {rows} rows cannot be read, and none was encoded (data.allow_refused={refused} does):"
        raise Problems(heading, named, refused - len(named))


@contextmanager
def _progress(caller: Caller, what: str, total: int | None) -> Iterator[Advance]:
    """A bar that counts rows, where there is a terminal."""
    with Progress(console=caller.console, transient=True, disable=not caller.console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda rows: progress.advance(task, rows)


def _described(checked: Checked, data: Dataset) -> list[str]:
    """What a user should know of the rows before training."""
    lines = [f"template: {checked.chosen.where}"] if checked.is_chat else []
    for source in data.ledgers:
        fates = ", ".join(f"{count} {fate}" for fate, count in source.fates.items() if count)
        share = source.target_tokens / max(1, source.tokens)
        lines.append(
            f"{source.source}: {source.shape}, {source.rows} rows ({fates}), {source.tokens} tokens, "
            f"{share:.0%} learnt, longest {source.longest}"
        )
        lines += [f"  {finding}" for finding in ledger.findings([source])]
    return lines


def stop_unless_trainable(config: Config, checked: Checked, data: Dataset) -> None:
    """Raises Problems where more rows are refused than is allowed, none is left, or the model lacks their tokens."""
    refused = ledger.met(data.ledgers, Fate.REFUSED)
    if refused > config.data.allow_refused:
        _stop(data, Fate.REFUSED, f"{refused} rows are refused (data.allow_refused={refused} trains without them):")
    too_long = ledger.met(data.ledgers, Fate.TOO_LONG)
    if too_long and config.overflow == "error":
        _stop(data, Fate.TOO_LONG, f"{too_long} rows are too long (overflow: error):")
    if not data.train:
        lost = [problem for fate in Fate for problem in ledger.named(data.ledgers, fate)]
        raise Problems("no row is left to train on:", lost or [Problem("data.train", "no rows")])
    if config.checkpoint.keep_best and not data.held_out:
        raise InputError(
            "checkpoint.keep_best: the best is found by held-out loss, and no row is held out; set data.eval"
        )
    if len(checked.tokenizer.hf) > checked.base.vocab_size:
        _stop_if_unknown_to_the_model(checked, data)


def _stop(data: Dataset, fate: Fate, heading: str) -> NoReturn:
    """Raises Problems with the first rows that met a fate."""
    named = ledger.named(data.ledgers, fate)
    raise Problems(heading, named, ledger.met(data.ledgers, fate) - len(named))


def _stop_if_unknown_to_the_model(checked: Checked, data: Dataset) -> None:
    """Raises Problems where rows have tokens that the model has no embedding for: a tokenizer of another model."""
    size = checked.base.vocab_size
    largest = (data.train + data.held_out).past(size)
    if largest:
        text, fix = checked.tokenizer.hf.convert_ids_to_tokens, "tokenizer and model must belong together"
        problems = [
            Problem(str(row), f"token {index} ({text(index)!r}) is past the model's {size}", fix)
            for row, index in largest.items()
        ]
        raise Problems(f"{len(largest)} rows have tokens that the model does not know:", problems)


def _write_beginnings(prepared: Prepared, caller: Caller) -> list[Mapping[str, Any]]:
    """The run folder with what is known before the next step: config.yaml, manifest.json, ledger.json.

    Nothing in it is then of a later step than the checkpoint; returns the metrics of the earlier ones.
    """
    checked, config = prepared.checked, prepared.config
    preflight.make_folder(checked.folder)
    step = prepared.found.checkpoint.step if prepared.found else -1
    for note in checkpoint.set_aside(checked.folder / "checkpoints", step):
        caller.say(note)
    earlier = jsonl.cut(checked.folder / "metrics.jsonl", step)
    for name in ("eval", "samples"):
        jsonl.cut(checked.folder / f"{name}.jsonl", step if _is_evaluated(prepared) else step - 1)
    files.write_text(checked.folder / "config.yaml", redacted(configuration.as_yaml(config)))
    files.write_json(checked.folder / "ledger.json", [source.as_json() for source in prepared.data.ledgers])
    described = manifest.collect(
        seed=config.seed,
        device=checked.machine.device.type,
        dtype=_name(checked.machine.dtype),
        data={
            name: digest for _, survey in checked.train + checked.held_out for name, digest in survey.content.items()
        },
        tokenizer_json=checked.tokenizer.hf.backend_tokenizer.to_str(),
    )
    files.write_json(checked.folder / "manifest.json", described)
    return [*earlier]


def _resolved(config: Config, checked: Checked) -> Config:
    """The configuration with every `auto` settled."""
    return config.model_copy(
        update={
            "output": str(checked.folder),
            "max_length": checked.policy.max_length,
            "microbatch_tokens": checked.machine.microbatch_tokens,
            "device": checked.machine.device.type,
            "precision": "bf16" if checked.machine.dtype == torch.bfloat16 else "fp32",
        }
    )


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


def _load(prepared: Prepared, caller: Caller) -> TrainState:
    checked = prepared.checked
    state, note = assemble(prepared.config, checked.base, checked.machine)
    state.learner = replace(state.learner, checkpointing=prepared.checkpointing)
    if note:
        caller.say(note)
    parameters = sum(parameter.numel() for parameter in state.optimizer.parameters.values())
    dtype = _name(checked.machine.dtype)
    caller.say(
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
    is_half = base.dtype == _name(machine.dtype) == "bfloat16"
    return torch.bfloat16 if is_half else torch.float32


def _train(
    prepared: Prepared, state: TrainState, earlier: Sequence[Mapping[str, Any]], caller: Caller, loading: float
) -> tuple[list[Mapping[str, Any]], DiskError | None]:
    """The loop. What happens between two steps is written here, as statements.

    Returns the metrics, with those of `earlier` starts, and what was wrong with the last save.

    loading  seconds that the model took to load
    """
    config, planned, folder = prepared.config, prepared.loader, prepared.checked.folder
    logs = Logs.of(folder)
    keep = Keep(config.checkpoint.keep, config.checkpoint.keep_best, config.checkpoint.keep_every)
    saver = Saver(folder / "checkpoints", config.checkpoint.every, keep, caller.say, newest=state.step)
    multiplier = partial(
        factor, config.schedule.name, total=planned.steps, warmup=config.schedule.warmup, decay=config.schedule.decay
    )
    lines = list(earlier)
    is_evaluated, random = _is_evaluated(prepared), random_state()
    with saver, display.steps(caller.console, planned.steps) as shown:
        try:
            if not is_evaluated:
                with caller.signals.at_once():
                    _evaluate(prepared, state, logs, caller)
                is_evaluated = True
            for record in train_steps(
                state,
                planned,
                prepared.checked.loss,
                clip=config.optimizer.clip,
                factor=multiplier,
                poll=caller.signals.check,
            ):
                if not record.is_finite:
                    _skip_or_stop(prepared, state, record, caller)
                logs.metrics.write(asdict(record))
                lines.append(asdict(record))
                shown.show(record)
                if len(lines) == len(earlier) + 1:
                    seconds = time.perf_counter() - caller.began
                    caller.say(f"first step after {seconds:.1f} s ({loading:.1f} s of it loading the model)")
                is_due, loss = saver.is_due(record.step, planned.steps), None
                if _is_due(config, record, planned.steps) or (is_due and config.checkpoint.keep_best):
                    is_evaluated, random = False, random_state()
                    with caller.signals.at_once():
                        loss = _evaluate(prepared, state, logs, caller)
                    is_evaluated = True
                if is_due:
                    saver.begin(_checkpoint(prepared, state, is_evaluated, loss), logs.flush)
                caller.signals.check()
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


def _skip_or_stop(prepared: Prepared, state: TrainState, record: StepRecord, caller: Caller) -> None:
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
    caller.say(f"{told}; skipped ({state.skipped + 1} of {most} at most)")
    state.skip()


def _is_due(config: Config, record: StepRecord, total: int) -> bool:
    """Evaluation comes every so many steps and after the last one."""
    every = config.evaluate.every
    return record.step == total or (every is not None and record.step % every == 0)


def _evaluate(prepared: Prepared, state: TrainState, logs: Logs, caller: Caller) -> float | None:
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
        caller.metric_fn,
    )
    for row in samples.rows:
        logs.samples.write({"step": state.step, **asdict(row)})
    found |= samples.means
    if found:
        logs.eval.write({"step": state.step, **found})
    if found or samples.rows:
        caller.say(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    for row in samples.rows[:SHOWN_SAMPLES]:
        caller.say(f"  {row.prompt!r} -> {row.output!r}")
    return found.get("loss")


def _finish(prepared: Prepared, state: TrainState, caller: Caller) -> None:
    """The export, compared with what is in memory before it is called done, and the report."""
    checked, model, tokenizer = prepared.checked, state.learner.model, prepared.checked.tokenizer.hf
    folder = checked.folder / "final"
    masters, stop_ids = _masters(prepared, state), _stop_ids(prepared)
    if not folder.exists():  # else an earlier start was stopped after it was put in place
        export.export(
            model,
            tokenizer,
            folder,
            dtype=getattr(torch, checked.base.dtype),
            stop_ids=stop_ids,
            chat_template=None,
            card=_card(prepared),
            weights=masters,
            processor=towers.processor_files(checked.base.path),
        )
    try:
        check = export.verify(
            folder,
            model,
            tokenizer,
            [example[0].tokens.tolist() for example in prepared.data.train[:EXPORT_ROWS]],
            _first_chat(prepared),
            weights=masters,
            stop_ids=stop_ids,
        )
    except ExportError:
        files.remove(folder)
        raise
    report.write(checked.folder)
    caller.say(
        f"{folder}: {check.dtype}, reloaded by plain transformers and compared: {check.tensors} tensors equal, "
        f"logits within {check.largest_error:.1e}, {check.texts} texts encoded alike"
    )


def _masters(prepared: Prepared, state: TrainState) -> Mapping[str, torch.Tensor] | None:
    """The fp32 weights to export; None where the model's own already have the dtype that is saved."""
    is_saved_as_is = prepared.checked.base.dtype == _name(prepared.checked.machine.dtype)
    return None if is_saved_as_is else state.optimizer.masters


def _stop_ids(prepared: Prepared) -> list[int]:
    """The ids of the marks that ended learnt turns, as far as they are single tokens, and EOS where text was learnt."""
    tokenizer, marks = prepared.checked.tokenizer, prepared.data.marks
    ids = [tokenizer.special_tokens[mark] for mark in sorted(marks) if mark in tokenizer.special_tokens]
    eos = [] if marks or tokenizer.eos_id is None else [tokenizer.eos_id]
    return list(dict.fromkeys([*ids, *eos]))


def _first_chat(prepared: Prepared) -> list[dict[str, str]] | None:
    """The messages of the first chat that is trained, for comparing templates."""
    if not prepared.checked.is_chat:
        return None
    conversation = prepared.checked.train[0][1].first
    messages = as_chat(conversation.messages) if conversation else []
    return [{"role": message.role, "content": message.content} for message in messages]


def _card(prepared: Prepared) -> str:
    config, data = prepared.config, prepared.data
    return export.model_card(
        {
            "name": prepared.checked.folder.name,
            "base_model": redacted(config.model),
            "data": [{"path": source.source, "rows": source.rows} for source in data.ledgers],
            "tokens": sum(source.tokens for source in data.ledgers),
            "target_tokens": sum(source.target_tokens for source in data.ledgers),
            "hyperparameters": {
                "optimizer": config.optimizer.name,
                "learning rate": config.optimizer.lr,
                "schedule": config.schedule.name,
                "epochs": config.epochs,
                "steps": prepared.loader.steps,
                "batch": config.batch.model_dump(exclude_none=True),
                "max_length": prepared.checked.policy.max_length,
                "seed": config.seed,
            },
            "versions": manifest.versions(),
        }
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
