"""Rendered texts -> ids and weights, under the edge law and the literal law.

Edge: no token straddles the edge of a learnt span, and the tokens before a span are those of the prompt alone. A text
where one encoding of the whole gives that is encoded whole, as `apply_chat_template` does. Elsewhere the text is cut at
the edges and encoded piece by piece, as inference will see it.

Literal: special tokens in what messages wrote are encoded as text.

Special tokens separate what stands before and after them. So where nothing can overlap them, a text is encoded piece by
piece between them, and an edge is found by counting them: the ids after the last one before the edge must begin with
those of the text between, encoded alone. Where ids spell out a text byte by byte, that is also where the edge lies, and
nobody has to ask which characters each token covers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np

from deft.render.chat import Rendered
from deft.render.slots import Item, Items, fill
from deft.render.trace import Place, Trace
from deft.tokenizer import Tokenizer, Tokens
from deft.types import Message

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
    """What must be true of a text's ids for its edges to hold. Ids are int32, as bytes.

    marks  the ids of the special tokens that stand in it, in their order
    edges  each as (how many of those stand before it, ids of the text between the last of them and the edge)
    spans  learnt ranges, each from one of `edges` to another, by index
    """

    marks: tuple[bytes, ...]
    edges: tuple[tuple[int, bytes], ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """The layout of all texts of a trace, and what stands before, between and after their marks: items, or ids."""

    layout: Layout
    between: tuple[Items | bytes, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A text by what stands before, between and after its marks, as text or as ids; its layout; the spans' weights."""

    between: Sequence[str | bytes]
    layout: Layout
    weights: Sequence[float]


@dataclass(frozen=True)
class Coder:
    """Encodes rendered texts with one tokenizer; `_tails` remembers the ids of the headers before answers."""

    tokenizer: Tokenizer
    _tails: dict[str, bytes] = field(default_factory=dict, repr=False)
    _outlines: WeakKeyDictionary[Trace, Outline | None] = field(default_factory=WeakKeyDictionary, repr=False)

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
        """The texts of sheets, encoded; None where the ids do not have the layout."""
        texts = [each for sheet in sheets for each in sheet.between if isinstance(each, str)]
        found = iter(self.tokenizer.between(texts))
        return [
            _placed(sheet, [next(found) if isinstance(each, str) else each for each in sheet.between])
            for sheet in sheets
        ]

    def sheet(self, trace: Trace, messages: Sequence[Message], weights: Sequence[float]) -> Sheet | None:
        """The text of a trace for these messages; None where words of messages stand between an edge and its mark.

        A text in which messages make special tokens of their own does not have the sheet's layout.
        """
        if trace not in self._outlines:
            self._outlines[trace] = self._outline(trace) if self.tokenizer.marks_are_apart else None
        outline = self._outlines[trace]
        if outline is None:
            return None
        between = [each if isinstance(each, bytes) else fill(each, messages) for each in outline.between]
        return Sheet(between, outline.layout, [weights[turn] for turn in trace.turns])

    def _outline(self, trace: Trace) -> Outline | None:
        marks: list[tuple[Place, Place, bytes]] = []
        for index, item in enumerate(trace.items):
            if isinstance(item, str):
                marks += [((index, start), (index, end), self._mark(mark)) for start, end, mark in self._specials(item)]
        ends = [(0, 0), *(end for _, end, _ in marks)]
        starts = [*(start for start, _, _ in marks), (len(trace.items), 0)]
        between = [_between(trace.items, *places) for places in zip(ends, starts, strict=True)]
        edges = []
        for place in trace.edges:
            count = sum(end <= place for _, end, _ in marks)
            tail = _between(trace.items, ends[count], place)
            if any(not isinstance(item, str) for item in tail):
                return None
            edges.append((count, self._tail("".join(map(str, tail)))))
        layout = Layout(tuple(mark for _, _, mark in marks), tuple(edges), trace.spans)
        return Outline(layout, tuple(self._known(items) for items in between))

    def _known(self, items: Items) -> Items | bytes:
        """The ids of items in which no message stands."""
        (ids,) = self.tokenizer.between([fill(items, ())]) if all(isinstance(item, str) for item in items) else (None,)
        return items if ids is None else ids

    def _sheet(self, rendered: Rendered) -> Sheet | None:
        """None where special tokens must be kept as text, or where ids do not say how much text they cover."""
        edges = _edges(rendered)
        is_cut_at_edges = all(span.start in edges and span.end in edges for span in rendered.spans)
        specials = self._specials(rendered.text)
        if not self.tokenizer.marks_are_apart or not is_cut_at_edges or _literal(specials, rendered.written):
            return None
        ends = [0, *(end for _, end, _ in specials)]
        starts = [*(start for start, _, _ in specials), len(rendered.text)]
        found = []
        for edge in edges:
            count = bisect_right(ends, edge) - 1
            found.append((count, self._tail(rendered.text[ends[count] : edge])))
        spans = tuple((edges.index(span.start), edges.index(span.end)) for span in rendered.spans)
        layout = Layout(tuple(self._mark(mark) for _, _, mark in specials), tuple(found), spans)
        between = [rendered.text[start:end] for start, end in zip(ends, starts, strict=True)]
        return Sheet(between, layout, [span.weight for span in rendered.spans])

    def _mark(self, mark: str) -> bytes:
        return _ids([self._special(mark)]).tobytes()

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
        tail = self.tokenizer.ids(text[before[0] : edge] if before else text[:edge])
        count = bisect_left(tokens.starts, edge)
        first = count - len(tail)
        if first < 0 or tokens.ids[first:count] != tail:
            return False
        return first == 0 if before is None else first > 0 and tokens.ids[first - 1] == self._special(before[1])

    def _special(self, mark: str) -> int:
        return self.tokenizer.special_tokens[mark]

    def _tail(self, text: str) -> bytes:
        if text in self._tails:
            return self._tails[text]
        ids = _ids(self.tokenizer.ids(text)).tobytes()
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


def _placed(sheet: Sheet, between: Sequence[bytes | None]) -> Coded | None:
    """The sheet's ids with their weights, if they have its layout; None stands for a text that has special tokens."""
    found: list[bytes] = []
    starts = []
    length = 0
    for ids, mark in zip(between, (*sheet.layout.marks, b""), strict=True):
        if ids is None:
            return None
        starts.append(length // 4)
        length += len(ids) + len(mark)
        found += (ids, mark)
    edges = []
    for count, tail in sheet.layout.edges:
        if not found[2 * count].startswith(tail):
            return None
        edges.append(starts[count] + len(tail) // 4)
    weights = np.zeros(length // 4, np.float32)
    for (begin, end), weight in zip(sheet.layout.spans, sheet.weights, strict=True):
        weights[edges[begin] : edges[end]] = weight
    return Coded(np.frombuffer(bytearray(b"").join(found), np.int32), weights, 0, False)


def _edges(rendered: Rendered) -> list[int]:
    """Where prompts and answers meet; what is learnt inside an answer by choice is no edge."""
    if rendered.edges is not None:
        return list(rendered.edges)
    return sorted({edge for span in rendered.spans for edge in (span.start, span.end)})


def _between(items: Items, start: Place, end: Place) -> Items:
    """What stands between two places.

    >>> _between(("<user>Hi", "<bot>"), (0, 6), (1, 5))
    ('Hi', '<bot>')
    """
    found: list[Item] = []
    for index in range(start[0], min(end[0] + 1, len(items))):
        item = items[index]
        first, last = start[1] if index == start[0] else 0, end[1] if index == end[0] else None
        part = item[first:last] if isinstance(item, str) else item if last is None else ""
        found += [part] if part else []
    return tuple(found)


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
