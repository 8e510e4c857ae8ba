"""Configuration -> rows that are understood and a model that is known: every check that needs no weights, at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from deft.core import files, hardware
from deft.core.errors import InputError, collect
from deft.core.hardware import Machine
from deft.core.signals import Signals
from deft.core.types import Kind, Objective
from deft.data.format import Choices
from deft.data.shapes import Survey
from deft.dataset import cache, examples, survey
from deft.dataset.cache import Cache
from deft.dataset.config import SourceConfig
from deft.dataset.source import SourceSpec
from deft.dataset.survey import Advance, Execution
from deft.distributed.world import World
from deft.encoding import tokenizer as edge
from deft.encoding.render.chat import AnswerRules
from deft.encoding.render.template import NOW, Chosen
from deft.encoding.rows import Policy, Render, RowEncoder
from deft.encoding.tokenizer import Tokenizer
from deft.evaluation import generate, prompts
from deft.evaluation import samples as evaluate
from deft.evaluation.prompt_form import PromptForm
from deft.evaluation.prompts import Prompt
from deft.evaluation.samples import MetricFn
from deft.model import load as models
from deft.model import merging, vocabulary
from deft.model.load import Base
from deft.model.trainable import ALL, Trainable
from deft.run import resume, spread
from deft.run.config import Config
from deft.run.folder import FOLDERS, output_folder
from deft.tracking import console as display
from deft.training import objectives as losses
from deft.training import optimizers
from deft.training.masters import rates_of


@dataclass(frozen=True)
class Session:
    """What a run has beside its configuration: rows in memory, a metric function, where it reports to, what may end it.

    rows          those in memory, by the name of their source in the configuration
    signals       no signal ends the run unless the command line handles them
    began         time.perf_counter() when the run was asked for
    owns_process  whether the run may change settings of the whole process that stay after it
    world         the ranks that compute the run
    memory        bytes that each of them may use, the least of all; 0 is what this one may
    """

    rows: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    metric_fn: MetricFn | None = None
    console: Console = field(default_factory=display.of_run)
    signals: Signals = field(default_factory=Signals)
    began: float = field(default_factory=time.perf_counter)
    owns_process: bool = False
    world: World = field(default_factory=World)
    memory: int = 0

    def within(self, world: World) -> Session:
        """The session of one of several ranks: rank 0 alone speaks."""
        return replace(self, world=world, console=self.console if world.is_first else Console(quiet=True))

    def say(self, *lines: str) -> None:
        """Lines on the console, of other ranks than the first in their logs; nothing for those that are empty."""
        for line in filter(None, lines):
            if self.world.is_first:
                display.say(self.console, line)
            else:
                self.world.log(line)


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

    @property
    def form(self) -> PromptForm:
        """How the model is asked, so that it is shown what rows become."""
        return PromptForm(self.is_chat, self.policy.template_kwargs)

    def texts(self) -> list[str]:
        """Which text rows become, a line each: chats by a template, and strings where there is one that they leave out.

        What a turn of plain text is nobody knows, so that `render: chat` leaves it as it is as well.
        """
        kinds = {source.path: survey.first.kind for source, survey in self.train if survey.first is not None}
        raw = [path for path, kind in kinds.items() if _is_raw(kind, self.policy.render)]
        lines = [self.chosen.where] if self.is_chat else []
        if self.is_chat and "strftime_now" in self.chosen.source:
            lines.append(f"it reads the date, and is told {NOW:%Y-%m-%d}, so that the same rows are the same tokens")
        if raw and (self.is_chat or self.tokenizer.chat_template is not None):
            which = f"not used for {', '.join(raw)}: learnt" if self.is_chat else "not used: rows are learnt"
            can_be_chat = self.policy.render == "auto" and any(kinds[path] == "dialogue" for path in raw)
            lines.append(f"{which} as raw text" + ("; data.render=chat puts them in it" if can_be_chat else ""))
        return lines

    def encoder(self) -> RowEncoder:
        return examples.encoder(self.tokenizer, self.chosen, self.policy, self.stop_ids)


@dataclass(frozen=True)
class Checked(Reading):
    """What is known once nothing in the input is wrong.

    shard  how many ranks share one copy of the model
    """

    base: Base
    trainable: Trainable
    objective: Objective
    shard: int
    machine: Machine
    prompts: tuple[Prompt, ...]
    folder: Path

    def files(self) -> dict[str, str]:
        """A digest of each data file by its name."""
        return {name: digest for _, survey in self.train + self.held_out for name, digest in survey.content.items()}


CANNOT_START = "this run cannot start:"


def check(config: Config, session: Session, needs_weights: bool = True) -> Checked:
    """Every check that needs no weights; what is wrong comes in one error."""
    (base, tokenizer), objective, _, shard, machine, asked, _, _, _, folder, *rows = collect(
        CANNOT_START,
        [
            lambda: _base_and_tokenizer(config, needs_weights),
            lambda: losses.load(config.loss.name, config.loss.options),
            lambda: optimizers.check(config.optimizer),
            lambda: spread.ranks(config, session.world),
            lambda: hardware.resolve(config.device, config.precision, config.microbatch_tokens),
            lambda: prompts.load(config.evaluate.prompts, "evaluate.prompts"),
            lambda: evaluate.settings(config.evaluate.generate),
            lambda: _stop_at_links(config.model),
            lambda: _stop_in_output(config),
            lambda: output_folder(config.output, may_go_on=config.resume != "never"),
            *(partial(_read, sources, session) for sources in _sources(config, session)),
        ],
    )
    if needs_weights:
        for each in (config.model, config.merge, config.adapter and config.adapter.start):
            if each:
                files.verify_model(Path(each).expanduser())
    reading = of(config, base, tokenizer, *rows)
    session.say(*_unread(rows), *_new_tokens(config, base, tokenizer))
    base = replace(base, vocab_size=vocabulary.size_with(tokenizer.new_ids, base.vocab_size))
    _stop_if_unaskable(reading, asked, base.vocab_size)
    return Checked(
        **vars(reading),
        base=base,
        trainable=Trainable(config.adapter, config.freeze, tokenizer.new_ids, config.quantize),
        objective=objective,
        shard=shard,
        machine=machine,
        prompts=asked,
        folder=folder,
    )


def _base_and_tokenizer(config: Config, needs_weights: bool) -> tuple[Base, Tokenizer]:
    """Raises InputError as `inspect` and `load` do, and where what is said of the model's parts does not fit it."""
    base = models.inspect(config.model, needs_weights)
    tokenizer = edge.load(config.model, config.data.add_tokens)
    _stop_if_other_base(config, base)
    trainable = Trainable(config.adapter, config.freeze, tokenizer.new_ids, config.quantize)
    if trainable != ALL or config.optimizer.rates:
        model, _ = models.skeleton(base, trainable)
        trained = [name for name, each in model.named_parameters() if each.requires_grad]
        rates_of(trained, config.optimizer.rates)
    return base, tokenizer


def _stop_if_other_base(config: Config, base: Base) -> None:
    """InputError for an adapter that cannot be merged, or that deft has trained on another base."""
    if config.merge is not None:
        merging.check(Path(config.merge))
    own = models.folder(base)
    for given in (config.merge, config.adapter and config.adapter.start):
        about = files.about(Path(given)) if given else {}
        recorded, quantized = about.get("base"), about.get("quantize", config.quantize)
        if recorded and any(own.glob("*.safetensors")) and recorded != resume.fingerprint(own):
            what = f"was trained on another base than {base.path}, by the digest of its files"
            raise InputError(f"{given}: {what}; name its own with model=")
        if quantized != config.quantize:
            fix = f"give quantize={quantized}, or name the final/ of its run as model"
            raise InputError(f"{given}: was trained over a base in {quantized}, not {config.quantize}; {fix}")


def _stop_in_output(config: Config) -> None:
    """InputError where a run begins with what it would set aside itself."""
    folder = Path(config.output).expanduser().resolve() if config.output else None
    for given in (config.model, config.merge, config.adapter and config.adapter.start):
        place = Path(given or "").expanduser().resolve()
        if folder and given and any(place.is_relative_to(folder / name) for name in FOLDERS):
            what = f"{given} lies where this run would write its own"
            raise InputError(f"output: {what}; name another output=")


def _stop_at_links(model: str) -> None:
    """InputError where a file of a model folder is a link to something outside of it, which would be carried on."""
    link = files.link_outside(Path(model).expanduser())
    if link is not None:
        what = "is a link that leads out of the model's folder, and what it leads to could be carried into final/"
        raise InputError(f"{link}: {what}; put a copy in its place")


def read(config: Config, session: Session) -> Reading:
    """The part of `check` that showing rows needs: of a large source only the beginning, of the model a tokenizer."""
    (base, tokenizer), *rows = collect(
        CANNOT_START,
        [
            lambda: (_base_if_any(config.model), edge.load(config.model, config.data.add_tokens)),
            *(partial(_glance, sources, session) for sources in _sources(config, session)),
        ],
    )
    session.say(*_unread(rows), *(_new_tokens(config, base, tokenizer) if base else ()))
    return of(config, base, tokenizer, *rows)


def _unread(understood: Sequence[list[tuple[SourceSpec, Survey]]]) -> list[str]:
    """What lies beside the files of sources."""
    return [f"warning: {line}" for sources in understood for source, _ in sources if (line := source.unread())]


def _new_tokens(config: Config, base: Base, tokenizer: Tokenizer) -> Iterator[str]:
    """What becomes of the model's vocabulary."""
    yield vocabulary.described(tokenizer.new_ids, base.vocab_size)
    if (tokens := len(tokenizer.hf)) > base.vocab_size and not tokenizer.new_ids:
        what = f"the tokenizer has {tokens:,} tokens and the model {base.vocab_size:,} embeddings"
        yield f"warning: {what}; rows and prompts with any of the others are refused"
    ids = {text: tokenizer.hf.convert_tokens_to_ids(text) for text in config.data.add_tokens}
    if known := [text for text, index in ids.items() if index not in tokenizer.new_ids]:
        yield f"note: data.add_tokens: {', '.join(known)}: in the vocabulary already, added before; nothing is added"


def execution(session: Session, advance: Advance = lambda rows: None) -> Execution:
    """Whatever is made of rows is kept in the user's cache."""
    return Execution(Cache(cache.root(), session.say), advance=advance)


def _glance(sources: Sequence[SourceSpec], session: Session) -> list[tuple[SourceSpec, Survey]]:
    """Reads of large sources the beginning alone."""
    session.say(*(source.split_read() for source in sources))
    return survey.glance(sources, execution(session))


def _read(sources: Sequence[SourceSpec], session: Session) -> list[tuple[SourceSpec, Survey]]:
    """Reads sources from beginning to end."""
    session.say(*(source.split_read() for source in sources))
    with display.counting(session.console, "reading") as advance:
        return survey.understand(sources, execution(session, advance))


def _sources(config: Config, session: Session) -> tuple[list[SourceSpec], list[SourceSpec]]:
    held_out = config.data.eval if isinstance(config.data.eval, tuple) else ()
    shape, split, rows = config.data.format, config.data.split, session.rows
    train = [source_spec(each, "train", shape, split, rows.get(each.path)) for each in config.data.train]
    return train, [source_spec(each, "test", shape, None, rows.get(each.path)) for each in held_out]


def source_spec(
    source: SourceConfig,
    usual: str,
    shape: str = "auto",
    split: str | None = None,
    rows: tuple[Any, ...] | None = None,
) -> SourceSpec:
    """A source of the configuration.

    usual         the split that is read where none is named: train or test
    shape, split  what `data` says for the sources that say nothing
    rows          its rows, where they are in memory
    """
    named = source.split or split
    return SourceSpec(
        source.path,
        shape if source.format == "auto" else source.format,
        rows,
        subset=source.subset,
        choices=Choices(
            source.columns, source.answers, source.control, named or usual, named is not None, source.ignore
        ),
        times=source.times,
        loss_weight=source.loss_weight,
        max_rows=source.max_rows,
    )


def of(
    config: Config,
    base: Base | None,
    tokenizer: Tokenizer,
    train: list[tuple[SourceSpec, Survey]],
    held_out: list[tuple[SourceSpec, Survey]],
) -> Reading:
    """Rows that are understood, a model and a tokenizer, with the settings that decide what their tokens are."""
    chosen, length = collect(
        CANNOT_START,
        [
            lambda: examples.template_of(tokenizer, config.template),
            lambda: max_length(config.max_length, _positions(config, base)),
        ],
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
    """Whether training rows go through the chat template, or went through it beforehand."""
    return any(survey.first and not _is_raw(survey.first.kind, policy.render) for _, survey in understood)


def _is_raw(kind: Kind, render: Render) -> bool:
    """Whether rows of a kind are learnt without a template.

    >>> _is_raw("dialogue", "auto"), _is_raw("dialogue", "chat"), _is_raw("text", "chat"), _is_raw("text", "rendered")
    (True, False, True, False)
    """
    return render != "rendered" and (kind == "text" or render == "raw" or (render == "auto" and kind != "chat"))


def _stop_if_unaskable(reading: Reading, asked: Sequence[Prompt], size: int) -> None:
    """InputError for a prompt made of messages where no template is there to put them in, or with a token past the
    model's `size` embeddings."""
    tokenizer, form = reading.tokenizer, reading.form
    if tokenizer.chat_template is None and any(not isinstance(prompt.prompt, str) for prompt in asked):
        what = "a prompt made of messages needs a chat template, and there is none, as rows are raw text"
        raise InputError(f"evaluate.prompts: {what}; give it as text, as rows have it")
    for each in asked:
        generate.ids_of(form.shown(each.prompt), tokenizer, form.template_kwargs, size)


def _positions(config: Config, base: Base | None) -> int | None:
    """Those that a model has for the tokens of a text: virtual ones stand in the first."""
    every = base.max_positions if base else None
    virtual = config.adapter.tokens if config.adapter and config.adapter.is_virtual else 0
    return every and every - virtual


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
