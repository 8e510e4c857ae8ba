"""Made-up messages of the same shape as a row's: what a template does to them, it does to all rows of that shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deft.core.types import Message, ToolCall
from deft.encoding.render import handing
from deft.encoding.render.handing import Marks

TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "probe",
            "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "probe"}}},
        },
    },
)


def like(message: Message, index: int, marks: Sequence[Marks]) -> Message:
    """A message with the same parts as `message`, whose words are made up; the weight is not kept.

    >>> like(Message("user", "What is 2 + 2?"), 3, ())
    Message(role='user', content='probe 3', weight=None, reasoning='', tool_calls=(), name=None, tool_call_id=None)
    """
    block = handing.block_of(message, marks)
    content = f"probe {index}" if message.content.strip() else ""
    return Message(
        role=message.role,
        content=f"{block.opening.strip()}\nprobe\n{block.closing}\n\n{content}" if block else content,
        reasoning="probe" if message.reasoning.strip() else "",
        tool_calls=tuple(
            ToolCall("probe", {"a": "b"}, None if call.id is None else f"{number:09d}")
            for number, call in enumerate(message.tool_calls)
        ),
        name=None if message.name is None else "probe",
        tool_call_id=None if message.tool_call_id is None else f"{0:09d}",
    )
