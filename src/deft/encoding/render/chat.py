"""A chat -> texts and learnt spans, under the prompt law.

The text before each learnt span is exactly what the template shows the model at inference, and the span ends with the
mark that stops generation. A chat whose template rewrites its history becomes several texts, each learnt turn in one of
them. What cannot be proven is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal

from deft.core.types import Message, Rendered, Span
from deft.encoding.render import (
    anchor,
    handing,
    probe,
    stop,
    words,
)
from deft.encoding.render.anchor import Anchor, Anchored, Shot
from deft.encoding.render.handing import DEFAULT, Way
from deft.encoding.render.handing import Marks as Block
from deft.encoding.render.patterns import Pattern, Turn, learn
from deft.encoding.render.provenance import (
    TEMPLATE,
    Part,
    Traced,
    owner_of,
)
from deft.encoding.render.stop import Ending, Marks, Stop
from deft.encoding.render.template import Handed, Refusal, Template
from deft.encoding.render.ways import ways

Reasoning = Literal["auto", "require", "empty"]
"""Where the prompt opens a reasoning block: answers without reasoning are refused, or close it at once (`empty`).

`require` refuses every learnt answer without reasoning, whatever the template.
"""


@dataclass(frozen=True, slots=True)
class Rules:
    """What of a learnt turn is learnt: its reasoning, its tool calls; and what a missing reasoning means."""

    reasoning: Reasoning = "auto"
    learn_reasoning: bool = True
    learn_tool_calls: bool = True


DEFAULT_RULES = Rules()

Shape = tuple[Any, ...]

_SHAPES = 2_000
"""So many shapes have patterns; then all are found again."""


@dataclass(frozen=True)
class _Whole:
    """All messages up to the last learnt one in the ordinary way, with the owners of their characters."""

    handed: Handed

    @property
    def messages(self) -> Sequence[Message]:
        return self.handed.messages

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return self.handed.tools

    @cached_property
    def text(self) -> Traced:
        return self.handed.traced(len(self.messages))

    def up_to(self, index: int) -> Traced | None:
        """The text of messages[:index + 1], which must stand in that of all; None where the template rewrites it."""
        if index == len(self.messages) - 1:
            return self.text
        last = words.last_character(self.text, index)
        text = self.handed.plain(index + 1)
        if last is None or not text.startswith(str.__getitem__(self.text, slice(0, last))):
            return None
        return self.text[:last] + text[last:]


@dataclass(frozen=True)
class ChatRenderer:
    """Renders chats with one template.

    `_stops` remembers the stop rule's answer per shape of conversation, way and characters after the turn, which is all
    that it depends on; it also holds the marks that were found, for the exported generation_config. `_usual` remembers
    which anchor and way prove a shape of conversation.
    """

    template: Template
    marks: Marks
    rules: Rules = DEFAULT_RULES
    _stops: dict[tuple[Any, ...], Stop] = field(default_factory=dict, repr=False)
    _patterns: dict[Shape, Pattern] = field(default_factory=dict, repr=False)
    _usual: dict[tuple[str, bool], tuple[Anchor, Way] | None] = field(default_factory=dict, repr=False)

    def render(
        self, messages: Sequence[Message], weights: Sequence[float], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Rendered]:
        """One text, or several where history is rewritten; `weights[i]` > 0 says that message i is learnt.

        Raises Refusal where a mask cannot be proven. No learnt message gives the whole text without spans.
        """
        learnt = [index for index, weight in enumerate(weights) if weight > 0]
        if not learnt:
            text = self.template.render(messages, tools=tools)
            return [Rendered(str.__str__(text), (), words.written(text))]
        handed = self.template.hand(messages[: learnt[-1] + 1], tools)
        shape = None if tools else self._shape(handed.messages, learnt)
        pattern = self._patterns.get(shape) if shape else None
        rendered = self._by_pattern(pattern, handed, weights) if pattern else None
        if rendered:
            return [rendered]
        whole = _Whole(handed)
        turns = [self._turn(whole, index, weights[index]) for index in learnt]
        groups = _grouped(turns)
        if shape and len(groups) == 1 and not any(turn.note for turn in turns):
            self._keep(shape, learn(sorted(turns, key=lambda turn: turn.start), handed, pattern))
        return [_as_rendered(group) for group in groups]

    def _by_pattern(self, pattern: Pattern, handed: Handed, weights: Sequence[float]) -> Rendered | None:
        try:
            return pattern.rendered(handed, weights)
        except Refusal:
            return None

    def _keep(self, shape: Shape, pattern: Pattern | None) -> None:
        if len(self._patterns) >= _SHAPES:
            self._patterns.clear()
        if pattern:
            self._patterns[shape] = pattern

    def _shape(self, messages: Sequence[Message], learnt: Sequence[int]) -> Shape | None:
        """What of a chat decides the marks around its fields; None for chats that no pattern can stand for."""
        kinds = tuple(map(self._kind, messages))
        return None if None in kinds else (kinds, tuple(learnt))

    def _kind(self, message: Message) -> Shape | None:
        """What of a message shapes the text; None for tool calls, blank fields and reasoning inside the content."""
        content, reasoning = message.content, message.reasoning
        if message.tool_calls or content.isspace() or reasoning.isspace():
            return None
        if message.role == "assistant" and handing.block_of(message, self.template.marks):
            return None
        return message.role, bool(content), bool(reasoning), bool(message.name), bool(message.tool_call_id)

    def whole(self, messages: Sequence[Message], weight: float, tools: Sequence[Mapping[str, Any]] = ()) -> Rendered:
        """The text of all messages, every character of it learnt (train_on: all)."""
        text = self.template.render(messages, tools=tools)
        return Rendered(str.__str__(text), (Span(0, len(text), weight),), words.written(text))

    def stop_marks(self) -> frozenset[str]:
        """The marks that ended the turns seen so far."""
        return frozenset(stop.mark for stop in self._stops.values())

    def _turn(self, whole: _Whole, index: int, weight: float) -> Turn:
        """The first anchor and way that prove the turn; Refusal where none does, with the ordinary reason."""
        messages = whole.messages[: index + 1]
        said = handing.said(messages[-1], self.template.marks)
        if self.rules.reasoning == "require" and not said.reasoning.strip():
            raise Refusal(f"messages[{index}] has no reasoning, and reasoning: require asks for it")
        turn = self._at_once(whole, said, index, weight)
        return turn or self._with_fallbacks(messages, said, whole.tools, weight)

    def _at_once(self, whole: _Whole, said: Message, index: int, weight: float) -> Turn | None:
        """The turn by the prefix law in the text of all messages; None where it takes another way to see it."""
        try:
            text = whole.up_to(index)
            if text is None:
                return None
            messages = whole.messages[: index + 1]
            shot = self._shot(messages, said, whole.handed.plain(index, True), text)
            return self._proven(anchor.prefix, shot, messages, weight, whole.handed)
        except Refusal:
            return None

    def _with_fallbacks(
        self, messages: Sequence[Message], said: Message, tools: Sequence[Mapping[str, Any]], weight: float
    ) -> Turn:
        usual = self._usual_attempt(messages, tools)
        ordinary = self._attempts([*messages[:-1], said], tools)
        return self._first_of([usual] if usual else [], ordinary, messages, said, tools, weight)[0]

    def _usual_attempt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Anchor, Way] | None:
        """What proves the turn of a made-up conversation of the same shape: tried first, it saves the others.

        It depends on the shape alone, so that no row's examples depend on the rows before it.
        """
        probes = [probe.like(message, index, self.template.marks) for index, message in enumerate(messages)]
        key = (repr(probes), bool(tools))
        if key not in self._usual:
            said, schemas = handing.said(probes[-1], self.template.marks), probe.TOOLS if tools else ()
            attempts = self._attempts([*probes[:-1], said], schemas)
            try:
                self._usual[key] = self._first_of([], attempts, probes, said, schemas, 1.0)[1]
            except Refusal:
                self._usual[key] = None
        return self._usual[key]

    def _first_of(
        self,
        usual: Sequence[tuple[Anchor, Way]],
        ordinary: Iterator[tuple[Anchor, Way]],
        messages: Sequence[Message],
        said: Message,
        tools: Sequence[Mapping[str, Any]],
        weight: float,
    ) -> tuple[Turn, tuple[Anchor, Way]]:
        """The first attempt that proves the turn; Refusal with the ordinary reason where none does."""
        reasons: dict[Way, str] = {}
        shots: dict[Way, Shot | None] = {}
        for try_anchor, way in chain(usual, ordinary):
            handed = self.template.hand(messages, tools, way)
            try:
                if way not in shots:
                    shots[way] = None
                    prompt = handed.traced(len(messages) - 1, True)
                    shots[way] = self._shot(messages, said, prompt, handed.traced(len(messages)))
                shot = shots[way]
                turn = shot and self._proven(try_anchor, shot, messages, weight, handed)
                if turn:
                    return turn, (try_anchor, way)
            except Refusal as refusal:
                reasons.setdefault(way, str(refusal))
        raise Refusal(self._reason(shots, reasons))

    def _attempts(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[Anchor, Way]]:
        anchors = (anchor.prefix, *anchor.FALLBACKS, *((anchor.empty,) if self.rules.reasoning == "empty" else ()))
        for try_anchor in anchors:
            for way in ways(self.template, messages, tools):
                yield try_anchor, way

    def _shot(self, messages: Sequence[Message], said: Message, prompt: str, text: Traced) -> Shot:
        block = handing.block_of(messages[-1], self.template.marks)
        return Shot(
            prompt=prompt if isinstance(prompt, Traced) else Traced.of(prompt, TEMPLATE),
            text=text,
            index=len(messages) - 1,
            message=said,
            block=(block.opening, block.closing) if block else None,
            marks=self.template.marks,
        )

    def _proven(
        self, try_anchor: Anchor, shot: Shot, messages: Sequence[Message], weight: float, handed: Handed
    ) -> Turn | None:
        """The turn where the anchor holds and every check passes; None where it does not hold."""
        found = try_anchor(shot)
        if found is None:
            return None
        last = _check(found, shot, handed.way)
        if handed.way.inline and not _opens_with(found, shot.index, handed.way.inline):
            return None
        ended = self._stop(messages, found.text[:last], str.__getitem__(found.text, slice(last, None)), handed)
        end = last + ended.length
        if words.strangers(found.text, found.start, end, shot.index):
            raise Refusal(f"the template writes another message inside messages[{shot.index}]")
        text = found.text[:end] + ended.appended
        spans = tuple(Span(a, b, weight) for a, b in self._learnt(text, found.start, shot) if a < b)
        note = ", ".join(note for note in (str(handed.way), found.how) if note)
        return Turn(shot.index, text, found.start, spans, note)

    def _stop(self, messages: Sequence[Message], known: Traced, tail: str, handed: Handed) -> Stop:
        """How the last of `messages` ends; `known` is the text up to its last character, `tail` what follows there."""
        key = (tuple(map(_shape, messages)), bool(handed.tools), handed.way, tail)
        if key not in self._stops:
            is_plain = not messages[-1].tool_calls and bool(messages[-1].content.strip())
            plain = None if is_plain else self._plain_mark(messages, handed)
            ending = Ending(tail, _header(handed, len(messages) - 1), plain)
            self._stops[key] = stop.find(partial(_render, handed, known), self.marks, messages, ending)
        return self._stops[key]

    def _plain_mark(self, messages: Sequence[Message], handed: Handed) -> str:
        """The mark that would end a plain answer in place of the last of `messages`; nothing if none can be found."""
        index, answer = len(messages) - 1, Message("assistant", "probe")
        answered = [*messages[:-1], answer]
        try:
            prompt = handed.plain(index, True)
            known = Traced.of(prompt, TEMPLATE) + Traced.of(answer.content, owner_of(index))
            text = _render(handed, known, answered)
            last = words.last_character(text, index)
            if last is None:
                return ""
            ending = Ending(str.__getitem__(text, slice(last, None)))
            return stop.find(partial(_render, handed, text[:last]), self.marks, answered, ending).mark
        except Refusal:
            return ""

    def _learnt(self, text: Traced, start: int, shot: Shot) -> list[tuple[int, int]]:
        """The ranges of a turn that the rules let learn: all, or what follows the reasoning, or precedes the calls."""
        end = len(text)
        if not self.rules.learn_reasoning and shot.message.reasoning:
            answer = words.first_character(text, shot.index, (Part.CONTENT, Part.CALL_NAME, Part.ARGUMENT), start)
            start = end if answer is None else answer
        if not self.rules.learn_tool_calls and shot.message.tool_calls:
            end = words.end_of_content(text, shot.index) or start
        return [(start, end)]

    def _reason(self, shots: Mapping[Way, Shot | None], reasons: Mapping[Way, str]) -> str:
        """Why no way proves the turn, in the words that help most: of the first way that renders it at all."""
        way, usual = next(((way, shot) for way, shot in shots.items() if shot is not None), (DEFAULT, None))
        if usual is None:
            return next((why for why in reasons.values() if "refuses this conversation" not in why), reasons[DEFAULT])
        opened = anchor.opens(usual)
        if opened and not usual.message.reasoning:
            return (
                f"the prompt opens a reasoning block ({opened[0].strip()!r}) that messages[{usual.index}] does not"
                " have; give it reasoning, or say reasoning: empty to learn an empty block"
            )
        dropped = words.dropped(usual.text, usual.message, usual.index, way)
        if way not in reasons and dropped:
            return _drops(usual.index, dropped)
        return reasons[way] if way in reasons else _contradiction(usual.prompt, usual.text)


def _shape(message: Message) -> tuple[Any, ...]:
    """What of a message decides the marks around it."""
    return message.role, bool(message.content.strip()), bool(message.reasoning), len(message.tool_calls)


def _check(found: Anchored, shot: Shot, way: Way) -> int:
    """One past the last character of the turn; Refusal unless it holds all its words."""
    dropped = words.dropped(found.text, shot.message, shot.index, way)
    if dropped:
        raise Refusal(_drops(shot.index, dropped))
    last = words.last_character(found.text, shot.index)
    if last is None or last <= found.start:
        raise Refusal(f"messages[{shot.index}] has no words to learn")
    return last


def _opens_with(found: Anchored, index: int, marks: Block) -> bool:
    """True if the block of reasoning comes first in the answer, or the prompt has opened it and not closed it."""
    opening, closing = (mark.strip() for mark in marks)
    first = words.first_character(found.text, index, (Part.REASONING,), found.start)
    before, prompt = found.text[found.start : first].strip(), found.text[: found.start].rstrip()
    return prompt.endswith(opening) if not before else before == opening and not prompt.endswith(closing)


def _drops(index: int, dropped: Sequence[str]) -> str:
    return f"the template drops words of messages[{index}], which is learnt: {', '.join(dropped)}"


def _header(handed: Handed, index: int) -> str:
    """What the template writes before an answer: the generation prompt, as far as it stands at the end of the text.

    After a tool's answer some templates write none; then it is that after the last question.
    """
    asked = [end for end in range(index, 0, -1) if end == index or handed.messages[end - 1].role == "user"]
    headers = (_generation_prompt(handed, end) for end in asked[:2])
    return next((header for header in headers if header.strip()), "")


def _generation_prompt(handed: Handed, end: int) -> str:
    bare, prompt = handed.plain(end), handed.plain(end, True)
    return prompt.removeprefix(bare) if prompt.startswith(bare) else ""


def _render(handed: Handed, known: Traced, messages: Sequence[Message]) -> Traced:
    """Other messages, handed to the same template in the same way; `known` is how their text is likely to begin."""
    text = handed.like(messages)
    if text.startswith(known):
        return known + str.__getitem__(text, slice(len(known), None))
    return handed.template.render(messages, tools=handed.tools, way=handed.way)


def _grouped(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Turns that stand in one text, told by the prefix order of their texts; the longest is the first of its group."""
    groups: list[list[Turn]] = []
    for turn in reversed(turns):
        home = next((group for group in groups if group[0].text.startswith(turn.text)), None)
        if home is None:
            groups.append([turn])
        else:
            home.append(turn)
    return groups[::-1]


def _as_rendered(group: Sequence[Turn]) -> Rendered:
    longest = group[0].text
    turns = sorted(group, key=lambda turn: turn.start)
    return Rendered(
        str.__str__(longest),
        tuple(span for turn in turns for span in turn.spans),
        words.written(longest),
        tuple(sorted({edge for turn in turns for edge in (turn.start, len(turn.text))})),
        tuple(dict.fromkeys(turn.note for turn in turns if turn.note)),
        tuple(turn.index for turn in turns),
    )


def _contradiction(prompt: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    shown, written = str.__getitem__(prompt, slice(at, at + 30)), str.__getitem__(text, slice(at, at + 30))
    return (
        f"the template contradicts itself: at inference the prompt has {shown!r} "
        f"where the conversation has {written!r} (character {at})"
    )
