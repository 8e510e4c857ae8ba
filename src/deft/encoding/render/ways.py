"""The ways in which a turn may be handed to a template, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from deft.core.types import Message
from deft.encoding.render.handing import DEFAULT, Way
from deft.encoding.render.template import Template


def ways(template: Template, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Iterator[Way]:
    """The default, then each change that can matter to this conversation, then two changes at once.

    The last of `messages` is the turn; its reasoning decides how the template's switches stand.
    """
    yield DEFAULT
    changes = _changes(template, messages, tools)
    for base in (DEFAULT, Way(blank=template.missing_tokens)) if template.missing_tokens else (DEFAULT,):
        if base is not DEFAULT:
            yield base
        yield from (replace(base, **change) for change in changes)
        for first, second in combinations(changes, 2):
            if not first.keys() & second.keys():
                yield replace(base, **first, **second)


def _changes(
    template: Template, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    thinks = bool(messages[-1].reasoning)
    changes: list[dict[str, Any]] = []
    if template.switches:
        changes.append({"switches": tuple((name, thinks) for name in template.switches)})
    if template.has_effort and thinks:
        changes.append({"switches": (("reasoning_effort", "high"),)})
    if not tools:
        changes.append({"empty_tools": True})
    changes.append({"parts": True})
    if any(message.tool_calls for message in messages):
        changes.append({"text_arguments": True})
    if thinks:
        changes += [{"inline": marks} for marks in template.marks]
    if any(message.tool_calls and not message.content for message in messages):
        changes.append({"null": True})
    return changes
