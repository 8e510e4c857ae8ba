"""Where an answer begins in a text, seen from the inference prompt: by prefix, or by one of a few fallbacks.

Whatever the way, the text before the answer is the inference prompt to the character; a fallback only says which
characters of the conversation's own text come after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from deft.core.types import Message
from deft.encoding.render.template_inputs import TIGHT, ReasoningMarks, Space, Spelling
from deft.encoding.render.traced import TEMPLATE, MessagePart, Traced, first_character, message_of, owner_of


@dataclass(frozen=True, slots=True)
class PromptView:
    """The last of some messages, rendered: the inference prompt before it, and the text with it.

    message  the last message, its reasoning apart from its content
    space    the white space of the block of reasoning in the row's content; None where that has none
    marks    the marks of reasoning that the template knows
    spelled  how the template writes reasoning where it shows any; None if it never does
    opened   what a prompt that opens a block of reasoning ends with, and what closes that; None if not known
    """

    prompt: Traced
    text: Traced
    index: int
    message: Message
    space: Space | None
    marks: Sequence[ReasoningMarks]
    spelled: Spelling | None
    opened: ReasoningMarks | None = None

    @property
    def spellings(self) -> tuple[Spelling, ...]:
        """How the reasoning may be written: as the template does; if it never does, its marks with the row's space."""
        space = self.space or TIGHT
        return (self.spelled,) if self.spelled else tuple(map(space.around, self.marks))


@dataclass(frozen=True, slots=True)
class Located:
    """A text whose characters before `start` are the inference prompt; `how` it was found, nothing for the prefix."""

    text: Traced
    start: int
    how: str


EMPTY = "an empty reasoning block is learnt"
"""What is said of an answer without reasoning that is learnt where the prompt asks for some."""


def prefix(view: PromptView) -> Located | None:
    """The prompt is the beginning of the text: the answer is the rest."""
    return None if _asks_in_vain(view) else _prefix(view)


def header(view: PromptView) -> Located | None:
    """The answer's header in the text is that of the prompt, maybe but for white space.

    prompt  ... \\n[bot]:\\n     text  ... \\n\\n[bot]:\\nHi     ->  ... \\n[bot]:\\nHi
    """
    return None if _asks_in_vain(view) else _header(view)


def emptied(view: PromptView) -> Located | None:
    """The template itself closes the block that the prompt opens, before an answer without reasoning.

    prompt  [bot]<think>\\n     text  [bot]<think>\\n\\n</think>\\n\\nHi     ->  the text
    """
    marks = opens(view)
    found = (_prefix(view) or _header(view)) if marks and not view.message.reasoning else None
    if marks is None or found is None or marks[1].strip() not in _opening(found.text[found.start :]):
        return None
    return replace(found, how=", ".join(filter(None, (found.how, EMPTY))))


def _asks_in_vain(view: PromptView) -> bool:
    """True if the prompt opens a block of reasoning and the answer has none."""
    return not view.message.reasoning and opens(view) is not None


def _prefix(view: PromptView) -> Located | None:
    return Located(view.text, len(view.prompt), "") if view.text.startswith(view.prompt) else None


def _header(view: PromptView) -> Located | None:
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


def opened(view: PromptView) -> Located | None:
    """The prompt opens the block, and the text shows the reasoning without its opening.

    prompt  [bot]<think>\\n     text  [bot]Hm.</think>Hi     ->  [bot]<think>\\nHm.</think>Hi
    """
    marks = opens(view)
    if marks is None or not view.message.reasoning:
        return None
    found = _aligned(view.prompt[: _found(re.escape(marks[0].rstrip()) + r"\s*\Z", view.prompt)], view)
    if found is None or first_character(view.text, view.index, (MessagePart.REASONING,)) != found[0]:
        return None
    how = found[1] + ", the prompt already wrote the reasoning's opening"
    return Located(view.prompt + view.text[found[0] :], len(view.prompt), how)


def stripped(view: PromptView) -> Located | None:
    """The template strips the answer's own reasoning: it is put back, spelled as in turns that show theirs.

    prompt  [bot]<think>\\n     text  [bot]Hi     ->  [bot]<think>\\nHm.\\n</think>\\n\\nHi

    A template that shows none gets its marks, with the white space that the row has around them.
    """
    if not view.message.reasoning or first_character(view.text, view.index, (MessagePart.REASONING,)) is not None:
        return None
    if _closes(view):
        return None
    words = Traced.of(view.message.reasoning, owner_of(view.index, MessagePart.REASONING))
    for spelling in view.spellings:
        end = _found(re.escape(spelling.opening.rstrip()) + r"\s*\Z", view.prompt)
        found = _aligned(view.prompt if end is None else view.prompt[:end], view)
        if found is not None:
            begun = spelling.opening if end is None else _unwritten(spelling.opening, view.prompt)
            tail = begun + words + _closed_by(spelling, view.text[found[0] :])
            return Located(view.prompt + tail, len(view.prompt), "the template strips the answer's own reasoning")
    return None


def empty(view: PromptView) -> Located | None:
    """The block that the prompt opens is closed at once, and that is learnt; the template itself does not close it.

    prompt  [bot]<think>\\n     text  [bot]Hi     ->  [bot]<think>\\n\\n</think>\\n\\nHi
    """
    if not _asks_in_vain(view):
        return None
    for spelling in view.spellings:
        end = _found(re.escape(spelling.opening.rstrip()) + r"\s*\Z", view.prompt)
        found = None if end is None else _aligned(view.prompt[:end], view)
        if found is not None:
            tail = _unwritten(spelling.opening, view.prompt) + _closed_by(spelling, view.text[found[0] :])
            return Located(view.prompt + tail, len(view.prompt), EMPTY)
    return None


def opens(view: PromptView) -> ReasoningMarks | None:
    """The marks of the reasoning block that the prompt opens and does not close."""
    return opened_by(view.prompt, view.marks, view.opened)


def opened_by(prompt: str, marks: Sequence[ReasoningMarks], opened: ReasoningMarks | None) -> ReasoningMarks | None:
    """The marks of the block that this prompt ends with; `opened` as in PromptView.

    >>> opened_by("[bot]<think>\\n", [("<think>", "</think>")], None)
    ('<think>', '</think>')
    """
    ending = prompt.rstrip()
    known = (*marks, opened) if opened else marks
    return next((each for each in known if ending.endswith(each[0].rstrip())), None)


def _closes(view: PromptView) -> bool:
    """True if the prompt ends with a reasoning block that is closed: no reasoning can follow."""
    ending = view.prompt.rstrip()
    return any(ending.endswith(closing.strip()) for _, closing in view.marks)


FindStart = Callable[[PromptView], Located | None]

AS_WRITTEN: tuple[FindStart, ...] = (prefix, header, opened)
"""The text is what the template wrote after the prompt, in the order in which they are tried."""

MENDED: tuple[FindStart, ...] = (closed, stripped)
"""A block of reasoning is taken out of the text or put back into it; they are tried after the others."""


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


def _unwritten(opening: str, prompt: str) -> str:
    """What of an opening's white space the prompt, which ends with its mark, has not written yet."""
    space, written = opening[len(opening.rstrip()) :], prompt[len(prompt.rstrip()) :]
    return space.removeprefix(written) if space.startswith(written) else ""


def _closed_by(spelling: Spelling, text: Traced) -> Traced:
    """What closes a block, then the answer without the empty block, or the space, that the template wrote before it."""
    answer = _without_block(text, *spelling.marks)
    return (spelling.closing.rstrip() if answer[:1].isspace() else spelling.closing) + answer


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
