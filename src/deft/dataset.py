"""Sources -> examples and the ledger: the data half from end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, overload

import numpy as np

from deft import ledger
from deft import tokenizer as edge
from deft.config import Source
from deft.data import mixture, shapes, sources, split
from deft.data.choices import Choices
from deft.data.shapes import Understood
from deft.encoding.pieces import Coder
from deft.encoding.raw import Side
from deft.encoding.rows import EncodedRow, Example, Overflow, Policy, Render, RowEncoder
from deft.errors import InputError, Problem, Problems
from deft.ledger import SourceLedger
from deft.render.chat import ChatRenderer, Reasoning, Rules
from deft.render.choose import Chosen, choose
from deft.render.policy import TrainOn
from deft.render.template import Template
from deft.symptoms import Examiner
from deft.tokenizer import Tokenizer
from deft.types import Conversation, Encoded, Fate, Origin, Row


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is trained on, what is held out, and what became of every row.

    train  has an example as often as it is learnt in an epoch
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    ledgers: tuple[SourceLedger, ...]

    def __add__(self, other: Dataset) -> Dataset:
        return Dataset(self.train + other.train, self.held_out + other.held_out, self.ledgers + other.ledgers)


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

    def read(self) -> Iterator[Row | Problem]:
        if self.rows is None:
            found = sources.read(self.path, subset=self.subset, split=self.choices.split)
        else:
            found = iter(sources.from_values(self.rows, self.path))
        return islice(found, self.max_rows)


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


def understand(named: Iterable[Named]) -> list[tuple[Named, Understood]]:
    """Reads all sources; every source that cannot be understood is in one error."""
    found: list[tuple[Named, Understood]] = []
    problems: list[Problem] = []
    for source in named:
        try:
            found.append((source, shapes.understand(source.read(), source.path, source.format, source.choices)))
        except Problems as error:
            problems += [Problem(source.path, error.heading.removeprefix(f"{source.path}: ")), *error.problems]
        except InputError as error:
            where, _, what = str(error).partition(": ")
            problems.append(Problem(where, what))
    if problems:
        raise Problems("the data cannot be read", problems)
    return found


def encode_sources(
    understood: Sequence[tuple[Named, Understood]],
    row_encoder: RowEncoder,
    *,
    share: float = 0.0,
    is_eval: bool = False,
    held_out: Sequence[tuple[Named, Understood]] = (),
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Dataset:
    """Encodes sources; `share` of the rows by content hash, or all with `is_eval`, are held out.

    held_out  sources of their own for evaluation: a row that stands there too is not trained, but held out
    seed      draws the rows of sources with `times`
    advance   is called once per row, for a progress bar
    """
    sorter = _Sorter(row_encoder, share, is_eval, contents(held_out), seed, advance)
    found = [sorter.source(named, known, number) for number, (named, known) in enumerate(understood)]
    return sum(found, Dataset((), (), ()))


def contents(understood: Iterable[tuple[Named, Understood]]) -> dict[int, Origin]:
    """The contents of all rows, and where they stand."""
    return {split.digest(row): row[0].origin for _, known in understood for row in known.rows()}


def encode_rows(
    conversations: Iterable[Conversation],
    row_encoder: RowEncoder,
    share: float,
    is_eval: bool,
    loss_weight: float = 1.0,
    taken: Mapping[int, Origin] | None = None,
) -> Iterator[EncodedRow]:
    """Each row with its fate, as it is asked for; `share` and `is_eval` as in `encode_sources`.

    taken  contents of rows that are evaluated -> where they stand
    """
    for row in shapes.rows(conversations):
        digest = split.digest(row) if share or taken else 0
        if taken and digest in taken:
            reason = f"stands in the evaluation data too: {taken[digest]}"
            yield EncodedRow(row[0], Fate.HELD_OUT, reason=reason)
            continue
        encoded = _encode(row, row_encoder, loss_weight)
        is_kept_back = encoded.examples and (is_eval or split.is_held_out(digest, share))
        yield replace(encoded, fate=Fate.HELD_OUT) if is_kept_back else encoded


def draw(rows: Sequence[EncodedRow], named: Named, seed: int, number: int) -> tuple[list[EncodedRow], list[int]]:
    """Rows with their final fate, and how often an epoch learns each of them.

    number  of the source among those of the run; a row that its `times` does not draw once is left out
    """
    trained = [bool(row.examples) and row.fate != Fate.HELD_OUT for row in rows]
    drawn = iter(mixture.passes(sum(trained), named.times, seed, number).tolist())
    passes = [next(drawn) if is_trained else 0 for is_trained in trained]
    reason = f"not among the {named.times:g} of the source's rows that seed {seed} draws"
    fated = [
        replace(row, fate=Fate.LEFT_OUT, examples=(), reason=reason) if is_trained and not times else row
        for row, is_trained, times in zip(rows, trained, passes, strict=True)
    ]
    return fated, passes


DUPLICATE = "duplicate"
"""The symptom of a row that says the same as an earlier one."""


@dataclass(frozen=True)
class _Sorter:
    """Encodes the rows of sources and gives each its fate. `seen` are the contents met so far, with their rows."""

    row_encoder: RowEncoder
    share: float
    is_eval: bool
    taken: Mapping[int, Origin]
    seed: int
    advance: Callable[[], None]
    seen: dict[int, Origin] = field(default_factory=dict)

    def source(self, named: Named, known: Understood, number: int) -> Dataset:
        rows = []
        for row in encode_rows(
            known.conversations, self.row_encoder, self.share, self.is_eval, named.loss_weight, self.taken
        ):
            rows.append(row)
            self.advance()
        rows, passes = draw(rows, named, self.seed, number)
        train = [example for row, times in zip(rows, passes, strict=True) for example in row.examples * times]
        held_out = [example for row in rows if row.fate == Fate.HELD_OUT for example in row.examples]
        return Dataset(tuple(train), tuple(held_out), (self._account(named, known, rows),))

    def _account(self, named: Named, known: Understood, rows: Sequence[EncodedRow]) -> SourceLedger:
        examiner, repeated = Examiner(self.row_encoder), self._repeated(known)
        left_out = (
            EncodedRow(Conversation(origin, "text", ()), Fate.LEFT_OUT, reason=why) for origin, why in known.left_out
        )

        def symptoms(row: EncodedRow) -> list[str]:
            return [*examiner.symptoms(row), *([DUPLICATE] if row.conversation.origin in repeated else [])]

        return ledger.account(named.path, known.shape, chain(rows, left_out), known.refused, symptoms)

    def _repeated(self, known: Understood) -> set[Origin]:
        """The rows of a source that say the same as an earlier one of any source."""
        first = ((row[0].origin, self.seen.setdefault(split.digest(row), row[0].origin)) for row in known.rows())
        return {origin for origin, earlier in first if earlier is not origin}


def _encode(row: Sequence[Conversation], row_encoder: RowEncoder, loss_weight: float = 1.0) -> EncodedRow:
    """The conversations of one row, encoded, under one fate."""
    encoded = [_weighted(row_encoder.encode(each), each.weight * loss_weight) for each in row]
    return encoded[0] if len(encoded) == 1 else _as_one(encoded)


def _weighted(row: EncodedRow, weight: float) -> EncodedRow:
    if weight == 1.0 or not row.examples:
        return row
    if weight == 0.0:
        return replace(row, fate=Fate.NO_TARGET, examples=(), reason="its loss_weight is 0")
    examples = tuple(
        tuple(replace(part, weights=part.weights * np.float32(weight)) for part in example) for example in row.examples
    )
    return replace(row, examples=examples)


def _as_one(rows: Sequence[EncodedRow]) -> EncodedRow:
    """Several conversations of one row as the row: refused where one is, else trained as far as they are."""
    refused = [row for row in rows if row.fate == Fate.REFUSED]
    lost = [row for row in rows if not row.examples]
    if refused or len(lost) == len(rows):
        return (refused or lost)[0]
    is_whole = all(row.fate == Fate.TRAINED for row in rows)
    return EncodedRow(
        rows[0].conversation,
        Fate.TRAINED if is_whole else Fate.CUT,
        tuple(example for row in rows for example in row.examples),
        f"{len(lost)} of its {len(rows)} conversations are not trained: {lost[0].reason}" if lost else "",
        max(row.literal for row in rows),
        any(row.apart for row in rows),
    )


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
    row_encoder = encoder(held, chosen, policy)
    known = shapes.understand(sources.from_values(rows), "rows")
    done = [_encode(row, row_encoder) for row in known.rows()]
    lost = [(row.conversation.origin, row.reason) for row in done if not row.examples] + list(known.left_out)
    unread = [(Origin.at(problem.where), problem.what) for problem in known.refused]
    parts = tuple(part for row in done for example in row.examples for part in example)
    return EncodedRows(parts, tuple(sorted(lost + unread, key=lambda item: item[0].line)))
