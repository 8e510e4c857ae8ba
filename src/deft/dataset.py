"""Sources -> examples and the ledger: the data half from end to end.

A source is read twice: once to know that all of it can be read and what it is (`understand`), once to encode it
(`encode_sources`). What comes of either is kept in the cache, where the source's content has a digest.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, overload

from deft import cache as caches
from deft import ledger, symptoms, workers
from deft import tokenizer as edge
from deft.blocks import Item, Recipe, maker
from deft.cache import Cache
from deft.config import Source
from deft.data import chunks, hub, shapes, sources
from deft.data.choices import Choices
from deft.data.chunks import Chunk
from deft.data.shapes import Survey
from deft.encoding.pieces import Coder
from deft.encoding.raw import Side
from deft.encoding.rows import Overflow, Policy, Render, RowEncoder
from deft.errors import InputError, Problem, Problems, user_code
from deft.fates import Contents, Setting, settle
from deft.files import Staging
from deft.ledger import SourceLedger
from deft.render.chat import ChatRenderer, Reasoning, Rules
from deft.render.choose import Chosen, choose
from deft.render.policy import TrainOn
from deft.render.template import Template
from deft.store import Block, Examples, Store
from deft.tokenizer import Tokenizer
from deft.types import Conversation, Encoded, Message, Origin

Advance = Callable[[int], None]
"""Called with so many rows more, for a progress bar."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is trained on, what is held out, and what became of every row.

    train  has an example as often as it is learnt in an epoch
    marks  what ended learnt turns of chats
    """

    train: Examples
    held_out: Examples
    ledgers: tuple[SourceLedger, ...]
    marks: frozenset[str]


@dataclass(frozen=True, slots=True)
class Named:
    """A source by name, or rows that a caller holds.

    subset       of a Hub data set
    choices      what its formats need to know
    times        how often its rows are learnt in an epoch; a share of them where it is no whole number
    loss_weight  multiplies the weight of every token
    max_rows     reads no further
    """

    path: str
    format: str = "auto"
    rows: tuple[Any, ...] | None = None
    subset: str | None = None
    choices: Choices = field(default_factory=Choices)
    times: float = 1.0
    loss_weight: float = 1.0
    max_rows: int | None = None
    piped: tuple[Chunk, ...] = ()

    @property
    def is_by_name(self) -> bool:
        """Whether it can be read again by its name alone."""
        return self.rows is None and not self.piped

    def files(self) -> list[str]:
        """The files it consists of."""
        is_here = self.is_by_name and not sources.is_on_the_hub(self.path)
        return sources.files(self.path) if is_here else []

    def chunks(self) -> Iterator[Chunk]:
        if self.rows is not None:
            found: Iterator[Chunk] = chunks.of(sources.from_values(self.rows, self.path), self.path)
        elif self.piped:
            found = iter(self.piped)
        else:
            found = sources.chunks(self.path, subset=self.subset, split=self.choices.split)
        return found if self.max_rows is None else chunks.limited(found, self.max_rows)


@dataclass(frozen=True, slots=True)
class Way:
    """How the work is done; no result depends on it.

    cache      where results are kept; nowhere where it is None
    processes  how many read and encode; as many as there are cores, where it is None
    helpers    processes that were started before, to encode
    """

    cache: Cache | None = None
    processes: int | None = None
    helpers: workers.Helpers | None = None
    advance: Advance = lambda rows: None


LOOKED_AT_BYTES = 2**26
"""Files that are larger take longer than 30 ms to know again."""

COUNTED_HERE = 32
"""Counting so many chunks takes 0.3 s (9 ms each, AMD EPYC): less than processes that help would take to start."""

NOT_KEPT = Way()
"""By as many processes as there are cores, and kept nowhere."""


def named(source: Source, split: str) -> Named:
    """A source of the configuration. `split` is read where it names none: train or test."""
    choices = Choices(source.columns, source.answers, source.control, source.split or split)
    return Named(
        source.path,
        source.format,
        subset=source.subset,
        choices=choices,
        times=source.times,
        loss_weight=source.loss_weight,
        max_rows=source.max_rows,
    )


def encoder(tokenizer: Tokenizer, chosen: Chosen, policy: Policy, stop_ids: Sequence[int] = ()) -> RowEncoder:
    """What turns conversations into tokens; `stop_ids` are those of the model's generation_config."""
    template = Template(chosen.source, tokenizer.template_tokens, policy.template_kwargs)
    return RowEncoder(ChatRenderer(template, tokenizer.marks(stop_ids), policy.rules), Coder(tokenizer), policy)


# Reading


def understand(named: Iterable[Named], way: Way = NOT_KEPT) -> list[tuple[Named, Survey]]:
    """Reads all sources; every source that cannot be understood is in one error."""
    return _each(named, lambda source: _surveyed(source, way))


def glance(named: Iterable[Named], way: Way = NOT_KEPT) -> list[tuple[Named, Survey]]:
    """`understand`, where the beginning of a source is enough to know its shape: soon done, however large it is."""
    return _each(named, lambda source: _glanced(source, way))


def _each(named: Iterable[Named], survey: Callable[[Named], Survey]) -> list[tuple[Named, Survey]]:
    found: list[tuple[Named, Survey]] = []
    problems: list[Problem] = []
    more = 0
    for each in named:
        try:
            source = replace(each, piped=sources.piped()) if each.path == sources.STDIN else each
            found.append((source, survey(source)))
        except Problems as error:
            problems += [Problem(each.path, error.heading.removeprefix(f"{each.path}: ")), *error.problems]
            more += error.more
        except InputError as error:
            where, _, what = str(error).partition(": ")
            problems.append(Problem(where, what))
    if problems:
        raise Problems("the data cannot be read", problems, more)
    return found


def _glanced(source: Named, way: Way) -> Survey:
    waiting = source.chunks()
    count = shapes.counter((source.path, source.format, source.choices))
    found = shapes.survey(map(count, islice(waiting, workers.HERE)), source.path, source.format, source.choices)
    if next(waiting, None) is None:
        return found
    return _surveyed(source, way) if shapes.load(found.shape).left_out else replace(found, is_whole=False)


def _surveyed(source: Named, way: Way) -> Survey:
    content = _content(source)
    if way.cache is None or not content:
        return replace(_survey(source, way), content=content)
    folder, _ = way.cache.get(_key(source, content), lambda staging: _write_survey(staging, _survey(source, way)))
    return replace(_read_survey(folder), content=content)


def _survey(source: Named, way: Way) -> Survey:
    tallies = workers.ordered(
        shapes.counter,
        (source.path, source.format, source.choices),
        source.chunks(),
        way.processes,
        here=COUNTED_HERE,
    )
    return shapes.survey(_counted(tallies, way.advance), source.path, source.format, source.choices)


def _counted(tallies: Iterable[shapes.Tally], advance: Advance) -> Iterator[shapes.Tally]:
    for tally in tallies:
        advance(tally.rows)
        yield tally


def _content(source: Named) -> dict[str, str]:
    """A digest of each file of a source by its name; none where its rows are in memory, or nobody knows."""
    if not source.is_by_name:
        return {}
    if sources.is_on_the_hub(source.path):
        fingerprint = hub.fingerprint(source.path, source.subset)
        return {source.path: fingerprint} if fingerprint else {}
    return caches.file_digests(source.files())


def _key(source: Named, content: Mapping[str, str]) -> str:
    """The digest of all that a survey depends on."""
    choices = [asdict(source.choices), source.subset, source.max_rows]
    return caches.digest([content, source.path, source.format, _own_code(source.format), choices, caches.code()])


def _own_code(format_name: str) -> str:
    """The digest of the module of a user's own format."""
    if ":" not in format_name:
        return ""
    shapes.load(format_name)
    file = import_module(format_name.partition(":")[0]).__file__
    return caches.digest(Path(file).read_text(encoding="utf-8")) if file else ""


def is_known(source: Named, kept: Cache) -> bool:
    """Whether the rows of a source were read before, a sign that they are encoded: a look that takes no time."""
    if sources.is_on_the_hub(source.path) or not source.is_by_name:
        return False
    if sum(Path(file).stat().st_size for file in source.files()) > LOOKED_AT_BYTES:
        return False
    return (kept.root / _key(source, _content(source))).is_dir()


def _write_survey(staging: Staging, survey: Survey) -> None:
    first = survey.first and {
        "origin": asdict(survey.first.origin),
        "kind": survey.first.kind,
        "messages": [[message.role, message.content] for message in survey.first.messages],
    }
    refused = [[problem.where, problem.what, problem.fix] for problem in survey.refused]
    left_out = [[*asdict(origin).values(), why] for origin, why in survey.left_out]
    facts = {"shape": survey.shape, "rows": survey.rows, "refused_rows": survey.refused_rows}
    staging.write_json("survey.json", {**facts, "first": first, "refused": refused, "left_out": left_out})


def _read_survey(folder: Path) -> Survey:
    found = json.loads((folder / "survey.json").read_text(encoding="utf-8"))
    first = found["first"] and Conversation(
        Origin(**found["first"]["origin"]),
        found["first"]["kind"],
        tuple(Message(role, content) for role, content in found["first"]["messages"]),
    )
    left_out = tuple((Origin(*origin), why) for *origin, why in found["left_out"])
    refused = tuple(Problem(*problem) for problem in found["refused"])
    return Survey(found["shape"], found["rows"], first, refused, found["refused_rows"], left_out)


# Encoding


def encode_sources(
    understood: Sequence[tuple[Named, Survey]],
    row_encoder: RowEncoder,
    *,
    held_out: Sequence[tuple[Named, Survey]] = (),
    share: float = 0.0,
    seed: int = 0,
    way: Way = NOT_KEPT,
) -> Dataset:
    """Encodes sources, and the ledgers of all.

    held_out  sources of their own for evaluation: a row of theirs is not trained, wherever it stands
    share     of the training rows by content hash that is held out
    seed      draws the rows of sources with `times`
    """
    every = [*understood, *held_out]
    identity = _identity(row_encoder)
    stores = [store(*each, row_encoder, way, identity) for each in every]
    marks = frozenset(mark for each in stores for mark in each.marks)
    stop_ids = symptoms.stop_ids(row_encoder, marks)
    train_stores, other_stores = stores[: len(understood)], stores[len(understood) :]
    taken = Contents.of(other_stores)
    settled = [
        settle(each, Setting(share, False, named.times, named.loss_weight, seed, number, stop_ids), taken, repeated)
        for number, ((named, _), each, repeated) in enumerate(
            zip(understood, train_stores, Contents.of(train_stores).repeated(), strict=True)
        )
    ]
    settled += [
        settle(
            each, Setting(0.0, True, named.times, named.loss_weight, seed, number, stop_ids), Contents.of(), repeated
        )
        for number, ((named, _), each, repeated) in enumerate(
            zip(held_out, other_stores, taken.repeated(), strict=True)
        )
    ]
    return Dataset(
        Examples(tuple(each.train() for each in settled)),
        Examples(tuple(each.held_out() for each in settled)),
        tuple(
            ledger.account(named.path, survey.shape, each) for (named, survey), each in zip(every, settled, strict=True)
        ),
        marks,
    )


def store(named: Named, survey: Survey, row_encoder: RowEncoder, way: Way, identity: str = "") -> Store:
    """The rows of a source, encoded: from the cache, or made and put there.

    identity  of the encoder, where it is known already: it takes a look at the whole vocabulary
    """
    blocks = partial(_blocks, named, survey, row_encoder, way)
    if way.cache is None or not survey.content:
        return Store.of(blocks())
    key = caches.digest([_key(named, survey.content), identity or _identity(row_encoder)])
    return caches.read(*way.cache.get(key, lambda staging: _write(staging, named, survey, blocks())))


def _write(staging: Staging, named: Named, survey: Survey, blocks: Iterable[Block]) -> None:
    caches.write(staging, blocks)
    if not sources.is_on_the_hub(named.path) and caches.file_digests(survey.content) != survey.content:
        raise InputError(f"{named.path}: changed while it was read; start again")


def _blocks(named: Named, survey: Survey, row_encoder: RowEncoder, way: Way) -> Iterator[Block]:
    template = row_encoder.renderer.template
    recipe = Recipe(
        row_encoder.tokenizer.hf,
        template.source,
        template.now,
        row_encoder.renderer.marks,
        row_encoder.policy,
        named.path,
        survey.shape,
        named.choices,
    )
    for block in workers.ordered(maker, recipe, items(named, survey), way.processes, way.helpers):
        way.advance(block.rows)
        yield block


def items(named: Named, survey: Survey) -> Iterator[Item]:
    """The chunks of a source, each with those of its rows that are left out because of others."""
    waiting = deque(survey.left_out)
    for chunk in named.chunks():
        found = {}
        while waiting and _stands_in(waiting[0][0], chunk):
            origin, why = waiting.popleft()
            found[origin] = why
        yield chunk, found


def _stands_in(origin: Origin, chunk: Chunk) -> bool:
    """Whether a row that no earlier chunk has is in this one."""
    return origin.source == chunk.source and (origin.line, origin.item) <= chunk.last


def _identity(row_encoder: RowEncoder) -> str:
    """The digest of all that tokens depend on beside their rows."""
    tokenizer, template = row_encoder.tokenizer, row_encoder.renderer.template
    special = [tokenizer.special_tokens, tokenizer.bos_id, tokenizer.eos_id, tokenizer.puts_bos, tokenizer.hf.eos_token]
    today = template.now.date().isoformat() if "strftime_now" in template.source else ""
    texts = [tokenizer.hf.backend_tokenizer.to_str(), special, template.source, template.tokens, today]
    return caches.digest([texts, asdict(row_encoder.renderer.marks), asdict(row_encoder.policy), caches.code()])


@dataclass(frozen=True)
class EncodedRows(Sequence[Encoded]):
    """Encoded rows in their order, and the refused: [(origin, reason), ...]."""

    rows: tuple[Encoded, ...]
    refused: tuple[tuple[Origin, str], ...]

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


def encode(
    rows: Iterable[Any],
    tokenizer: Any,
    *,
    train_on: TrainOn | None = None,
    render: Render = "auto",
    template: str = "auto",
    max_length: int = 2048,
    overflow: Overflow = "turns",
    truncation_side: Side = "right",
    template_kwargs: Mapping[str, Any] | None = None,
    reasoning: Reasoning = "auto",
    learn_reasoning: bool = True,
    learn_tool_calls: bool = True,
) -> EncodedRows:
    """Rows in any shape that deft reads -> ids and weights, for any trainer.

    tokenizer  a fast Hugging Face tokenizer, or the folder of one

    A row that its template forces into several texts, or that holds several conversations, gives several items with one
    origin; rows that are refused, left out, too long or without a target are in `refused` with their reason. Raises
    Problems where the rows have no common shape.
    """
    held = edge.load(tokenizer) if isinstance(tokenizer, str) else edge.wrap(tokenizer)
    chosen = choose(template, held.chat_template, held.puts_bos, held.special_tokens)
    rules = Rules(reasoning, learn_reasoning, learn_tool_calls)
    policy = Policy(max_length, train_on, render, overflow, truncation_side, rules, template_kwargs or {})
    way = Way(processes=1)
    with user_code("rows"):
        held_rows = tuple(rows)
    ((named, survey),) = understand([Named("rows", rows=held_rows)], way)
    done = store(named, survey, encoder(held, chosen, policy), way)
    count = len(done.columns["example_parts"])
    lost = [(done.origin(row), done.reason(row)) for row in (done.counts("row_examples") == 0).nonzero()[0].tolist()]
    return EncodedRows(tuple(part for example in range(count) for part in done.example(example)), tuple(lost))
