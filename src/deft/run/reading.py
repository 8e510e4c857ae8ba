"""Configuration -> rows that are understood and a model that is known: every check that needs no weights, at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from deft.core import hardware
from deft.core.errors import InputError, Problem, Problems
from deft.core.hardware import Machine
from deft.core.signals import Signals
from deft.core.types import Objective
from deft.data.format import Choices
from deft.data.shapes import Survey
from deft.dataset import cache, examples, survey
from deft.dataset.cache import Cache
from deft.dataset.config import SourceConfig
from deft.dataset.source import SourceSpec
from deft.dataset.survey import Advance, Execution
from deft.encoding import tokenizer as edge
from deft.encoding.render.chat import AnswerRules
from deft.encoding.render.template import Chosen, choose
from deft.encoding.rows import Policy, RowEncoder
from deft.encoding.tokenizer import Tokenizer
from deft.evaluation import prompts
from deft.evaluation import samples as evaluate
from deft.evaluation.prompts import Prompt
from deft.evaluation.samples import MetricFn
from deft.model import load as models
from deft.model.load import Base
from deft.model.trainable import ALL, Trainable
from deft.run.config import Config
from deft.run.folder import output_folder
from deft.tracking import console as display
from deft.training import objectives as losses
from deft.training import optimizers


@dataclass(frozen=True)
class Session:
    """What a run has beside its configuration: rows in memory, a metric function, where it reports to, what may end it.

    signals       no signal ends the run unless the command line handles them
    began         time.perf_counter() when the run was asked for
    owns_process  whether the run may change settings of the whole process that stay after it
    """

    samples: Sequence[Any] | None = None
    metric_fn: MetricFn | None = None
    console: Console = field(default_factory=display.of_run)
    signals: Signals = field(default_factory=Signals)
    began: float = field(default_factory=time.perf_counter)
    owns_process: bool = False

    def say(self, *lines: str) -> None:
        """Lines on the console; nothing for those that are empty."""
        for line in filter(None, lines):
            display.say(self.console, line)


@dataclass(frozen=True)
class Reading:
    """The rows, understood, and how they become tokens."""

    tokenizer: Tokenizer
    chosen: Chosen
    policy: Policy
    is_chat: bool
    stop_ids: tuple[int, ...]
    train: list[tuple[SourceSpec, Survey]]
    held_out: list[tuple[SourceSpec, Survey]]

    def encoder(self) -> RowEncoder:
        return examples.encoder(self.tokenizer, self.chosen, self.policy, self.stop_ids)


@dataclass(frozen=True)
class Checked(Reading):
    """What is known once nothing in the input is wrong."""

    base: Base
    trainable: Trainable
    objective: Objective
    machine: Machine
    prompts: tuple[Prompt, ...]
    folder: Path


def collect(checks: Iterable[Callable[[], Any]]) -> list[Any]:
    """The results of all checks in order; what they object to comes in one error.

    >>> collect([lambda: 1, lambda: 2])
    [1, 2]
    """
    results: list[Any] = []
    problems: list[Problem] = []
    more = 0
    for check in checks:
        try:
            results.append(check())
        except Problems as error:
            problems += error.problems
            more += error.more
        except InputError as error:
            where, _, what = str(error).partition(": ")
            problems.append(Problem(where, what))
    if problems:
        raise Problems("this run cannot start:", problems, more)
    return results


def check(config: Config, session: Session, needs_weights: bool = True) -> Checked:
    """Every check that needs no weights; what is wrong comes in one error."""
    (base, tokenizer), objective, _, machine, asked, _, folder, *rows = collect(
        [
            lambda: (models.inspect(config.model, needs_weights), edge.load(config.model)),
            lambda: losses.load(config.loss.name, config.loss.options),
            lambda: optimizers.check(config.optimizer),
            lambda: hardware.resolve(config.device, config.precision, config.microbatch_tokens),
            lambda: prompts.load(config.evaluate.prompts, "evaluate.prompts"),
            lambda: evaluate.settings(config.evaluate.generate),
            lambda: output_folder(config.output, may_go_on=config.resume != "never"),
            *(partial(_read, sources, session) for sources in _sources(config, session)),
        ]
    )
    trainable = Trainable(config.adapter, config.freeze)
    if trainable != ALL:
        models.summarise(base, trainable)  # what does not fit the model is refused here
    reading = _reading(config, base, tokenizer, *rows)
    asked = tuple(_as_user(prompt) for prompt in asked) if reading.is_chat else asked
    return Checked(
        **vars(reading),
        base=base,
        trainable=trainable,
        objective=objective,
        machine=machine,
        prompts=asked,
        folder=folder,
    )


def read(config: Config, session: Session) -> Reading:
    """The part of `check` that showing rows needs: of a large source only the beginning, of the model a tokenizer."""
    (base, tokenizer), *rows = collect(
        [
            lambda: (_base_if_any(config.model), edge.load(config.model)),
            *(partial(survey.glance, sources, execution(session)) for sources in _sources(config, session)),
        ]
    )
    return _reading(config, base, tokenizer, *rows)


def execution(session: Session, advance: Advance = lambda rows: None) -> Execution:
    """Whatever is made of rows is kept in the user's cache."""
    return Execution(Cache(cache.root(), session.say), advance=advance)


def _read(sources: Sequence[SourceSpec], session: Session) -> list[tuple[SourceSpec, Survey]]:
    """Reads sources from beginning to end."""
    with display.counting(session.console, "reading") as advance:
        return survey.understand(sources, execution(session, advance))


def _sources(config: Config, session: Session) -> tuple[list[SourceSpec], list[SourceSpec]]:
    held_out = config.data.eval if isinstance(config.data.eval, tuple) else ()
    train_sources = [source_spec(source, "train") for source in config.data.train]
    if session.samples is not None:
        train_sources = [SourceSpec("samples", rows=tuple(session.samples))]
    return train_sources, [source_spec(source, "test") for source in held_out]


def source_spec(source: SourceConfig, split: str) -> SourceSpec:
    """A source of the configuration. `split` is read where it names none: train or test."""
    return SourceSpec(
        source.path,
        source.format,
        subset=source.subset,
        choices=Choices(
            source.columns, source.answers, source.control, source.split or split, source.split is not None
        ),
        times=source.times,
        loss_weight=source.loss_weight,
        max_rows=source.max_rows,
    )


def _reading(
    config: Config,
    base: Base | None,
    tokenizer: Tokenizer,
    train: list[tuple[SourceSpec, Survey]],
    held_out: list[tuple[SourceSpec, Survey]],
) -> Reading:
    chosen, length = collect(
        [
            lambda: choose(config.template, tokenizer.chat_template, tokenizer.puts_bos, tokenizer.special_tokens),
            lambda: max_length(config.max_length, base.max_positions if base else None),
        ]
    )
    rules = AnswerRules(config.reasoning, config.data.learn_reasoning, config.data.learn_tool_calls)
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


def _base_if_any(path: str) -> Base | None:
    folder = Path(path).expanduser()
    is_tokenizer_alone = folder.is_dir() and not (folder / "config.json").is_file()
    return None if is_tokenizer_alone else models.inspect(path, needs_weights=False)


def _is_chat(policy: Policy, understood: Sequence[tuple[SourceSpec, Survey]]) -> bool:
    """Whether the training rows go through the chat template."""
    if policy.render != "auto":
        return policy.render == "chat"
    return any(survey.first is not None and survey.first.kind == "chat" for _, survey in understood)


def _as_user(prompt: Prompt) -> Prompt:
    """A text prompt as the user's message: a model that was trained on chats is asked in a chat."""
    if not isinstance(prompt.prompt, str):
        return prompt
    return replace(prompt, prompt=[{"role": "user", "content": prompt.prompt}])


def max_length(setting: int | None, positions: int | None) -> int:
    """The longest example: what was asked for, else 2048 or what the model can take.

    >>> max_length(None, 512), max_length(None, None)
    (512, 2048)
    """
    if setting is None:
        return min(2048, positions or 2048)
    if positions is not None and setting > positions:
        raise InputError(f"max_length: {setting} is more than the model's {positions} positions; at most {positions}")
    return setting
