"""Chats rendered from what their template did to others of the same shape, without running it again.

Two chats have the same shape if their messages have the same roles and the same fields, empty or not, and the same
messages are learnt. For a shape, the template runs once on slots (`slots`), for each text that the prompt law looks at:
the whole, and for each learnt turn the inference prompt before it and the text with it as the last message. Each comes
out as literals and pieces, with guards. For every chat of the shape that passes the guards these are the texts that the
template would write, and the prompt law holds for it by the places of the pieces alone:

- The prompt's items are a prefix of the items of the text with the turn, so the prompt is a prefix of that text,
  whatever the words. The items of the turn, too, begin those of the whole.
- Each word of the turn stands there once: content and reasoning are one piece each, and only white space was stripped.
- No piece of another message stands between the turn's beginning and its stop mark, and what follows the turn's last
  piece is a literal, so the stop rule, which sees the shape and that literal, gives the same stop.
- All that the proof asks of words themselves (is the content empty, does it open with reasoning) is in the shape.

So spans and edges are places among the items: their offsets in a chat's text are sums of lengths. A shape that needs
anything else (a fallback, several texts, words that the template looks into) is rendered by `ChatRenderer` each time.
The first chats of each shape, and some later ones, are rendered both ways; should they ever differ, the shape is not
used again and the row says so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

from deft.errors import InputError
from deft.render.chat import ChatRenderer, Rendered
from deft.render.slots import Guard, Items, Piece, Recorder, SlotSandbox, Unfollowed, fill, run
from deft.render.template import Refusal
from deft.types import Message, Span

CHECKED_FIRST, CHECKED_EVERY = 3, 1000
"""So many first chats of a trace, and each so manyth later one, are rendered both ways."""

_SHAPES, _BEGINNINGS = 2_000, 8_000
"""So many shapes, and so many texts of the beginnings of chats, are kept; those least used go first."""

_TRIES = 4
"""So many times a shape is traced: once for each way in which its guards may turn out."""

DIFFERS = "the traced template differs from the template itself; please report this row and its template"

Place = tuple[int, int]
"""A place in a text: the index of an item, and characters into it. The end of an item is the beginning of the next."""

Key = tuple[Any, ...]

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Text:
    """What the template writes for the beginning of a chat: items, and the guards under which it does."""

    items: Items
    guards: tuple[Guard, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Trace:
    """A shape's one text, proven.

    edges  where prompts end and answers do, in the order of the text
    spans  for each learnt turn, its beginning and its end as indices into `edges`
    turns  the learnt messages
    """

    items: Items
    guards: tuple[Guard, ...]
    edges: tuple[Place, ...]
    spans: tuple[tuple[int, int], ...]
    turns: tuple[int, ...]

    def holds(self, messages: Sequence[Message]) -> bool:
        return all(guard.holds(messages) for guard in self.guards)

    def rendered(self, messages: Sequence[Message], weights: Sequence[float]) -> Rendered:
        """What `ChatRenderer.render` gives for messages of this shape that pass the guards."""
        starts = _starts(self.items, messages)
        edges = [starts[index] + offset for index, offset in self.edges]
        return Rendered(
            fill(self.items, messages),
            tuple(Span(edges[a], edges[b], weights[turn]) for (a, b), turn in zip(self.spans, self.turns, strict=True)),
            tuple(_written(self.items, starts)),
            tuple(edges),
            (),
            self.turns,
        )


@dataclass
class _Shape:
    """What is known of a shape: its traces with the number of chats that each has rendered."""

    traces: dict[Trace, int] = field(default_factory=dict)
    met: int = 0
    tries: int = 0
    is_off: bool = False


@dataclass(frozen=True)
class Tracer:
    """Renders chats by the traces of their shapes, for one renderer. A shape is traced when it is met again."""

    renderer: ChatRenderer
    _shapes: OrderedDict[Key, _Shape] = field(default_factory=OrderedDict, repr=False)
    _beginnings: OrderedDict[Key, list[Text]] = field(default_factory=OrderedDict, repr=False)

    def render(
        self, messages: Sequence[Message], weights: Sequence[float], tools: Sequence[Mapping[str, Any]] = ()
    ) -> Trace | list[Rendered]:
        """A trace that renders these messages, or what `ChatRenderer.render` gives, whose errors it raises."""
        key = None if tools else self._key(messages, weights)
        if key is None:
            return self.renderer.render(messages, weights, tools)
        shape = _kept(self._shapes, key, _Shape, _SHAPES)
        shape.met += 1
        if shape.is_off or shape.met == 1:
            return self.renderer.render(messages, weights)
        trace = next((trace for trace in shape.traces if trace.holds(messages)), None)
        if trace is None:
            return self._traced(shape, key, messages, weights)
        used = shape.traces[trace] = shape.traces[trace] + 1
        if used > CHECKED_FIRST and used % CHECKED_EVERY:
            return trace
        return self._checked(shape, trace, messages, weights)

    def _checked(
        self, shape: _Shape, trace: Trace, messages: Sequence[Message], weights: Sequence[float]
    ) -> Trace | list[Rendered]:
        ordinary = self.renderer.render(messages, weights)
        if ordinary == [trace.rendered(messages, weights)]:
            return trace
        shape.is_off = True
        return [replace(each, notes=(*each.notes, DIFFERS)) for each in ordinary]

    def _traced(self, shape: _Shape, key: Key, messages: Sequence[Message], weights: Sequence[float]) -> list[Rendered]:
        """The ordinary way, and a trace of it for the chats to come."""
        ordinary = self.renderer.render(messages, weights)
        shape.tries += 1
        shape.is_off = shape.tries >= _TRIES and not shape.traces
        if shape.tries <= _TRIES:
            with suppress(Unfollowed):
                shape.traces[self._proven(key, messages, weights, ordinary)] = 0
        return ordinary

    def _key(self, messages: Sequence[Message], weights: Sequence[float]) -> Key | None:
        """The shape; None where a chat of its kind is never traced."""
        end = max((index for index, weight in enumerate(weights) if weight > 0), default=-1) + 1
        kinds = [self._kind(message) for message in messages[:end]]
        if not kinds or None in kinds:
            return None
        return (*kinds, tuple(weight > 0 for weight in weights[:end]))

    def _kind(self, message: Message) -> Key | None:
        """What of a message shapes the text; None for tool calls, blank fields and reasoning inside the content."""
        content, reasoning = message.content, message.reasoning
        if message.tool_calls or (content and content.isspace()) or (reasoning and reasoning.isspace()):
            return None
        if message.role == "assistant" and self._openings and content.lstrip().startswith(self._openings):
            return None
        speakers = (message.name, message.tool_call_id)
        if any(speaker and speaker.isspace() for speaker in speakers):
            return None
        return (message.role, not content, not reasoning, *(speaker and True for speaker in speakers))

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        return tuple(opening.rstrip() for opening, _ in self.renderer.template.marks)

    @cached_property
    def _sandboxed(self) -> Any:
        """The template, compiled for slots; None where it is written in a way that they cannot follow."""
        try:
            return self.renderer.template.compiled(SlotSandbox())
        except (Unfollowed, InputError):
            return None

    def _proven(
        self, key: Key, messages: Sequence[Message], weights: Sequence[float], ordinary: Sequence[Rendered]
    ) -> Trace:
        """The trace, by the argument above; Unfollowed where it does not hold."""
        learnt = [index for index, weight in enumerate(weights) if weight > 0]
        if len(ordinary) != 1 or ordinary[0].notes or list(ordinary[0].turns) != learnt:
            raise Unfollowed("it takes a fallback or several texts")
        whole = self._beginning(key, messages, learnt[-1] + 1, False)
        guards = dict.fromkeys(whole.guards)
        turns = []
        for index in learnt:
            prompt = self._beginning(key, messages, index, True)
            text = self._beginning(key, messages, index + 1, False)
            guards.update(dict.fromkeys((*prompt.guards, *text.guards)))
            turns.append(_Turn.proven(index, messages[index], prompt.items, text.items, whole.items))
        if not self.renderer.rules.learn_reasoning and any(messages[index].reasoning for index in learnt):
            raise Unfollowed("a part of a turn is learnt")
        trace = _trace(turns, whole.items, tuple(guards), messages, ordinary[0])
        if trace.rendered(messages, weights) != ordinary[0]:
            raise Unfollowed("it renders something else")
        return trace

    def _beginning(self, key: Key, messages: Sequence[Message], end: int, add_generation_prompt: bool) -> Text:
        """The text of messages[:end]; it does not depend on what follows, so that longer chats share it."""
        found = _kept(self._beginnings, (*key[:end], add_generation_prompt), list, _BEGINNINGS)
        for text in found:
            if all(guard.holds(messages) for guard in text.guards):
                return text
        text = self._recorded(messages[:end], add_generation_prompt)
        del found[_TRIES - 1 :]
        found.append(text)
        return text

    def _recorded(self, messages: Sequence[Message], add_generation_prompt: bool) -> Text:
        if self._sandboxed is None:
            raise Unfollowed("the template")
        recorder = Recorder(messages)
        template = self.renderer.template
        try:
            items = run(self._sandboxed, template, messages, recorder, add_generation_prompt)
            plain = template.hand(messages).plain(len(messages), add_generation_prompt)
        except Refusal as refusal:
            raise Unfollowed("the template refuses it") from refusal
        if fill(items, messages) != plain:
            raise Unfollowed("the template writes something else on slots")
        return Text(items, recorder.guards())


@dataclass(frozen=True, slots=True)
class _Turn:
    """A learnt turn: where its prompt ends, and the index of its last piece, among the items of the whole."""

    index: int
    start: Place
    last: int

    @classmethod
    def proven(cls, index: int, message: Message, prompt: Items, text: Items, whole: Items) -> _Turn:
        """The prompt law on items; Unfollowed where it does not hold for all words.

        prompt  the inference prompt before the turn
        text    the chat with the turn as its last message
        whole   the chat up to the last learnt turn
        """
        own = [at for at, item in enumerate(text) if isinstance(item, Piece) and item.index == index]
        pieces = [item for item in text if isinstance(item, Piece) and item.index == index]
        if not own or not _begins(prompt, text) or text[: own[-1] + 1] != whole[: own[-1] + 1]:
            raise Unfollowed("the template rewrites its history")
        fields = sorted(piece.field for piece in pieces if piece.field in ("content", "reasoning"))
        spoken = [field for field in ("content", "reasoning") if getattr(message, field)]
        if fields != spoken or not all(map(_keeps_words, pieces)):
            raise Unfollowed("the template drops or repeats words")
        start = _end(prompt)
        strangers = (item for item in text[start[0] : own[-1]] if isinstance(item, Piece) and item.index != index)
        tail = text[own[-1] + 1 :]
        if any(strangers) or len(tail) > 1 or isinstance(tail[0] if tail else "", Piece) or start > (own[-1], 0):
            raise Unfollowed("the template mixes messages")
        return cls(index, start, own[-1])


def _trace(
    turns: Sequence[_Turn], whole: Items, guards: tuple[Guard, ...], messages: Sequence[Message], ordinary: Rendered
) -> Trace:
    """The trace of proven turns. Stops are literals, so those that the ordinary way found are those of the shape."""
    last = turns[-1].last + 1
    starts = _starts(whole, messages)
    items = whole[:last] + ((ordinary.text[starts[last] :],) if len(ordinary.text) > starts[last] else ())
    spans = []
    for turn, span in zip(turns, ordinary.spans, strict=True):
        end = (turn.last + 1, span.end - starts[turn.last + 1])
        follows = items[end[0]] if end[0] < len(items) else ""
        if not 0 <= end[1] <= (len(follows) if isinstance(follows, str) else 0):
            raise Unfollowed("a turn ends in another message")
        spans.append((_place(turn.start, items), _place(end, items)))
    edges = sorted({edge for span in spans for edge in span})
    if spans != sorted(spans):
        raise Unfollowed("turns in another order")
    indices = tuple((edges.index(start), edges.index(end)) for start, end in spans)
    return Trace(items, guards, tuple(edges), indices, tuple(turn.index for turn in turns))


def _place(place: Place, items: Items) -> Place:
    """The one way to name a place."""
    index, offset = place
    item = items[index] if index < len(items) else None
    return (index + 1, 0) if isinstance(item, str) and offset == len(item) else place


def _end(items: Items) -> Place:
    return (len(items) - 1, len(items[-1])) if items and isinstance(items[-1], str) else (len(items), 0)


def _begins(items: Items, others: Items) -> bool:
    """True if the text of `items` is a beginning of the other's, whatever the words.

    >>> _begins(("a", Piece(0, "content"), "b"), ("a", Piece(0, "content"), "bc", Piece(1, "content")))
    True
    """
    if not items:
        return True
    last, other = items[-1], others[len(items) - 1] if len(items) <= len(others) else None
    is_begun = other.startswith(last) if isinstance(last, str) and isinstance(other, str) else last == other
    return items[:-1] == others[: len(items) - 1] and is_begun


def _keeps_words(piece: Piece) -> bool:
    """True if nothing but white space is stripped."""
    return all(characters is None or characters.isspace() for _, characters in piece.strips)


def _starts(items: Items, messages: Sequence[Message]) -> list[int]:
    """The offset of each item in a chat's text, and the text's length."""
    return list(accumulate((len(fill((item,), messages)) for item in items), initial=0))


def _written(items: Items, starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The ranges that messages wrote."""
    for index, item in enumerate(items):
        if isinstance(item, Piece) and starts[index] < starts[index + 1]:
            yield starts[index], starts[index + 1]


def _kept(cache: OrderedDict[Key, V], key: Key, make: Callable[[], V], limit: int) -> V:
    """The value of a key, made where there is none; the one that was not asked for longest goes."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
