"""Rendered texts -> ids and weights, under the edge law and the literal law.

Edge: no token straddles the edge of a learnt span, and the tokens before a span are those of the prompt alone. A text
where one encoding of the whole gives that is encoded whole, as `apply_chat_template` does. Elsewhere the text is split
at the edges and encoded piece by piece, as inference will see it.

Literal: special tokens in what messages wrote are encoded as text.

Special tokens separate what stands before and after them. So where nothing can overlap them, the text between two of
them is encoded alone. An edge in it holds if its ids begin with those of the text before the edge, encoded alone. Where
ids spell out a text byte by byte, that is also where the edge lies, and no offsets of characters are needed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from deft.core.types import Rendered
from deft.encoding.raw import Side
from deft.encoding.tokenizer import Tokenizer, Tokens

_REMEMBERED = 256
"""Texts between special tokens that are remembered: headers are the same in all chats."""

_ID = np.dtype(np.int32).itemsize

Special = tuple[int, int, str]
"""A special token in a text: its first character, one past its last, and what it is."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A text as ids int32 [T] and weights float32 [T].

    literal         how many special tokens are text
    split_at_edges  whether its edges forced a split
    """

    rendered: Rendered
    tokens: np.ndarray
    weights: np.ndarray
    literal: int
    split_at_edges: bool

    def cut(self, max_length: int, side: Side) -> Coded:
        """Its first (right) or last (left) `max_length` tokens."""
        kept = slice(0, max_length) if side == "right" else slice(-max_length, None)
        return replace(self, tokens=self.tokens[kept], weights=self.weights[kept])


@dataclass(frozen=True)
class Coder:
    """Encodes rendered texts with one tokenizer."""

    tokenizer: Tokenizer

    def encode(self, rendered: Rendered) -> Coded:
        specials = self._specials(rendered.text)
        literal = _literal(specials, rendered.written)
        if literal:
            return self._split_at_edges(rendered, literal)
        if self.tokenizer.marks_are_apart and (found := self._between_specials(rendered, specials)):
            return found
        tokens = self.tokenizer.encode([rendered.text])[0]
        if all(self._holds(edge, rendered.text, tokens, specials) for edge in _edges(rendered)):
            return Coded(rendered, _ids(tokens.ids), _weights(tokens, rendered), 0, False)
        return self._split_at_edges(rendered, [])

    def _between_specials(self, rendered: Rendered, specials: Sequence[Special]) -> Coded | None:
        """The texts between special tokens, each encoded alone; None where an edge does not hold in its text."""
        ends = [0, *(end for _, end, _ in specials)]
        ids: list[bytes] = []
        firsts: list[int] = []
        length = 0
        for at, (start, _, mark) in zip(ends, (*specials, (len(rendered.text), 0, "")), strict=True):
            between = self._ids_between(rendered.text[at:start])
            if between is None:
                return None
            ids += (between, self._special_ids[mark])
            firsts.append(length // _ID)
            length += len(between) + len(ids[-1])
        places = {}
        for edge in _edges(rendered):
            number = bisect_right(ends, edge) - 1
            before = self._ids_between(rendered.text[ends[number] : edge])
            if before is None or not ids[2 * number].startswith(before):
                return None
            places[edge] = firsts[number] + len(before) // _ID
        weights = np.zeros(length // _ID, np.float32)
        for span in rendered.spans:
            if span.start not in places or span.end not in places:
                return None
            weights[places[span.start] : places[span.end]] = span.weight
        return Coded(rendered, np.frombuffer(bytearray(b"").join(ids), np.int32), weights, 0, False)

    @cached_property
    def _ids_between(self) -> Callable[[str], bytes | None]:
        """The ids, as int32, of a text between special tokens; None where one stands in it."""
        return lru_cache(_REMEMBERED)(self.tokenizer.between)

    @cached_property
    def _special_ids(self) -> dict[str, bytes]:
        """The id, as int32, of each special token; of none, nothing."""
        return {"": b"", **{mark: _ids([index]).tobytes() for mark, index in self.tokenizer.special_tokens.items()}}

    def _specials(self, text: str) -> list[Special]:
        return [(m.start(), m.end(), m.group()) for m in self.tokenizer.find_special(text)]

    def _holds(self, edge: int, text: str, tokens: Tokens, specials: Sequence[Special]) -> bool:
        """True if the tokens before `edge` are those of text[:edge] encoded alone.

        Special tokens separate what stands before and after them, so only the text after the last one is encoded again.
        """
        end, mark = next(((end, mark) for _, end, mark in reversed(specials) if end <= edge), (0, ""))
        before = [self.tokenizer.special_tokens[mark]] if mark else []
        before += self.tokenizer.ids(text[end:edge])
        count = bisect_left(tokens.starts, edge)
        first = count - len(before)
        return tokens.ids[max(0, first) : count] == before and (first == 0 or bool(mark))

    def _split_at_edges(self, rendered: Rendered, literal: Sequence[tuple[int, int]]) -> Coded:
        cuts = sorted({0, len(rendered.text), *_edges(rendered), *(at for pair in literal for at in pair)})
        ids: list[int] = []
        weights: list[float] = []
        for start, end in pairwise(cuts):
            piece = self._piece(rendered.text[start:end], start > 0, any(a <= start and end <= b for a, b in literal))
            ids += piece
            weights += [_weight_at(start, rendered)] * len(piece)
        return Coded(rendered, _ids(ids), np.array(weights, np.float32), len(literal), True)

    def _piece(self, text: str, continues: bool, literal: bool) -> list[int]:
        if literal:
            return self.tokenizer.literal(text, continues)
        return self.tokenizer.continuation(text) if continues else self.tokenizer.ids(text)


def _edges(rendered: Rendered) -> list[int]:
    """Where prompts and answers meet; what is learnt inside an answer by choice is no edge."""
    if rendered.edges is not None:
        return list(rendered.edges)
    return sorted({edge for span in rendered.spans for edge in (span.start, span.end)})


def _literal(specials: Sequence[Special], written: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The special tokens that stand, wholly or in part, in one of the ranges, which are in order and apart."""
    starts = [start for start, _ in written]
    return [
        (start, end)
        for start, end, _ in specials
        if (before := bisect_left(starts, end)) and written[before - 1][1] > start
    ]


def _weights(tokens: Tokens, rendered: Rendered) -> np.ndarray:
    weights = np.zeros(len(tokens.ids), np.float32)
    for span in rendered.spans:
        weights[bisect_left(tokens.starts, span.start) : bisect_left(tokens.starts, span.end)] = span.weight
    return weights


def _weight_at(position: int, rendered: Rendered) -> float:
    return next((span.weight for span in rendered.spans if span.start <= position < span.end), 0.0)


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)
