"""Where an answer begins in a text, seen from the inference prompt: by prefix, or by one of a few fallbacks.

Whatever the way, the text before the answer is the inference prompt to the character; a fallback only says which
characters of the conversation's own text come after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deft.core.types import Message
from deft.encoding.render.template_inputs import ReasoningMarks
from deft.encoding.render.traced import (
    TEMPLATE,
    MessagePart,
    Traced,
    first_character,
    message_of,
    owner_of,
)


@dataclass(frozen=True, slots=True)
class PromptView:
    """The last of some messages, rendered: the inference prompt before it, and the text with it.

    message  the last message, reasoning that its content opens with taken out of it
    block    what stood around that reasoning in the content: opening, closing; None where reasoning was a field
    marks    the marks of reasoning that the template knows
    """

    prompt: Traced
    text: Traced
    index: int
    message: Message
    block: ReasoningMarks | None
    marks: Sequence[ReasoningMarks]


@dataclass(frozen=True, slots=True)
class Located:
    """A text whose characters before `start` are the inference prompt; `how` it was found, nothing for the prefix."""

    text: Traced
    start: int
    how: str


def prefix(view: PromptView) -> Located | None:
    """The prompt is the beginning of the text: the answer is the rest."""
    return Located(view.text, len(view.prompt), "") if view.text.startswith(view.prompt) else None


def header(view: PromptView) -> Located | None:
    """The answer's header in the text is that of the prompt, maybe but for white space.

    prompt  ... \\n[bot]:\\n     text  ... \\n\\n[bot]:\\nHi     ->  ... \\n[bot]:\\nHi
    """
    found = _aligned(view.prompt, view)
    if found is None:
        return None
    at, how = found
    is_opened = any(message_of(owner) == view.index for owner, _ in view.text[:at].runs)
    how += ", the prompt already wrote the answer's opening" if is_opened else ""
    return _joined(view.prompt, view.text[at:], how)


def closed(view: PromptView) -> Located | None:
    """The prompt closes an empty reasoning block that the text does not show.

    prompt  [bot]<think></think>     text  [bot]Hi     ->  [bot]<think></think>Hi
    """
    if view.message.reasoning:
        return None
    for opening, closing in view.marks:
        end = _found(_block(opening, closing) + r"\s*\Z", view.prompt)
        found = None if end is None else _aligned(view.prompt[:end], view)
        if found is not None:
            tail = _without_block(view.text[found[0] :], opening, closing)
            return _joined(view.prompt, tail, "the prompt closes an empty reasoning block")
    return None


def stripped(view: PromptView) -> Located | None:
    """The template strips the answer's own reasoning: it is put back, between the template's marks.

    prompt  [bot]<think>\\n     text  [bot]Hi     ->  [bot]<think>\\nHm.\\n</think>\\n\\nHi
    """
    if not view.message.reasoning or first_character(view.text, view.index, (MessagePart.REASONING,)) is not None:
        return None
    if _closes(view):
        return None
    for opening, closing in view.marks if view.block is None else [view.block]:
        end = _found(re.escape(opening.rstrip()) + r"\s*\Z", view.prompt)
        found = _aligned(view.prompt if end is None else view.prompt[:end], view)
        if found is not None:
            thought = _thought(view, opening, closing, is_open=end is not None)
            answer = _without_block(view.text[found[0] :], opening, closing)
            tail = thought + _spaced(answer, _space_before(view.message.content) if view.block else "\n\n")
            return Located(view.prompt + tail, len(view.prompt), "the template strips the answer's own reasoning")
    return None


def empty(view: PromptView) -> Located | None:
    """`reasoning: empty`: the block that the prompt opens is closed at once, and that is learnt.

    prompt  [bot]<think>\\n     text  [bot]Hi     ->  [bot]<think>\\n\\n</think>\\n\\nHi
    """
    opened = opens(view)
    if opened is None or view.message.reasoning:
        return None
    opening, closing = opened
    end = _found(re.escape(opening.rstrip()) + r"\s*\Z", view.prompt)
    found = _aligned(view.prompt[:end], view)
    if found is None:
        return None
    close = "\n" + closing.strip() + "\n\n" if view.prompt[-1:].isspace() else closing.strip()
    tail = close + _without_block(view.text[found[0] :], opening, closing)
    return Located(view.prompt + tail, len(view.prompt), "an empty reasoning block is learnt")


def opens(view: PromptView) -> ReasoningMarks | None:
    """The marks of the reasoning block that the prompt opens and does not close."""
    ending = view.prompt.rstrip()
    return next((marks for marks in view.marks if ending.endswith(marks[0].rstrip())), None)


def _closes(view: PromptView) -> bool:
    """True if the prompt ends with a reasoning block that is closed: no reasoning can follow."""
    ending = view.prompt.rstrip()
    return any(ending.endswith(closing.strip()) for _, closing in view.marks)


FindStart = Callable[[PromptView], Located | None]

FALLBACKS: tuple[FindStart, ...] = (header, closed, stripped)
"""In the order in which they are tried, after `prefix`."""


def _aligned(prompt: Traced, view: PromptView) -> tuple[int, str] | None:
    """One past the place in the text that is the end of `prompt`, and how it was found."""
    text = view.text
    if text.startswith(prompt):
        return len(prompt), "same header"
    before, after = _last_other(prompt, view.index), _last_other(text, view.index)
    head = prompt.plain(before[0])
    if before[1] != after[1] or not head.strip():
        return None
    if text.startswith(head, after[0]):
        return after[0] + len(head), "same header"
    end = _same_but_space(head, text, after[0])
    return None if end is None else (end, "same but for white space")


def _last_other(text: Traced, index: int) -> tuple[int, int]:
    """One past the last character that an earlier message or a tool wrote, and its owner."""
    found = 0, TEMPLATE
    for owner, _, end in text.ranges():
        if message_of(owner) == index:
            break
        if owner != TEMPLATE:
            found = end, owner
    return found


def _same_but_space(head: str, text: str, at: int) -> int | None:
    """One past the characters of `text` from `at` on that are those of `head`, white space aside.

    >>> _same_but_space(" [bot]:\\n", "Hi\\n\\n[bot]: Hello", 2)
    10
    """
    for character in "".join(head.split()):
        while at < len(text) and text[at].isspace():
            at += 1
        if at >= len(text) or text[at] != character:
            return None
        at += 1
    return at


def _joined(prompt: Traced, tail: Traced, how: str) -> Located:
    """The tail after the prompt, without the template's white space that the prompt already ends with."""
    ending = prompt[len(prompt.rstrip()) :]
    if ending and how.startswith("same but"):
        spaces = _leading_space(tail)
        tail = tail[len(ending) if tail[:spaces].startswith(ending) else spaces :]
    return Located(prompt + tail, len(prompt), how)


def _leading_space(text: Traced) -> int:
    """How many characters of white space the template wrote at the beginning."""
    written = _opening(text)
    return len(written) - len(written.lstrip())


def _opening(text: Traced) -> str:
    """What the template wrote before anything else."""
    owner, length = text.runs[0] if text.runs else (TEMPLATE, 0)
    return text.plain(0, length) if owner == TEMPLATE else ""


def _thought(view: PromptView, opening: str, closing: str, is_open: bool) -> Traced:
    """The reasoning with its marks, as far as the prompt has not written them."""
    words = view.message.reasoning
    words = words.lstrip() if view.prompt[-1:].isspace() or not is_open else words
    start = "" if is_open else opening + ("" if opening.endswith("\n") else "\n")
    if view.block is None:
        words, closing = words.rstrip(), "\n" + closing.strip()
    return start + Traced.of(words, owner_of(view.index, MessagePart.REASONING)) + closing


def _spaced(answer: Traced, space: str) -> Traced:
    """The answer with at least this white space before it."""
    return answer if answer[:1].isspace() else space + answer


def _space_before(content: str) -> str:
    return content[: len(content) - len(content.lstrip())]


def _block(opening: str, closing: str) -> str:
    """A pattern for an empty block of reasoning, or for what is left of one."""
    return rf"(?:{re.escape(opening.strip())}\s*)?{re.escape(closing.strip())}"


def _without_block(text: Traced, opening: str, closing: str) -> Traced:
    """A text without the empty block of reasoning that the template wrote at its beginning."""
    found = re.match(rf"\s*{_block(opening, closing)}\s*", _opening(text))
    return text[found.end() :] if found else text


def _found(pattern: str, text: str) -> int | None:
    """Where the pattern begins; None if it does not stand there."""
    found = re.search(pattern, text)
    return found.start() if found else None
