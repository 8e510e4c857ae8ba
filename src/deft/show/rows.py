"""Sources -> the rows to be seen, each with its fate and its tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from deft import dataset
from deft.data.shapes import Understood
from deft.dataset import Named
from deft.encoding.rows import EncodedRow, RowEncoder
from deft.errors import Problem
from deft.show.tokens import ShownToken, TokenTexts
from deft.symptoms import Examiner
from deft.types import Conversation, Encoded, Fate, Origin

SHOWN_TOKENS = 8000
"""So many tokens of a row are shown; its numbers are of all."""
SHOWN_CHARACTERS = 1000
"""So much of a message is shown where its row has no tokens."""


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One row and what is learnt of it.

    reason     why it is not trained whole
    symptoms   names of deft.symptoms
    fallbacks  other ways to hand it to the chat template that its proof needed
    texts      the texts that the model is shown: one, several where history is rewritten or a text is long, none
               where nothing is trained; at most SHOWN_TOKENS tokens in all
    words      (role, content) of a row without texts
    tokens     of all its texts, `learnt` those with weight
    """

    origin: Origin
    shape: str
    fate: Fate
    reason: str = ""
    symptoms: tuple[str, ...] = ()
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
    """The rows that were wanted, how many were looked at to find them, and how many there are."""

    rows: tuple[ShownRow, ...]
    looked_at: int
    total: int

    @property
    def extent(self) -> str:
        """In words, what is shown of how much."""
        some = f"{len(self.rows)} of {self.total} rows"
        return some if len(self.rows) == self.looked_at else f"{some}; {self.looked_at} were looked at"


def show(
    train: Sequence[tuple[Named, Understood]],
    held_out: Sequence[tuple[Named, Understood]],
    row_encoder: RowEncoder,
    share: float,
    seed: int,
    wanted: Wanted,
) -> Shown:
    """The wanted rows in the order of their sources; no more rows are encoded than it takes to find them."""
    viewer = _Viewer(row_encoder, TokenTexts(row_encoder.tokenizer), Examiner(row_encoder), wanted)
    taken = dataset.contents(held_out)
    training = [
        viewer.rows(*source, viewer.trained(*source, number, share, seed, taken)) for number, source in enumerate(train)
    ]
    evaluated = [viewer.rows(*source, viewer.evaluated(*source)) for source in held_out]
    rows: list[ShownRow] = []
    looked_at = 0
    for row in chain(*training, *evaluated):
        looked_at += 1
        if wanted.only in (None, row.fate):
            rows.append(row)
        if len(rows) == wanted.count:
            break
    return Shown(tuple(rows), looked_at, sum(_rows(known) for _, known in (*train, *held_out)))


@dataclass(frozen=True)
class _Viewer:
    """Encodes the rows of sources, as training does, and looks at those that are wanted."""

    row_encoder: RowEncoder
    token_texts: TokenTexts
    examiner: Examiner
    wanted: Wanted

    def trained(
        self, named: Named, known: Understood, number: int, share: float, seed: int, taken: Mapping[int, Origin]
    ) -> Iterator[EncodedRow]:
        """A training source; `number` counts them."""
        draws = named.times < 1
        # A share of the rows is drawn when it is known how many can be trained.
        conversations = known.conversations if draws else self._wanted(named, known)
        rows = dataset.encode_rows(
            conversations, self.row_encoder, share, False, loss_weight=named.loss_weight, taken=taken
        )
        fated = dataset.draw(list(rows), named, seed, number)[0] if draws else rows
        yield from (row for row in fated if self.wanted.has(named.path, row.conversation.origin))

    def evaluated(self, named: Named, known: Understood) -> Iterator[EncodedRow]:
        """A source of its own for evaluation."""
        return dataset.encode_rows(
            self._wanted(named, known), self.row_encoder, 0.0, True, loss_weight=named.loss_weight
        )

    def _wanted(self, named: Named, known: Understood) -> Iterator[Conversation]:
        return (each for each in known.conversations if self.wanted.has(named.path, each.origin))

    def rows(self, named: Named, known: Understood, encoded: Iterable[EncodedRow]) -> Iterator[ShownRow]:
        """The wanted rows of a source, those that its format refused or left out at their places."""
        lost = [_refused(problem, known.shape) for problem in known.refused]
        lost += [ShownRow(origin, known.shape, Fate.LEFT_OUT, why) for origin, why in known.left_out]
        unread = sorted((row for row in lost if self.wanted.has(named.path, row.origin)), key=_place)
        return heapq.merge((self._row(row, known.shape) for row in encoded), unread, key=_place)

    def _row(self, row: EncodedRow, shape: str) -> ShownRow:
        parts = [part for example in row.examples for part in example]
        texts = tuple(self.token_texts.shown(part) for part in _beginning(parts))
        return ShownRow(
            origin=row.conversation.origin,
            shape=shape,
            fate=row.fate,
            reason=row.reason,
            symptoms=tuple(self.examiner.symptoms(row)),
            fallbacks=row.notes,
            texts=texts,
            words=() if texts else tuple((m.role, _shortened(m.content)) for m in row.conversation.messages),
            tokens=sum(len(part.tokens) for part in parts),
            learnt=sum(int((part.weights[1:] > 0).sum()) for part in parts),
        )


def _rows(known: Understood) -> int:
    return sum(1 for _ in known.rows()) + len(known.refused) + len(known.left_out)


def _place(row: ShownRow) -> tuple[str, int, int]:
    return row.origin.source, row.origin.line, row.origin.item


def _beginning(parts: Iterable[Encoded]) -> Iterator[Encoded]:
    """The first SHOWN_TOKENS tokens."""
    room = SHOWN_TOKENS
    for part in parts:
        if room > 0:
            yield Encoded(part.origin, part.tokens[:room], part.weights[:room])
        room -= len(part.tokens)


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."


def _refused(problem: Problem, shape: str) -> ShownRow:
    return ShownRow(Origin.at(problem.where), shape, Fate.REFUSED, str(problem).removeprefix(f"{problem.where}: "))
