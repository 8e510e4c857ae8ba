"""A rendered text -> ids and weights, under the edge law and the literal law.

Edge: no token straddles the edge of a learnt span, and the tokens before a span are those of the prompt alone. A text
where one encoding of the whole gives that is encoded whole, as `apply_chat_template` does. Elsewhere the text is cut at
the edges and encoded piece by piece, as inference will see it.

Literal: special tokens in what messages wrote are encoded as text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from deft.render.chat import Rendered
from deft.tokenizer import Tokenizer, Tokens

_REMEMBERED_LENGTH = 64
"""Headers before answers are short and always the same; longer tails are not worth remembering."""


@dataclass(frozen=True, slots=True)
class Coded:
    """Ids int32 [T], weights float32 [T], how many special tokens were kept as text, and whether edges forced a cut."""

    tokens: np.ndarray
    weights: np.ndarray
    literal: int
    apart: bool


@dataclass(frozen=True)
class Coder:
    """Encodes rendered texts with one tokenizer; `_tails` remembers the ids of the headers before answers."""

    tokenizer: Tokenizer
    _tails: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def encode(self, rendered: Rendered) -> Coded:
        specials = [(m.start(), m.end(), m.group()) for m in self.tokenizer.find_special(rendered.text)]
        literal = [(start, end) for start, end, _ in specials if _overlaps(start, end, rendered.written)]
        if not literal:
            tokens = self.tokenizer.encode([rendered.text])[0]
            if all(self._holds(edge, rendered.text, tokens, specials) for edge in _edges(rendered)):
                return Coded(_ids(tokens.ids), _weights(tokens, rendered), 0, False)
        return self._apart(rendered, literal)

    def _holds(self, edge: int, text: str, tokens: Tokens, specials: Sequence[tuple[int, int, str]]) -> bool:
        """True if the tokens before `edge` are those of text[:edge] encoded alone.

        Special tokens separate what stands before and after them, so only the text after the last one is encoded again.
        """
        before = next(((end, mark) for _, end, mark in reversed(specials) if end <= edge), None)
        tail = self._tail(text[before[0] : edge] if before else text[:edge])
        count = bisect_left(tokens.starts, edge)
        first = count - len(tail)
        if first < 0 or tokens.ids[first:count] != tail:
            return False
        return first == 0 if before is None else first > 0 and tokens.ids[first - 1] == self._special(before[1])

    def _special(self, mark: str) -> int:
        return self.tokenizer.special_tokens[mark]

    def _tail(self, text: str) -> list[int]:
        if len(text) > _REMEMBERED_LENGTH:
            return self.tokenizer.ids(text)
        if text not in self._tails:
            self._tails[text] = self.tokenizer.ids(text)
        return self._tails[text]

    def _apart(self, rendered: Rendered, literal: Sequence[tuple[int, int]]) -> Coded:
        cuts = sorted({0, len(rendered.text), *_edges(rendered), *(at for pair in literal for at in pair)})
        ids: list[int] = []
        weights: list[float] = []
        for start, end in pairwise(cuts):
            piece = self._piece(rendered.text[start:end], start > 0, any(a <= start and end <= b for a, b in literal))
            ids += piece
            weights += [_weight_at(start, rendered)] * len(piece)
        return Coded(_ids(ids), np.array(weights, np.float32), len(literal), True)

    def _piece(self, text: str, continues: bool, literal: bool) -> list[int]:
        if literal:
            return self.tokenizer.literal(text, continues)
        return self.tokenizer.continuation(text) if continues else self.tokenizer.ids(text)


def _edges(rendered: Rendered) -> list[int]:
    """Where prompts and answers meet; what is learnt inside an answer by choice is no edge."""
    if rendered.edges is not None:
        return list(rendered.edges)
    return sorted({edge for span in rendered.spans for edge in (span.start, span.end)})


def _overlaps(start: int, end: int, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(a < end and start < b for a, b in ranges)


def _weights(tokens: Tokens, rendered: Rendered) -> np.ndarray:
    weights = np.zeros(len(tokens.ids), np.float32)
    for span in rendered.spans:
        weights[bisect_left(tokens.starts, span.start) : bisect_left(tokens.starts, span.end)] = span.weight
    return weights


def _weight_at(position: int, rendered: Rendered) -> float:
    return next((span.weight for span in rendered.spans if span.start <= position < span.end), 0.0)


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)
