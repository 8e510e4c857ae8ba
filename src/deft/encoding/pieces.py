"""Rendered texts -> ids and weights, under the edge law and the literal law.

Edge: no token straddles the edge of a learnt span, and the tokens before a span are those of the prompt alone. A text
where one encoding of the whole gives that is encoded whole, as `apply_chat_template` does. Elsewhere the text is cut at
the edges and encoded piece by piece, as inference will see it.

Literal: special tokens in what messages wrote are encoded as text.

Special tokens separate what stands before and after them. So an edge is found by counting them: the tokens after the
last one before the edge must be those of the text between, encoded alone. Where a tokenizer's ids spell out a text byte
by byte, that is also where the edge lies, and nobody has to ask which characters each token covers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np

from deft.render.chat import Rendered
from deft.render.slots import Items
from deft.render.trace import Place, Trace
from deft.tokenizer import Tokenizer, Tokens

_REMEMBERED_LENGTH = 64
"""Headers before answers are short and always the same; longer tails are not worth remembering."""

_REMEMBERED = 10_000
"""So many of them are remembered."""


@dataclass(frozen=True, slots=True)
class Coded:
    """Ids int32 [T], weights float32 [T], how many special tokens were kept as text, and whether edges forced a cut."""

    tokens: np.ndarray
    weights: np.ndarray
    literal: int
    apart: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """What must be true of a text's ids for its edges to hold.

    marks  ids of the special tokens that stand in it, in their order
    edges  each as (how many of those stand before it, ids of the text between the last of them and the edge)
    spans  learnt ranges, each from one of `edges` to another, by index
    """

    marks: list[int]
    edges: tuple[tuple[int, list[int]], ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A text, its layout, and the weight of each of the layout's spans."""

    text: str
    layout: Layout
    weights: Sequence[float]


@dataclass(frozen=True)
class Coder:
    """Encodes rendered texts with one tokenizer; `_tails` remembers the ids of the headers before answers."""

    tokenizer: Tokenizer
    _tails: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _layouts: WeakKeyDictionary[Trace, Layout | None] = field(default_factory=WeakKeyDictionary, repr=False)

    def encode(self, rendered: Rendered) -> Coded:
        return self.encode_many([rendered])[0]

    def encode_many(self, rendered: Sequence[Rendered]) -> list[Coded]:
        """What `encode` gives for each, in order; the tokenizer is called once for all texts that need no cut."""
        sheets = [self._sheet(each) for each in rendered]
        placed = iter(self.placed([sheet for sheet in sheets if sheet]))
        return [
            (next(placed) if sheet else None) or self._by_offsets(each)
            for sheet, each in zip(sheets, rendered, strict=True)
        ]

    def placed(self, sheets: Sequence[Sheet]) -> list[Coded | None]:
        """The texts encoded whole; None where the ids do not have the layout."""
        found = self.tokenizer.ids_of([sheet.text for sheet in sheets])
        if not found:
            return []
        tokens = [_ids(ids) for ids in found]
        ends = np.cumsum([len(ids) for ids in found])
        flat = np.concatenate(tokens)
        places = self.tokenizer.special_places(flat)
        marks, after = flat[places].tolist(), (places + 1).tolist()
        last = np.searchsorted(places, ends).tolist()
        return [
            _placed(sheet, ids, row, marks[first:end], [start, *after[first:end]])
            for sheet, ids, row, first, end, start in zip(
                sheets, found, tokens, [0, *last], last, [0, *ends.tolist()], strict=False
            )
        ]

    def layout(self, trace: Trace) -> Layout | None:
        """The layout of all texts of a trace; None where words of messages stand between an edge and the mark before.

        A text in which messages make special tokens of their own does not have this layout.
        """
        if trace not in self._layouts:
            self._layouts[trace] = self._layout(trace) if self.tokenizer.marks_are_apart else None
        return self._layouts[trace]

    def _layout(self, trace: Trace) -> Layout | None:
        marks: list[tuple[Place, int]] = []
        for index, item in enumerate(trace.items):
            if isinstance(item, str):
                marks += [((index, end), self._special(mark)) for _, end, mark in self._specials(item)]
        edges = []
        for place in trace.edges:
            count = sum(end <= place for end, _ in marks)
            tail = _between(trace.items, marks[count - 1][0] if count else (0, 0), place)
            if tail is None:
                return None
            edges.append((count, self._tail(tail)))
        return Layout([mark for _, mark in marks], tuple(edges), trace.spans)

    def _sheet(self, rendered: Rendered) -> Sheet | None:
        """None where special tokens must be kept as text, or where ids do not say how much text they cover."""
        edges = _edges(rendered)
        is_cut_at_edges = all(span.start in edges and span.end in edges for span in rendered.spans)
        specials = self._specials(rendered.text)
        if not self.tokenizer.spells_bytes or not is_cut_at_edges or _literal(specials, rendered.written):
            return None
        ends = [end for _, end, _ in specials]
        found = []
        for edge in edges:
            count = bisect_right(ends, edge)
            found.append((count, self._tail(rendered.text[ends[count - 1] if count else 0 : edge])))
        spans = tuple((edges.index(span.start), edges.index(span.end)) for span in rendered.spans)
        layout = Layout([self._special(mark) for _, _, mark in specials], tuple(found), spans)
        return Sheet(rendered.text, layout, [span.weight for span in rendered.spans])

    def _by_offsets(self, rendered: Rendered) -> Coded:
        specials = self._specials(rendered.text)
        literal = _literal(specials, rendered.written)
        if not literal:
            tokens = self.tokenizer.encode([rendered.text])[0]
            if all(self._holds(edge, rendered.text, tokens, specials) for edge in _edges(rendered)):
                return Coded(_ids(tokens.ids), _weights(tokens, rendered), 0, False)
        return self._apart(rendered, literal)

    def _specials(self, text: str) -> list[tuple[int, int, str]]:
        return [(m.start(), m.end(), m.group()) for m in self.tokenizer.find_special(text)]

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
        if text in self._tails:
            return self._tails[text]
        ids = self.tokenizer.ids(text)
        if len(text) <= _REMEMBERED_LENGTH and len(self._tails) < _REMEMBERED:
            self._tails[text] = ids
        return ids

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


def _placed(sheet: Sheet, ids: list[int], tokens: np.ndarray, marks: list[int], after: list[int]) -> Coded | None:
    """The text's ids with their weights, if they have its layout.

    marks  the special tokens among the ids
    after  where the text begins and where each of them ends, all counted from the same place
    """
    if marks != sheet.layout.marks:
        return None
    edges = []
    for count, tail in sheet.layout.edges:
        start = after[count] - after[0]
        end = start + len(tail)
        if ids[start:end] != tail:
            return None
        edges.append(end)
    weights = np.zeros(len(ids), np.float32)
    for (begin, end), weight in zip(sheet.layout.spans, sheet.weights, strict=True):
        weights[edges[begin] : edges[end]] = weight
    return Coded(tokens, weights, 0, False)


def _edges(rendered: Rendered) -> list[int]:
    """Where prompts and answers meet; what is learnt inside an answer by choice is no edge."""
    if rendered.edges is not None:
        return list(rendered.edges)
    return sorted({edge for span in rendered.spans for edge in (span.start, span.end)})


def _between(items: Items, start: Place, end: Place) -> str | None:
    """The text between two places; None where a message's words stand there.

    >>> _between(("<user>Hi", "<bot>"), (0, 6), (1, 5))
    'Hi<bot>'
    """
    found = []
    for index in range(start[0], min(end[0] + 1, len(items))):
        item = items[index]
        kept = slice(start[1] if index == start[0] else 0, end[1] if index == end[0] else None)
        if isinstance(item, str):
            found.append(item[kept])
        elif kept.stop != 0:
            return None
    return "".join(found)


def _literal(specials: Sequence[tuple[int, int, str]], written: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
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
