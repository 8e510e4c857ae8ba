"""What is checked of one learnt turn: all its words stand in it, nobody else's do, and why it is refused otherwise."""

from __future__ import annotations

import json
from collections.abc import Sequence

from deft.core.types import Message, ToolCall
from deft.encoding.render.answer_start import Located, PromptView
from deft.encoding.render.template import Refusal
from deft.encoding.render.template_inputs import ReasoningMarks, TemplateInputs, TemplateOptions, leaves
from deft.encoding.render.traced import (
    TEMPLATE,
    MessagePart,
    Traced,
    first_character,
    last_character,
    message_of,
    owner_of,
)


def last_word(found: Located, view: PromptView, options: TemplateOptions) -> int:
    """One past the last character of the turn; Refusal unless it holds all its words."""
    refuse_dropped(found.text, view, options)
    last = last_character(found.text, view.index)
    if last is None or last <= found.start:
        raise Refusal(f"messages[{view.index}] has no words to learn")
    said, called = (
        first_character(found.text, view.index, (part,), found.start)
        for part in (MessagePart.CONTENT, MessagePart.CALL_NAME)
    )
    if said is not None and called is not None and said > called:
        what = (
            f"the template writes the words of messages[{view.index}] behind its tool calls, and results between them"
        )
        raise Refusal(f"{what}; take the words out, or give them as reasoning")
    return last


def refuse_dropped(text: Traced, view: PromptView, options: TemplateOptions) -> None:
    """Refusal where words of the turn are not in `text`."""
    dropped = _dropped(text, view.message, view.index, options)
    if dropped:
        where = f"messages[{view.index}], which is learnt"
        raise Refusal(f"the template drops words of {where}: {', '.join(dropped)}")


def refuse_unshown(text: Traced, messages: Sequence[Message]) -> None:
    """Refusal where the words of a message that is not the assistant's are not all in `text`: nobody would obey them.

    What the assistant said before may be missing, as templates that strip old reasoning and calls do it at inference.
    """
    counts: dict[int, int] = {}
    for owner, length in text.runs:
        counts[owner] = counts.get(owner, 0) + length
    for index, message in enumerate(messages):
        owner = owner_of(index)
        if message.role == "assistant" or counts.get(owner, 0) >= len(message.content.strip()):
            continue
        shown = without_space(_written_by(text, owner))
        if not any(form in shown for form in forms(message.content)):
            what = f"the template shows {_shown(_written_by(text, owner))} of messages[{index}] ({message.role})"
            raise Refusal(f"{what}; choose another with template=, or take the message out")


def refuse_strangers(text: Traced, start: int, end: int, index: int) -> None:
    """Refusal where text[start:end] holds what another message, or a tool, wrote."""
    if any(owner != TEMPLATE and message_of(owner) != index for owner, _ in text[start:end].runs):
        raise Refusal(f"the template writes another message inside messages[{index}]")


def reasoning_first(found: Located, index: int, marks: ReasoningMarks) -> bool:
    """True if the block of reasoning comes first in the answer, or the prompt has opened it and not closed it."""
    opening, closing = marks
    first = first_character(found.text, index, (MessagePart.REASONING,), found.start)
    before, prompt = found.text[found.start : first].strip(), found.text[: found.start].rstrip()
    return prompt.endswith(opening) if not before else before == opening and not prompt.endswith(closing)


def contradiction(prompt: str, text: str) -> str:
    """What the prompt and the conversation's text have at the first character where they differ."""
    at = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    shown, written = str.__getitem__(prompt, slice(at, at + 30)), str.__getitem__(text, slice(at, at + 30))
    return (
        f"the template contradicts itself: at inference the prompt has {shown!r} "
        f"where the conversation has {written!r} (character {at})"
    )


def _dropped(text: Traced, message: Message, index: int, options: TemplateOptions) -> list[str]:
    """The parts of messages[index] whose words are not all in `text`, each with what is left of it."""
    parts = ((MessagePart.CONTENT, message.content), (MessagePart.REASONING, message.reasoning))
    left = {part: _written_by(text, owner_of(index, part)) for part, _ in parts}
    found = [
        f"{part.name.lower()} ({_shown(left[part])} is left)"
        for part, words in parts
        if without_space(left[part]) != without_space(words)
    ]
    if message.tool_calls and not _has_calls(text, message.tool_calls, index, options):
        found.append("tool calls")
    return found


def _has_calls(text: Traced, calls: Sequence[ToolCall], index: int, options: TemplateOptions) -> bool:
    names = _written_by(text, owner_of(index, MessagePart.CALL_NAME))
    given = [leaf for call in calls for leaf in leaves(TemplateInputs(options).arguments(call))]
    return all(call.name in names for call in calls) and all(
        without_space(_stretch(text, owner_of(index, MessagePart.ARGUMENT, leaf))) in forms(words)
        for leaf, words in enumerate(given, start=1)
    )


def _written_by(text: Traced, owner: int) -> str:
    """What one owner wrote, in the order of the text.

    >>> _written_by("<" + Traced.of("a", 5) + "|" + Traced.of("b", 5) + ">", 5)
    'ab'
    """
    return "".join(text.plain(start, end) for each, start, end in text.ranges() if each == owner)


def _stretch(text: Traced, owner: int) -> str:
    """The text from the first to the last character of an owner, whoever wrote what stands between them.

    Templates that take an argument's text for an object write something after each of its letters.

    >>> _stretch(Traced.of("a", 5) + "=, " + Traced.of("b", 5) + ">", 5)
    'a=, b'
    """
    found = [(start, end) for each, start, end in text.ranges() if each == owner]
    return text.plain(found[0][0], found[-1][1]) if found else ""


def forms(words: str) -> set[str]:
    """How a text may stand in a template's output: as it is, as Python writes it, in JSON, in JSON inside JSON."""
    found = {words, repr(words)[1:-1]}
    for is_ascii in (False, True):
        once = json.dumps(words, ensure_ascii=is_ascii)[1:-1]
        found |= {once, json.dumps(once, ensure_ascii=is_ascii)[1:-1]}
    return set(map(without_space, found))


def without_space(text: str) -> str:
    """The text without white space, which templates trim and tokenizers move."""
    return "".join(text.split())


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 40 else text[:40] + "...") if text else "nothing"
