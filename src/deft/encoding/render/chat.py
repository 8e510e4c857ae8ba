"""A chat -> texts and learnt spans, under the prompt law.

The text before each learnt span is exactly what the template shows the model at inference, and the span ends with the
mark that stops generation. A chat whose template rewrites its history becomes several texts, each learnt turn in one of
them. What cannot be proven is refused with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal

from deft.core.types import Message, Rendered, Span
from deft.encoding.render import answer_start, stop
from deft.encoding.render.answer_start import FindStart, PromptView
from deft.encoding.render.patterns import Pattern, Turn, learn
from deft.encoding.render.proof import (
    contradiction,
    last_word,
    reasoning_first,
    refuse_dropped,
    refuse_strangers,
)
from deft.encoding.render.stop import Ending, Marks, Stop
from deft.encoding.render.template import Refusal, Rendering, Template
from deft.encoding.render.template_inputs import (
    DEFAULT,
    PROBE_TOOLS,
    TemplateOptions,
    option_sets,
    probe,
    reasoning_apart,
    reasoning_block,
)
from deft.encoding.render.traced import (
    TEMPLATE,
    MessagePart,
    Traced,
    first_character,
    last_character,
    owner_of,
    written_ranges,
)

Reasoning = Literal["auto", "require", "empty"]
"""Where the prompt opens a reasoning block: answers without reasoning are refused, or close it at once (`empty`).

`require` refuses every learnt answer without reasoning, whatever the template.
"""


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """What of a learnt turn is learnt: its reasoning, its tool calls; and what a missing reasoning means."""

    reasoning: Reasoning = "auto"
    learn_reasoning: bool = True
    learn_tool_calls: bool = True


DEFAULT_RULES = AnswerRules()

Shape = tuple[Any, ...]
Attempt = tuple[FindStart, TemplateOptions]

_SHAPES = 2_000
"""Shapes that have patterns at a time; beyond, all are found again."""


@dataclass(frozen=True)
class ChatRenderer:
    """Renders chats with one template.

    `_stops` remembers the stop rule's answer per shape of conversation, options and characters after the turn, which is
    all that it depends on; it also holds the marks that were found, for the exported generation_config. `_usual`
    remembers which attempt proves a shape of conversation.
    """

    template: Template
    marks: Marks
    rules: AnswerRules = DEFAULT_RULES
    _stops: dict[tuple[Any, ...], Stop] = field(default_factory=dict, repr=False)
    _patterns: dict[Shape, Pattern] = field(default_factory=dict, repr=False)
    _usual: dict[tuple[str, bool], Attempt | None] = field(default_factory=dict, repr=False)

    def render(
        self, messages: Sequence[Message], weights: Sequence[float], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Rendered]:
        """One text, or several where history is rewritten; `weights[i]` > 0 says that message i is learnt.

        Raises Refusal where a mask cannot be proven. No learnt message gives the whole text without spans.
        """
        learnt = [index for index, weight in enumerate(weights) if weight > 0]
        if not learnt:
            return [replace(self.whole(messages, 0.0, tools), spans=())]
        rendering = Rendering(self.template, messages[: learnt[-1] + 1], tools)
        shape = None if tools else self._shape(rendering.messages, learnt)
        pattern = self._patterns.get(shape) if shape else None
        rendered = pattern.rendered(rendering, weights) if pattern else None
        if rendered:
            return [rendered]
        turns = [self._turn(rendering, index, weights[index]) for index in learnt]
        groups = _grouped(turns)
        if shape and len(groups) == 1 and not any(turn.note for turn in turns):
            self._keep(shape, learn(sorted(turns, key=lambda turn: turn.start), rendering, pattern))
        return [_as_rendered(group) for group in groups]

    def whole(self, messages: Sequence[Message], weight: float, tools: Sequence[Mapping[str, Any]] = ()) -> Rendered:
        """The text of all messages, every character of it learnt (train_on: all)."""
        text = self.template.render(messages, tools=tools)
        return Rendered(str.__str__(text), (Span(0, len(text), weight),), written_ranges(text))

    def stop_marks(self) -> frozenset[str]:
        """The marks that ended the turns seen so far."""
        return frozenset(stop.mark for stop in self._stops.values())

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
        """What of a message shapes the text.

        None for tool calls, blank fields, reasoning inside the content, and special tokens: who wrote them decides
        whether they are text, and only the whole proof follows who wrote what.
        """
        content, reasoning = message.content, message.reasoning
        if message.tool_calls or content.isspace() or reasoning.isspace():
            return None
        if self._special.search(content) or self._special.search(reasoning):
            return None
        if message.role == "assistant" and reasoning_block(message, self.template.marks):
            return None
        return message.role, bool(content), bool(reasoning), bool(message.name), bool(message.tool_call_id)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.marks.special)) or "(?!)")

    def _turn(self, whole: Rendering, index: int, weight: float) -> Turn:
        """The first attempt that proves the turn; Refusal where none does, with the ordinary reason."""
        messages = whole.messages[: index + 1]
        said = reasoning_apart(messages[-1], self.template.marks)
        if self.rules.reasoning == "require" and not said.reasoning.strip():
            raise Refusal(f"messages[{index}] has no reasoning, and reasoning: require asks for it")
        try:
            turn = self._by_prefix(whole, index, weight)
        except Refusal:
            turn = None
        if turn:
            return turn
        usual = self._usual_attempt(messages, whole.tools)
        attempts = self._attempts([*messages[:-1], said], whole.tools)
        return self._first_of(chain([usual] if usual else [], attempts), messages, whole.tools, weight)[0]

    def _by_prefix(self, whole: Rendering, index: int, weight: float) -> Turn | None:
        """The turn in the text of all messages; None where its prompt does not begin that, or Refusal."""
        text = _text_up_to(whole, index)
        if text is None:
            return None
        messages = whole.messages[: index + 1]
        view = self._view(messages, Traced.of(whole.plain(index, True), TEMPLATE), text)
        return self._proven(answer_start.prefix, view, messages, weight, whole)

    def _usual_attempt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Attempt | None:
        """What proves the turn of a made-up conversation of the same shape: tried first, it saves the others.

        It depends on the shape alone, so that no row's examples depend on the rows before it.
        """
        probes = [probe(message, index, self.template.marks) for index, message in enumerate(messages)]
        key = (repr(probes), bool(tools))
        if key not in self._usual:
            schemas = PROBE_TOOLS if tools else ()
            attempts = self._attempts([*probes[:-1], reasoning_apart(probes[-1], self.template.marks)], schemas)
            try:
                self._usual[key] = self._first_of(attempts, probes, schemas, 1.0)[1]
            except Refusal:
                self._usual[key] = None
        return self._usual[key]

    def _attempts(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Iterator[Attempt]:
        last = (answer_start.empty,) if self.rules.reasoning == "empty" else ()
        for find_start in (answer_start.prefix, *answer_start.FALLBACKS, *last):
            for options in option_sets(self.template, messages, tools):
                yield find_start, options

    def _first_of(
        self,
        attempts: Iterable[Attempt],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        weight: float,
    ) -> tuple[Turn, Attempt]:
        """The first attempt that proves the turn; Refusal with the ordinary reason where none does."""
        reasons: dict[TemplateOptions, str] = {}
        views: dict[TemplateOptions, PromptView | None] = {}
        for find_start, options in attempts:
            rendering = Rendering(self.template, messages, tools, options)
            try:
                if options not in views:
                    views[options] = None
                    prompt = rendering.traced(len(messages) - 1, True)
                    views[options] = self._view(messages, prompt, rendering.traced(len(messages)))
                view = views[options]
                turn = view and self._proven(find_start, view, messages, weight, rendering)
                if turn:
                    return turn, (find_start, options)
            except Refusal as refusal:
                reasons.setdefault(options, str(refusal))
        raise Refusal(_reason(views, reasons))

    def _view(self, messages: Sequence[Message], prompt: Traced, text: Traced) -> PromptView:
        block = reasoning_block(messages[-1], self.template.marks)
        said = reasoning_apart(messages[-1], self.template.marks)
        marks = (block.opening, block.closing) if block else None
        return PromptView(prompt, text, len(messages) - 1, said, marks, self.template.marks)

    def _proven(
        self, find_start: FindStart, view: PromptView, messages: Sequence[Message], weight: float, rendering: Rendering
    ) -> Turn | None:
        """The turn where its start is found and every check passes; None where it is not found."""
        found, options = find_start(view), rendering.options
        if found is None:
            return None
        last = last_word(found, view, options)
        if options.inline and not reasoning_first(found, view.index, options.inline):
            return None
        ended = self._stop(messages, found.text[:last], found.text.plain(last), rendering)
        end = last + ended.length
        refuse_strangers(found.text, found.start, end, view.index)
        text = found.text[:end] + ended.appended
        start, end = self._learnt(text, found.start, view)
        spans = (Span(start, end, weight),) if start < end else ()
        note = ", ".join(note for note in (str(options), found.how) if note)
        return Turn(view.index, text, found.start, spans, note)

    def _stop(self, messages: Sequence[Message], known: Traced, tail: str, rendering: Rendering) -> Stop:
        """How the last of `messages` ends; `known` is the text up to its last character, `tail` what follows there."""
        key = (tuple(map(_stop_shape, messages)), bool(rendering.tools), rendering.options, tail)
        if key not in self._stops:
            is_plain = not messages[-1].tool_calls and bool(messages[-1].content.strip())
            plain = None if is_plain else self._plain_mark(messages, rendering)
            ending = Ending(tail, _header(rendering, len(messages) - 1), plain)
            self._stops[key] = stop.find(partial(_render, rendering, known), self.marks, messages, ending)
        return self._stops[key]

    def _plain_mark(self, messages: Sequence[Message], rendering: Rendering) -> str:
        """The mark that would end a plain answer in place of the last of `messages`; nothing if none can be found."""
        index, answer = len(messages) - 1, Message("assistant", "probe")
        answered = [*messages[:-1], answer]
        try:
            known = rendering.plain(index, True) + Traced.of(answer.content, owner_of(index))
            text = _render(rendering, known, answered)
            last = last_character(text, index)
            if last is None:
                return ""
            ending = Ending(text.plain(last))
            return stop.find(partial(_render, rendering, text[:last]), self.marks, answered, ending).mark
        except Refusal:
            return ""

    def _learnt(self, text: Traced, start: int, view: PromptView) -> tuple[int, int]:
        """The range of a turn that the rules let learn: all, or what follows the reasoning, or precedes the calls."""
        end = len(text)
        if not self.rules.learn_reasoning and view.message.reasoning:
            parts = (MessagePart.CONTENT, MessagePart.CALL_NAME, MessagePart.ARGUMENT)
            answer = first_character(text, view.index, parts, start)
            start = end if answer is None else answer
        if not self.rules.learn_tool_calls and view.message.tool_calls:
            content = (last for owner, _, last in text.ranges() if owner == owner_of(view.index))
            end = max(content, default=0) or start
        return start, end


def _text_up_to(whole: Rendering, index: int) -> Traced | None:
    """The text of messages[:index + 1], which must stand in that of all; None where the template rewrites it."""
    everything = whole.traced(len(whole.messages))
    if index == len(whole.messages) - 1:
        return everything
    last = last_character(everything, index)
    text = whole.plain(index + 1)
    if last is None or not text.startswith(everything.plain(0, last)):
        return None
    return everything[:last] + text[last:]


def _stop_shape(message: Message) -> Shape:
    """What of a message decides the marks around it."""
    return message.role, bool(message.content.strip()), bool(message.reasoning), len(message.tool_calls)


def _header(rendering: Rendering, index: int) -> str:
    """What the template writes before an answer: the generation prompt, as far as it stands at the end of the text.

    After a tool's answer some templates write none; then it is that after the last question.
    """
    asked = [end for end in range(index, 0, -1) if end == index or rendering.messages[end - 1].role == "user"]
    pairs = ((rendering.plain(end), rendering.plain(end, True)) for end in asked[:2])
    headers = (prompt.removeprefix(bare) for bare, prompt in pairs if prompt.startswith(bare))
    return next((header for header in headers if header.strip()), "")


def _render(rendering: Rendering, known: Traced, messages: Sequence[Message]) -> Traced:
    """Other messages, given to the same template with the same options; `known` is how their text may begin."""
    text = rendering.like(messages)
    if text.startswith(known):
        return known + text[len(known) :]
    return rendering.template.render(messages, tools=rendering.tools, options=rendering.options)


def _reason(views: Mapping[TemplateOptions, PromptView | None], reasons: Mapping[TemplateOptions, str]) -> str:
    """Why nothing proves the turn, in the words that help most: of the first options that render it at all."""
    options, view = next(((options, view) for options, view in views.items() if view), (DEFAULT, None))
    if view is None:
        return next((why for why in reasons.values() if "refuses this conversation" not in why), reasons[DEFAULT])
    opened = answer_start.opens(view)
    if opened and not view.message.reasoning:
        return (
            f"the prompt opens a reasoning block ({opened[0].strip()!r}) that messages[{view.index}] does not"
            " have; give it reasoning, or say reasoning: empty to learn an empty block"
        )
    if options in reasons:
        return reasons[options]
    try:
        refuse_dropped(view.text, view, options)
    except Refusal as refusal:
        return str(refusal)
    return contradiction(view.prompt, view.text)


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
        written_ranges(longest),
        tuple(sorted({edge for turn in turns for edge in (turn.start, len(turn.text))})),
        tuple(dict.fromkeys(turn.note for turn in turns if turn.note)),
        tuple(turn.index for turn in turns),
    )
