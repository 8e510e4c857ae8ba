"""The reasoning of an assistant's turn, wherever a row has it, and how a template writes reasoning.

A row has it in a field, or in the content between marks that some model writes. `apart` makes both one thing: a message
with `reasoning` and `content`. How that is written is the template's to say: `shown` renders made-up turns and takes
the spelling of one that shows its reasoning. A template that shows none leaves the row's own, between its own marks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deft.core.types import Message, ToolCall
from deft.encoding.render.answer_start import opened_by
from deft.encoding.render.template import Refusal, Rendering, Template
from deft.encoding.render.template_inputs import KNOWN_MARKS, PROBE_TOOLS, ReasoningMarks, Space, Spelling, option_sets
from deft.encoding.render.traced import TEMPLATE, MessagePart, Traced, first_character, owner_of

_THINK = KNOWN_MARKS[0]
_SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
_TELLING = (_THINK[0], _SOLUTION[1], *(closing for _, closing in KNOWN_MARKS))
_MARGIN = re.compile(r"(?:\s*\n|\s+)?")
"""The white space between a block and the answer; not the indentation of the answer's first line."""


@dataclass(frozen=True, slots=True)
class _Thought:
    """The reasoning between marks in a content; `opening` is missing where the prompt had written it."""

    opening: str
    words: str
    rest: str


def apart(
    message: Message, marks: Sequence[ReasoningMarks] = (), asked: ReasoningMarks = KNOWN_MARKS[0]
) -> tuple[Message, Space | None]:
    r"""An assistant's message with the reasoning that its content has as its reasoning, and the block's white space.

    marks  those of the template
    asked  those of the block that its prompt opens: the row may lack what the prompt has written

    >>> message, space = apart(Message("assistant", "<think>\nHm.</think>\n4."))
    >>> message.reasoning, message.content, space
    ('Hm.', '4.', Space(opened='\n', closing='', after='\n'))

    Refusal where a block is not closed, or stands anywhere but in front, or where the field says something else.
    """
    if message.role != "assistant":
        return message, None
    known = tuple(dict.fromkeys((*marks, _THINK)))
    message = replace(message, content=_without_solution(message.content))
    block = _whole_block(message.content) or _half_block(message.content, (_THINK, asked))
    _check_rest(block.rest if block else message.content, known, is_answer=block is not None)
    field = _bare(message.reasoning, known)
    if block is None:
        return replace(message, reasoning=field), None
    said = _bare(block.words.strip(), known)
    if said and field and said.split() != field.split():
        raise Refusal("its reasoning stands twice, in a field and otherwise in its content; keep one of them")
    after = _MARGIN.match(block.rest)
    content = block.rest[after.end() :] if after else block.rest
    return replace(message, content=content, reasoning=field or said), _space(block, content)


def _without_solution(content: str) -> str:
    r"""The content without OpenThoughts' marks around its answer, which no template knows.

    >>> _without_solution("<|end_of_thought|>\n\n<|begin_of_solution|>\n\n4.\n\n<|end_of_solution|>")
    '<|end_of_thought|>\n\n4.'
    """
    before, opened, answer = content.partition(_SOLUTION[0])
    answer, closed, after = answer.rpartition(_SOLUTION[1])
    return before + answer.strip() if opened and closed and not after.strip() else content


def _bare(reasoning: str, known: Sequence[ReasoningMarks]) -> str:
    """The reasoning without marks that it begins and ends with; Refusal where it has some inside.

    >>> _bare("<think>\\nHm.\\n</think>", KNOWN_MARKS), _bare(" Hm.", KNOWN_MARKS)
    ('Hm.', ' Hm.')
    """
    for opening, closing in known:
        words = reasoning.strip().removeprefix(opening.rstrip()).removesuffix(closing)
        reasoning = reasoning if words == reasoning.strip() else words.strip()
    for mark in (mark.strip() for pair in known for mark in pair):
        if mark in reasoning:
            raise Refusal(f"it has {mark!r} inside its reasoning; a turn has one block, in front of its answer")
    return reasoning


def _whole_block(content: str) -> _Thought | None:
    """The block that a content begins with, between marks of any model."""
    begun = content.lstrip()
    for opening, closing in KNOWN_MARKS:
        words, found, rest = begun.removeprefix(opening.rstrip()).partition(closing)
        if begun.startswith(opening.rstrip()) and found:
            return _Thought(opening, words, rest)
    return None


def _half_block(content: str, known: Sequence[ReasoningMarks]) -> _Thought | None:
    """What stands before a closing mark whose opening is missing: the prompt had written it."""
    for opening, closing in known:
        words, found, rest = content.partition(closing)
        if found and opening.rstrip() not in content:
            return _Thought("", words, rest)
    return None


def _check_rest(rest: str, known: Sequence[ReasoningMarks], is_answer: bool) -> None:
    """Refusal where a mark of reasoning stands in `rest`, which is an answer or a content without a block."""
    for mark in (mark.strip() for pair in known for mark in pair):
        if mark not in rest:
            continue
        if is_answer:
            raise Refusal(f"it has {mark!r} after its reasoning; a turn has one block, in front of its answer")
        if rest.lstrip().startswith(mark):
            raise Refusal(f"its content opens {mark!r} and never closes it; close the block, or take the mark out")
        raise Refusal(f"it has {mark!r} in the middle of its content; the reasoning comes first, so put it in front")


def _space(block: _Thought, content: str) -> Space:
    words = block.words.strip()
    opened, _, closing = block.words.partition(words) if words else (block.words, "", "")
    return Space(opened, closing, block.rest[: len(block.rest) - len(content)])


def may_have_marks(message: Message, marks: Sequence[ReasoningMarks] = ()) -> bool:
    """True if an assistant's message has a closing mark of any model's reasoning, `<think>`, or one of `marks`.

    >>> (
    ...     may_have_marks(Message("assistant", "<reasoning>2 + 2</reasoning>4.")),
    ...     may_have_marks(Message("user", "<think>")),
    ... )
    (True, False)
    """
    if message.role != "assistant":
        return False
    mine = (mark.strip() for pair in marks for mark in pair)
    words = message.content + message.reasoning
    return any(mark in words for mark in (*_TELLING, *mine))


@dataclass(frozen=True, slots=True)
class ReasoningStyle:
    """Whether a template takes reasoning at all, and how it writes it where it shows any.

    spelling  where it stands between known marks
    opened    what its prompt ends with where that opens a block of any kind, and what closes that
    asked     the known marks of the block that its prompt opens; those that any model may write where it opens none
    """

    is_taken: bool
    spelling: Spelling | None = None
    opened: ReasoningMarks | None = None
    asked: ReasoningMarks = _THINK


_ASKED, _ANSWERED = Message("user", "probe"), Message("assistant", "probe")
_REASONED = Message("assistant", "probe", reasoning="probe")
_CALLED = Message("assistant", "", reasoning="probe", tool_calls=(ToolCall("probe", {"a": "b"}, "000000000"),))
_PROBES = ((_ASKED, _REASONED), (_ASKED, _REASONED, _ASKED, _REASONED), (_ASKED, _CALLED))
"""Conversations whose last turn has reasoning: a template may hide that of some and show that of others."""


def shown(template: Template) -> ReasoningStyle:
    """What made-up turns say of a template and reasoning.

    >>> shown(
    ...     Template("{% for m in messages %}<think>{{ m.reasoning }}</think> {{ m.content }}{% endfor %}", {})
    ... ).spelling
    Spelling(opening='<think>', closing='</think> ')
    """
    is_taken, opened, asked = bool(template.marks), _opened(template), _asked(template)
    for messages in _PROBES:
        tools = PROBE_TOOLS if messages[-1].tool_calls else ()
        for options in option_sets(template, messages, tools):
            if options.inline is not None:
                continue
            try:
                text = Rendering(template, messages, tools, options).traced(len(messages))
            except Refusal:
                continue
            at = first_character(text, len(messages) - 1, (MessagePart.REASONING,))
            if at is None:
                continue
            is_taken = True
            spelling = _spelling(text, at, len(messages) - 1, template.marks)
            if spelling:
                return ReasoningStyle(True, spelling, opened, asked)
    return ReasoningStyle(is_taken, None, opened, asked)


def _asked(template: Template) -> ReasoningMarks:
    try:
        return opened_by(Rendering(template, (_ASKED,)).plain(1, True), template.marks, None) or _THINK
    except Refusal:
        return _THINK


def _opened(template: Template) -> ReasoningMarks | None:
    """The generation prompt's header and what closes a block, where reasoning follows the one and always the other."""
    rendering, plain = Rendering(template, (_ASKED, _REASONED)), Rendering(template, (_ASKED, _ANSWERED))
    try:
        bare, prompt, text = rendering.plain(1), rendering.plain(1, True), rendering.traced(2)
        at = first_character(text, 1, (MessagePart.REASONING,))
        closing = text.plain(len(prompt) + len(_REASONED.reasoning)).partition(_REASONED.content)[0]
        is_closed = plain.plain(2).startswith(prompt + closing)
    except Refusal:
        return None
    if at != len(prompt) or not prompt.startswith(bare) or not closing.strip() or not is_closed:
        return None
    return prompt.removeprefix(bare), closing


def _spelling(text: Traced, start: int, index: int, marks: Sequence[ReasoningMarks]) -> Spelling | None:
    """What the template writes around the reasoning that begins at `start`, where that is one of `marks`."""
    owner = owner_of(index, MessagePart.REASONING)
    end = max(end for each, _, end in text.ranges() if each == owner)
    written = next((each_end for each, at, each_end in text.ranges() if each == TEMPLATE and at == end), end)
    before, after = text.plain(0, start), text.plain(end, written)
    for opening, closing in marks:
        begun = before.rfind(opening.strip())
        found = re.match(rf"\s*{re.escape(closing.strip())}\s*", after)
        if begun >= 0 and found and not before[begun:].removeprefix(opening.strip()).strip():
            return Spelling(before[begun:], found[0])
    return None
