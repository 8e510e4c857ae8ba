"""Which words of a message stand in a text, and which the template has dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from deft.core.types import Message
from deft.encoding.render import handing
from deft.encoding.render.handing import Way
from deft.encoding.render.provenance import (
    TEMPLATE,
    Part,
    Traced,
    message_of,
    owner_of,
    part_of,
)


def by_owner(text: Traced) -> dict[int, str]:
    """What each owner wrote, in the order of the text.

    >>> by_owner("<" + Traced.of("a", 5) + "|" + Traced.of("b", 5) + ">")
    {-1: '<|>', 5: 'ab'}
    """
    found: dict[int, list[str]] = {}
    at = 0
    for owner, length in text.runs:
        found.setdefault(owner, []).append(str.__getitem__(text, slice(at, at + length)))
        at += length
    return {owner: "".join(pieces) for owner, pieces in found.items()}


def dropped(text: Traced, message: Message, index: int, way: Way) -> list[str]:
    """The parts of messages[index] whose words are not all in `text`, each with what is left of it."""
    owned = by_owner(text)
    found = [
        f"{name} ({_shown(owned.get(owner_of(index, part), ''))} is left)"
        for name, part, words in (
            ("content", Part.CONTENT, message.content),
            ("reasoning", Part.REASONING, message.reasoning),
        )
        if _squeezed(owned.get(owner_of(index, part), "")) != _squeezed(words)
    ]
    if message.tool_calls and not _has_calls(text, owned, message, index, way):
        found.append("tool calls")
    return found


def _has_calls(text: Traced, owned: Mapping[int, str], message: Message, index: int, way: Way) -> bool:
    names = owned.get(owner_of(index, Part.CALL_NAME), "")
    if any(call.name not in names for call in message.tool_calls):
        return False
    stretches, leaves = _stretches(text), handing.leaves_of(message.tool_calls, way)
    return all(
        _squeezed(stretches.get(owner_of(index, Part.ARGUMENT, leaf), "")) in _forms(words)
        for leaf, words in enumerate(leaves, start=1)
    )


def _stretches(text: Traced) -> dict[int, str]:
    """The text from the first to the last character of each owner, whoever wrote what stands between them.

    Templates that take an argument's text for an object write something after each of its letters.

    >>> _stretches(Traced.of("a", 5) + "=, " + Traced.of("b", 5) + ">")
    {5: 'a=, b', -1: '=, b>'}
    """
    at, ends = 0, dict[int, tuple[int, int]]()
    for owner, length in text.runs:
        ends[owner] = (ends.get(owner, (at, at))[0], at + length)
        at += length
    return {owner: str.__getitem__(text, slice(start, end)) for owner, (start, end) in ends.items()}


def _forms(words: str) -> set[str]:
    """How a text may stand in a template's output: as it is, as Python writes it, in JSON, in JSON inside JSON."""
    forms = {words, repr(words)[1:-1]}
    for is_ascii in (False, True):
        once = json.dumps(words, ensure_ascii=is_ascii)[1:-1]
        forms |= {once, json.dumps(once, ensure_ascii=is_ascii)[1:-1]}
    return {_squeezed(form) for form in forms}


def strangers(text: Traced, start: int, end: int, index: int) -> bool:
    """True if text[start:end] holds what another message, or a tool, wrote."""
    return any(owner != TEMPLATE and message_of(owner) != index for owner, _ in text[start:end].runs)


def last_character(text: Traced, index: int) -> int | None:
    """One past the last character that messages[index] wrote; None if it wrote none."""
    at, last = 0, None
    for owner, length in text.runs:
        at += length
        if owner != TEMPLATE and message_of(owner) == index:
            last = at
    return last


def first_character(text: Traced, index: int, parts: Sequence[Part] = tuple(Part), start: int = 0) -> int | None:
    """The first character from `start` on that one of these parts of messages[index] wrote; None if there is none."""
    at = 0
    for owner, length in text.runs:
        if at + length > start and owner != TEMPLATE and message_of(owner) == index and part_of(owner) in parts:
            return max(at, start)
        at += length
    return None


def end_of_content(text: Traced, index: int, part: Part = Part.CONTENT) -> int | None:
    """One past the last character of one part of messages[index]; None if there is none."""
    at, last = 0, None
    for owner, length in text.runs:
        at += length
        if owner == owner_of(index, part):
            last = at
    return last


def written(text: Traced) -> tuple[tuple[int, int], ...]:
    """The ranges of characters that messages and tools wrote.

    >>> written("<" + Traced.of("ab", 5) + ">")
    ((1, 3),)
    """
    at, ranges = 0, []
    for owner, length in text.runs:
        if owner != TEMPLATE:
            ranges.append((at, at + length))
        at += length
    return tuple(ranges)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 40 else text[:40] + "...") if text else "nothing"
