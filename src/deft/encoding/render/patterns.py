"""One proof per shape of chat: where the template puts what messages say, and which ranges of that are learnt.

Two chats have the same shape if their messages have the same roles and the same fields, empty or not, and the same
messages are learnt. The first chat of a shape is proven character by character (`chat`). A `Pattern` keeps what was
found: the text as literals and fields of messages, and the ranges that are learnt as places among them.

For the next chat of that shape nothing is assumed of the text. The template renders, as plain text, what the prompt law
looks at: for each learnt turn the inference prompt before it, and the chat with that turn as the last message. Each
must equal what the pattern says, to the character; then the text, its prompts and its stop marks are the template's own
for this chat too. A chat that differs is proven by itself, and gives its shape a new pattern.

Who wrote a character is taken from the pattern. A template that moves or repeats words by what they say could write the
same text otherwise where two fields, or a field and a text in the template's code, say the same: such chats are proven
by themselves too. So are those with special tokens in a field (`chat`): who wrote one decides whether it is text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from deft.core.types import Message, Rendered, Span
from deft.encoding.render.template import Refusal, Rendering
from deft.encoding.render.traced import TEMPLATE, MessagePart, Traced, message_of, part_of

Place = tuple[int, int]
"""A place in a text: the index of an item, and characters into it. The end of an item is the beginning of the next."""

_FIELDS = {MessagePart.CONTENT: "content", MessagePart.REASONING: "reasoning"}
_STRIPS = ("", "strip", "lstrip", "rstrip")


@dataclass(frozen=True, slots=True)
class Field:
    """A field of messages[index] in a text.

    strip   the str method that takes white space off its ends, "" for none; None where that is not known, because the
            field had none where it was seen
    """

    index: int
    name: str
    strip: str | None

    def text(self, messages: Sequence[Message]) -> str | None:
        """What stands here in a chat; None where that is not known.

        >>> chat = [Message("user", "Hi "), Message("assistant", "Hello")]
        >>> Field(0, "content", "rstrip").text(chat), Field(0, "content", None).text(chat)
        ('Hi', None)
        """
        words: str = getattr(messages[self.index], self.name)
        if self.strip:
            stripped: str = getattr(words, self.strip)()
            return stripped
        return words if self.strip == "" or words == words.strip() else None


Item = str | Field


@dataclass(frozen=True, slots=True)
class Turn:
    """One learnt turn, proven: the text up to its stop mark, which is the model's own from `start` on."""

    index: int
    text: Traced
    start: int
    spans: tuple[Span, ...]
    note: str


@dataclass(frozen=True, slots=True)
class _Render:
    """What the template writes for messages[:index] with the generation prompt, and for messages[:index + 1].

    The first is the text up to `start`. The second is the text up to item `last`, and then `tail`.
    """

    index: int
    start: Place
    last: int
    tail: str

    def agrees(self, rendering: Rendering, text: str, starts: Sequence[int]) -> bool:
        if rendering.plain(self.index + 1) != text[: starts[self.last]] + self.tail:
            return False
        return rendering.plain(self.index, True) == text[: _offset(self.start, starts)]


@dataclass(frozen=True)
class Pattern:
    """The text of all chats of one shape.

    renders  what the template must write for this to be a chat's text, the longest first
    spans    learnt ranges, each with the message whose weight it has
    edges    where prompts end and answers do, in order
    turns    the learnt messages, in the order of the text
    """

    items: tuple[Item, ...]
    renders: tuple[_Render, ...]
    spans: tuple[tuple[Place, Place, int], ...]
    edges: tuple[Place, ...]
    turns: tuple[int, ...]

    def rendered(self, rendering: Rendering, weights: Sequence[float]) -> Rendered | None:
        """What the proof gives for this chat; None unless the template writes what the pattern says."""
        pieces = [item if isinstance(item, str) else item.text(rendering.messages) for item in self.items]
        known = [piece for piece in pieces if piece is not None]
        words = {known[index] for index in self._fields} if len(known) == len(pieces) else set()
        if len(words) < len(self._fields) or not words.isdisjoint(rendering.template.constants):
            return None
        text, starts = "".join(known), list(accumulate(map(len, known), initial=0))
        try:
            if not all(render.agrees(rendering, text, starts) for render in self.renders):
                return None
        except Refusal:
            return None
        return Rendered(
            text,
            tuple(Span(_offset(start, starts), _offset(end, starts), weights[i]) for start, end, i in self.spans),
            tuple((starts[index], starts[index + 1]) for index in self._fields),
            tuple(_offset(edge, starts) for edge in self.edges),
            (),
            self.turns,
        )

    @cached_property
    def _fields(self) -> tuple[int, ...]:
        return tuple(index for index, item in enumerate(self.items) if isinstance(item, Field))


def learn(turns: Sequence[Turn], rendering: Rendering, old: Pattern | None = None) -> Pattern | None:
    """The pattern of a chat whose turns, in the order of its text, are proven without fallbacks in one text.

    None where fields do not stand there as they are, white space at their ends aside. `old` is the pattern of the same
    shape: what it knows of white space is kept where this chat has none.
    """
    text = max((turn.text for turn in turns), key=len)
    known = {(item.index, item.name): item.strip for item in old.items if isinstance(item, Field)} if old else {}
    items = tuple(_items(text, rendering.messages, known))
    starts = list(accumulate((length for _, length in text.runs), initial=0))

    def place(offset: int) -> Place:
        index = bisect_right(starts, offset) - 1
        return index, offset - starts[index]

    renders = []
    for turn in turns:
        last = max(i for i, (owner, _) in enumerate(text.runs, 1) if owner >= 0 and message_of(owner) == turn.index)
        tail = rendering.plain(turn.index + 1)[starts[last] :]
        renders.append(_Render(turn.index, place(turn.start), last, tail))
    spans = tuple((place(span.start), place(span.end), turn.index) for turn in turns for span in turn.spans)
    edges = tuple(map(place, sorted({edge for turn in turns for edge in (turn.start, len(turn.text))})))
    inside = [i for i, offset in (*edges, *(at for start, end, _ in spans for at in (start, end))) if offset]
    known_items = tuple(item for item in items if item is not None)
    if len(known_items) < len(items) or any(isinstance(items[i], Field) for i in inside):
        return None
    return Pattern(known_items, tuple(renders[::-1]), spans, edges, tuple(turn.index for turn in turns))


def _items(
    text: Traced, messages: Sequence[Message], known: Mapping[tuple[int, str], str | None]
) -> Iterator[Item | None]:
    """The runs of a text as literals and fields; None for what is neither."""
    at = 0
    for owner, length in text.runs:
        written = str.__getitem__(text, slice(at, at + length))
        at += length
        name = _FIELDS.get(part_of(owner)) if owner >= 0 else None
        if owner == TEMPLATE:
            yield written
        elif name is None:
            yield None
        else:
            index = message_of(owner)
            yield _field(index, name, written, getattr(messages[index], name), known.get((index, name)))


def _field(index: int, name: str, written: str, words: str, known: str | None) -> Field | None:
    fitting = [strip for strip in _STRIPS if (getattr(words, strip)() if strip else words) == written]
    if len(fitting) == len(_STRIPS):
        return Field(index, name, known)
    return Field(index, name, fitting[0]) if fitting else None


def _offset(place: Place, starts: Sequence[int]) -> int:
    return starts[place[0]] + place[1]
