"""Sources -> the rows to be seen, each with its fate and its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np

from deft.commands.show.tokens import ShownToken, TokenTexts
from deft.core.types import Encoded, Fate, Origin
from deft.data.shapes import Outcome, Survey
from deft.dataset import build, data_warnings, examples
from deft.dataset.source import SourceSpec, items
from deft.dataset.splits import ContentIndex, SplitRows, SplitRule, assign_splits
from deft.dataset.store import FATES, Store
from deft.dataset.survey import NOT_KEPT, Execution
from deft.encoding.rows import RowEncoder

GROUP = 32
"""Rows that are encoded at a time; fewer where fewer are wanted."""

SHOWN_TOKENS = 8000
"""Tokens of a row that are shown; its numbers are of all."""
SHOWN_CHARACTERS = 1000
"""Characters of a message that are shown where its row has no tokens."""


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One row and what is learnt of it.

    reason     why it is not trained whole
    warnings   names of data_warnings.WARNINGS
    fallbacks  other template inputs that its proof needed
    texts      the texts that the model is shown: one, several where history is rewritten or a text is long, none
               where nothing is trained; at most SHOWN_TOKENS tokens in all
    words      (role, content) of a row without texts; its tools are a role too
    tokens     of all its texts, `learnt` those with weight
    """

    origin: Origin
    shape: str
    fate: Fate
    reason: str = ""
    warnings: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    texts: tuple[tuple[ShownToken, ...], ...] = ()
    words: tuple[tuple[str, str], ...] = ()
    tokens: int = 0
    learnt: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows: `count` of them, from a line on, of sources whose path ends so, of one fate."""

    count: int
    only: Fate | None = None
    source: str = ""
    from_line: int = 1

    def has(self, path: str, origin: Origin) -> bool:
        """Whether a row may be among them by its place; `path` is what its source was named.

        >>> wanted = Wanted(1, source="b.jsonl", from_line=3)
        >>> wanted.has("data", Origin("data/b.jsonl", 3)), wanted.has("data", Origin("data/b.jsonl", 2))
        (True, False)
        """
        return (path.endswith(self.source) or origin.source.endswith(self.source)) and origin.line >= self.from_line


@dataclass(frozen=True, slots=True)
class Shown:
    """The rows that were wanted, how many were looked at to find them, and how many there are, None if not counted."""

    rows: tuple[ShownRow, ...]
    looked_at: int
    total: int | None

    @property
    def extent(self) -> str:
        """In words, what is shown of how much."""
        some = f"{len(self.rows)} rows" if self.total is None else f"{len(self.rows)} of {self.total} rows"
        return some if len(self.rows) == self.looked_at else f"{some}; {self.looked_at} were looked at"


def show(
    train: Sequence[tuple[SourceSpec, Survey]],
    held_out: Sequence[tuple[SourceSpec, Survey]],
    row_encoder: RowEncoder,
    share: float,
    seed: int,
    wanted: Wanted,
    execution: Execution = NOT_KEPT,
) -> Shown:
    """The wanted rows in the order of their sources; no more rows are encoded than it takes to find them."""
    viewer = _Viewer(row_encoder, TokenTexts(row_encoder.tokenizer), wanted, execution)
    evaluated = ContentIndex.of([build.store(*each, row_encoder, execution) for each in held_out])
    rule, eval_rule = SplitRule(share, seed=seed), SplitRule(is_eval=True)
    found = chain(
        *(viewer.rows(*each, rule.of(each[0], number), evaluated) for number, each in enumerate(train)),
        *(viewer.rows(*each, eval_rule.of(each[0], 0), ContentIndex.of()) for each in held_out),
    )
    rows: list[ShownRow] = []
    looked_at = 0
    for row in found:
        looked_at += 1
        if wanted.only in (None, row.fate):
            rows.append(row)
        if len(rows) == wanted.count:
            break
    counted = [survey.rows for _, survey in (*train, *held_out) if survey.is_whole]
    return Shown(tuple(rows), looked_at, sum(counted) if len(counted) == len(train) + len(held_out) else None)


@dataclass(frozen=True)
class _Viewer:
    """Encodes the rows of sources, as training does, and looks at those that are wanted."""

    row_encoder: RowEncoder
    token_texts: TokenTexts
    wanted: Wanted
    execution: Execution

    def rows(self, source: SourceSpec, survey: Survey, rule: SplitRule, evaluated: ContentIndex) -> Iterator[ShownRow]:
        """The wanted rows of a source."""
        if rule.times < 1:
            # A share of the rows is drawn when it is known how many can be trained.
            split = self._split(build.store(source, survey, self.row_encoder, self.execution), rule, evaluated)
            for number, outcome in self._wanted(source, survey):
                yield self._row(split, number, outcome, survey.shape)
            return
        found = self._wanted(source, survey)
        while group := [outcome for _, outcome in islice(found, min(self.wanted.count, GROUP))]:
            fated = examples.encoded(self.row_encoder, group)
            chunk = examples.laid_out(self.row_encoder, group[0].origin.source, fated)
            split = self._split(Store.in_memory([chunk]), rule, evaluated)
            for number, outcome in enumerate(group):
                yield self._row(split, number, outcome, survey.shape)

    def _wanted(self, source: SourceSpec, survey: Survey) -> Iterator[tuple[int, Outcome]]:
        """The rows that are wanted by their place, and their numbers."""
        number = 0
        for item in items(source, survey.left_out):
            for outcome in examples.outcomes(source.path, survey.shape, source.choices, item):
                if self.wanted.has(source.path, outcome.origin):
                    yield number, outcome
                number += 1

    def _split(self, store: Store, rule: SplitRule, evaluated: ContentIndex) -> SplitRows:
        rule = replace(rule, stop_ids=data_warnings.stop_ids(self.row_encoder, store.marks))
        return assign_splits(store, rule, evaluated, np.zeros(len(store), bool))

    def _row(self, split: SplitRows, number: int, outcome: Outcome, shape: str) -> ShownRow:
        store = split.store
        found = store.examples_of(number, split.rule.loss_weight) if split.kept[number] else []
        parts = [part for example in found for part in example]
        texts = tuple(self.token_texts.shown(part) for part in _beginning(parts))
        return ShownRow(
            origin=outcome.origin,
            shape=shape,
            fate=FATES[split.fate[number]],
            reason=split.reason(number),
            warnings=tuple(split.warnings_of(number)),
            fallbacks=tuple((store.value(number, "fallbacks") or "").splitlines()) if texts else (),
            texts=texts,
            words=() if texts else tuple(_words(outcome)),
            tokens=sum(len(part.tokens) for part in parts),
            learnt=sum(int((part.weights[1:] > 0).sum()) for part in parts),
        )


def _words(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """What the first conversation of a row says: the names of its tools, and its messages."""
    for conversation in outcome.conversations[:1]:
        if conversation.tools:
            named = (str(tool.get("function", tool).get("name", "")) for tool in conversation.tools)
            yield "tools", _shortened(", ".join(named))
        yield from ((message.role, _shortened(message.content)) for message in conversation.messages)


def _beginning(parts: Iterable[Encoded]) -> Iterator[Encoded]:
    """The first SHOWN_TOKENS tokens."""
    room = SHOWN_TOKENS
    for part in parts:
        if room > 0:
            yield Encoded(part.origin, part.tokens[:room], part.weights[:room])
        room -= len(part.tokens)


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."
