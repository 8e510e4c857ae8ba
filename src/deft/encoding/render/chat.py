"""A chat -> texts and learnt spans, under the prompt law.

The text before each learnt span is exactly what the template shows the model at inference, and the span ends with the
mark that stops generation. A chat whose template rewrites its history becomes several texts, each learnt turn in one of
them. What cannot be proven is refused with its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, product
from typing import Any, Literal

from deft.core.types import Message, Rendered, Span
from deft.encoding.render import answer_start, stop
from deft.encoding.render.answer_start import FindStart, PromptView, opened_by
from deft.encoding.render.patterns import Pattern, Turn, learn
from deft.encoding.render.proof import (
    contradiction,
    last_word,
    reasoning_first,
    refuse_dropped,
    refuse_strangers,
    refuse_unshown,
)
from deft.encoding.render.reasoning import ReasoningStyle, apart, may_have_marks, shown
from deft.encoding.render.stop import Ending, Marks, Stop, any_of
from deft.encoding.render.template import Refusal, Rendering, Template
from deft.encoding.render.template_inputs import DEFAULT, PROBE_TOOLS, TIGHT, Space, TemplateOptions, option_sets, probe
from deft.encoding.render.traced import (
    TEMPLATE,
    MessagePart,
    Traced,
    first_character,
    last_character,
    message_of,
    owner_of,
    written_ranges,
)

Reasoning = Literal["auto", "require", "empty"]
"""What becomes of a learnt answer without reasoning where the prompt opens a block of it.

auto     it follows the prompt that asks for none, if the template has a switch for that (`enable_thinking=false`); else
         the empty block that the template itself writes is learnt with it; else it is refused
empty    an empty block is learnt with it
require  every learnt answer without reasoning is refused, whatever the prompt
"""


Marked = Literal["reasoning", "empty", "text"]
"""Marks in a content stood around reasoning, or around nothing; or they are text, as the template has no reasoning."""


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """What of a learnt turn is learnt: its reasoning, its tool calls; and what a missing reasoning means."""

    reasoning: Reasoning = "auto"
    learn_reasoning: bool = True
    learn_tool_calls: bool = True


DEFAULT_RULES = AnswerRules()

GREETING = "the greeting before the first question is not learnt: the template has no prompt for it"

Shape = tuple[Any, ...]
Attempt = tuple[FindStart, TemplateOptions]

_SHAPES = 2_000
"""Shapes that have patterns at a time; beyond, all are found again."""
_VARIANTS = 200
"""Sets of a row's own template variables that are remembered at a time."""


@dataclass(frozen=True)
class ChatRenderer:
    """Renders chats with one template.

    `_stops` remembers the stop rule's answer per shape of conversation, options and characters after the turn, which is
    all that it depends on; it also holds the marks that were found, for the exported generation_config. `_usual`
    remembers which attempt proves a shape of conversation. All three are of one set of template variables: `_variants`
    remembers a renderer for each other one that rows have, and `_ended` the marks of those that are forgotten.
    """

    template: Template
    marks: Marks
    rules: AnswerRules = DEFAULT_RULES
    _stops: dict[tuple[Any, ...], Stop] = field(default_factory=dict, repr=False)
    _patterns: dict[Shape, Pattern] = field(default_factory=dict, repr=False)
    _usual: dict[tuple[str, bool, Space | None], Attempt | None] = field(default_factory=dict, repr=False)
    _variants: dict[str, ChatRenderer] = field(default_factory=dict, repr=False)
    _ended: set[str] = field(default_factory=set, repr=False)

    def of(self, kwargs: Mapping[str, Any]) -> ChatRenderer:
        """What renders rows with these template variables of their own, before those of the run.

        Raises Refusal where one holds a special token, which the template would write as one.
        """
        if not kwargs:
            return self
        key = json.dumps(kwargs, sort_keys=True)
        if key not in self._variants:
            bad = next(
                (name for name, text in kwargs.items() if isinstance(text, str) and self._special.search(text)), ""
            )
            if bad:
                raise Refusal(f"template_kwargs: {bad} holds a special token, which the template would write as one")
            if len(self._variants) >= _VARIANTS:
                self._ended.update(*(each.stop_marks() for each in self._variants.values()))
                self._variants.clear()
            self._variants[key] = ChatRenderer(self.template.with_kwargs(kwargs), self.marks, self.rules)
        return self._variants[key]

    def render(
        self, messages: Sequence[Message], weights: Sequence[float], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Rendered]:
        """One text, or several where history is rewritten; `weights[i]` > 0 says that message i is learnt.

        Raises Refusal where a mask cannot be proven. No learnt message gives the whole text without spans.
        """
        learnt = [index for index, weight in enumerate(weights) if weight > 0]
        if not learnt:
            return [replace(self.whole(messages, 0.0, tools), spans=())]
        chat, spaces = self.apart(messages[: learnt[-1] + 1], learnt)
        rendering = Rendering(self.template, chat, tools)
        shape = None if tools else self._shape(rendering.messages, learnt)
        pattern = self._patterns.get(shape) if shape else None
        rendered = pattern.rendered(rendering, weights) if pattern else None
        if rendered:
            return [rendered]
        turns = self._turns(rendering, learnt, weights, spaces)
        groups = _grouped(turns)
        if shape and len(groups) == 1 and not any(turn.note for turn in turns):
            self._keep(shape, learn(sorted(turns, key=lambda turn: turn.start), rendering, pattern))
        return [_as_rendered(group) for group in groups]

    def whole(self, messages: Sequence[Message], weight: float, tools: Sequence[Mapping[str, Any]] = ()) -> Rendered:
        """The text of all messages, every character of it learnt (train_on: all)."""
        chat, _ = self.apart(messages, range(len(messages)) if weight else ())
        options, text = DEFAULT, self.template.render(chat, tools=tools)
        if weight:
            try:
                refuse_unshown(text, chat)
            except Refusal:
                options = TemplateOptions(no_developer=True)
                text = self.template.render(chat, tools=tools, options=options)
                refuse_unshown(text, chat)
        notes = () if options == DEFAULT else (str(options),)
        return Rendered(str.__str__(text), (Span(0, len(text), weight),), written_ranges(text), notes=notes)

    def stop_marks(self) -> frozenset[str]:
        """The marks that ended the turns seen so far."""
        own = (stop.mark for stop in self._stops.values())
        return frozenset(own).union(self._ended, *(each.stop_marks() for each in self._variants.values()))

    @cached_property
    def shown(self) -> ReasoningStyle:
        """What the template does with reasoning."""
        return shown(self.template)

    def marked(self, message: Message) -> Marked | None:
        """What becomes of marks of reasoning in an assistant's content; None where there are none."""
        if not may_have_marks(message, self.template.marks):
            return None
        if not self.shown.is_taken:
            return "text"
        (found,), _ = self.apart([message])
        return None if found == message else "reasoning" if found.reasoning else "empty"

    def apart(
        self, messages: Sequence[Message], learnt: Collection[int] = ()
    ) -> tuple[list[Message], list[Space | None]]:
        """The messages with their reasoning apart, and the white space of the blocks that their contents had.

        Refusal where a learnt one does not say which of its words are reasoning; others stay as they are. Where the
        template has no reasoning, marks of it are words like any other.
        """
        found: list[tuple[Message, Space | None]] = []
        for index, message in enumerate(messages):
            parted: tuple[Message, Space | None] = message, None
            if may_have_marks(message, self.template.marks) and self.shown.is_taken:
                try:
                    parted = apart(message, self.template.marks, self.shown.asked)
                except Refusal as refusal:
                    if index in learnt:
                        raise Refusal(f"messages[{index}]: {refusal}") from refusal
            found.append(parted)
        return [message for message, _ in found], [space for _, space in found]

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

        None for tool calls, blank fields and special tokens: who wrote them decides whether they are text, and only the
        whole proof follows who wrote what.
        """
        content, reasoning = message.content, message.reasoning
        if message.tool_calls or content.isspace() or reasoning.isspace():
            return None
        if self._special.search(content) or self._special.search(reasoning):
            return None
        return message.role, bool(content), bool(reasoning), bool(message.name), bool(message.tool_call_id)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return any_of(self.marks.special)

    def _turns(
        self, whole: Rendering, learnt: Sequence[int], weights: Sequence[float], spaces: Sequence[Space | None]
    ) -> list[Turn]:
        """The learnt turns; Refusal where one cannot be proven.

        A greeting, which nobody's message comes before, is context where the template has no prompt for it.
        """
        first, *rest = learnt
        if not rest or any(message.role != "system" for message in whole.messages[:first]):
            return [self._turn(whole, index, weights[index], spaces[index]) for index in learnt]
        turns = [self._turn(whole, index, weights[index], spaces[index]) for index in rest]
        try:
            return [self._turn(whole, first, weights[first], spaces[first]), *turns]
        except Refusal:
            note = ", ".join(filter(None, (turns[0].note, GREETING)))
            return [replace(turns[0], note=note), *turns[1:]]

    def _turn(self, whole: Rendering, index: int, weight: float, space: Space | None) -> Turn:
        """The first attempt that proves the turn; Refusal where none does, with the ordinary reason."""
        messages = whole.messages[: index + 1]
        if self.rules.reasoning == "require" and not messages[-1].reasoning.strip():
            raise Refusal(f"messages[{index}] has no reasoning, and reasoning: require asks for it")
        try:
            turn = self._by_prefix(whole, index, weight)
        except Refusal:
            turn = None
        if turn:
            return turn
        usual = self._usual_attempt(messages, whole.tools, space)
        attempts = self._attempts(messages, whole.tools, space)
        return self._first_of(chain([usual] if usual else [], attempts), messages, whole.tools, weight, space)[0]

    def _by_prefix(self, whole: Rendering, index: int, weight: float) -> Turn | None:
        """The turn in the text of all messages; None where its prompt does not begin that, or Refusal."""
        messages, prompt = whole.messages[: index + 1], whole.plain(index, True)
        if not messages[-1].reasoning and opened_by(prompt, self.template.marks, self.shown.opened):
            return None
        text = _text_up_to(whole, index)
        if text is None:
            return None
        view = self._view(messages, Traced.of(prompt, TEMPLATE), text)
        return self._proven(answer_start.prefix, view, messages, weight, whole)

    def _usual_attempt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], space: Space | None
    ) -> Attempt | None:
        """What proves the turn of a made-up conversation of the same shape: tried first, it saves the others.

        It depends on the shape alone, so that no row's examples depend on the rows before it.
        """
        probes = [probe(message, index) for index, message in enumerate(messages)]
        key = (repr(probes), bool(tools), space)
        if key not in self._usual:
            schemas = PROBE_TOOLS if tools else ()
            attempts = self._attempts(probes, schemas, space)
            try:
                self._usual[key] = self._first_of(attempts, probes, schemas, 1.0, space)[1]
            except Refusal:
                self._usual[key] = None
        return self._usual[key]

    def _attempts(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], space: Space | None
    ) -> Iterator[Attempt]:
        """All ways to find the turn, those first that say least.

        Reasoning inside the content comes after that in a field, an empty block last, unless it is asked for.
        """
        known = list(option_sets(self.template, messages, tools, space or TIGHT))
        fields, inline = ([each for each in known if bool(each.inline) == is_inline] for is_inline in (False, True))
        is_written = self.rules.reasoning == "empty" or space is not None
        emptied = (answer_start.emptied, answer_start.empty)[: 1 + is_written]
        if self.rules.reasoning == "empty":
            yield from product(emptied, fields)
        yield from product(answer_start.AS_WRITTEN, fields)
        yield from product(answer_start.AS_WRITTEN, inline)
        yield from product(answer_start.MENDED, known)
        yield from product(emptied, fields)

    def _first_of(
        self,
        attempts: Iterable[Attempt],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        weight: float,
        space: Space | None,
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
                    views[options] = self._view(messages, prompt, rendering.traced(len(messages)), space)
                view = views[options]
                turn = view and self._proven(find_start, view, messages, weight, rendering)
                if turn:
                    return turn, (find_start, options)
            except Refusal as refusal:
                reasons.setdefault(options, str(refusal))
        raise Refusal(_reason(views, reasons))

    def _view(
        self, messages: Sequence[Message], prompt: Traced, text: Traced, space: Space | None = None
    ) -> PromptView:
        marks, seen = self.template.marks, self.shown
        return PromptView(prompt, text, len(messages) - 1, messages[-1], space, marks, seen.spelling, seen.opened)

    def _proven(
        self, find_start: FindStart, view: PromptView, messages: Sequence[Message], weight: float, rendering: Rendering
    ) -> Turn | None:
        """The turn where its start is found and every check passes; None where it is not found."""
        found, options = find_start(view), rendering.options
        if found is None:
            return None
        last = last_word(found, view, options)
        refuse_unshown(found.text, messages[:-1])
        if options.inline and not reasoning_first(found, view.index, options.inline.marks):
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
            index = len(messages) - 1
            ending = Ending(tail, _header(rendering, index), plain, _opening(known, index))
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


def _opening(text: Traced, index: int) -> str:
    """What the template writes between the words of the message before and those of messages[index]."""
    first = next(start for owner, start, _ in text.ranges() if message_of(owner) == index)
    return text.plain(
        max((end for owner, _, end in text.ranges() if owner != TEMPLATE and end <= first), default=0), first
    )


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
