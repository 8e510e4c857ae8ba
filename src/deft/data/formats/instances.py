"""Tasks with several cases, as Self-Instruct writes them: {"instruction": ..., "instances": [{"input", "output"}]}.

Each instance is a chat of its own.
"""

from __future__ import annotations

from deft.core.types import Conversation, Row
from deft.data import row_fields
from deft.data.fields import list_of, need, object_of, text_of
from deft.data.format import Choices
from deft.data.formats.alpaca import question
from deft.data.pairs import as_chat

KEYS = ({"instruction", "instances"},)
_OF_ROWS = dict.fromkeys(sorted(row_fields.COMMON), "it belongs to the row, which all instances share")
PARTS = frozenset({"input", "output"})


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> cases = [{"input": "2 and 2", "output": "4"}, {"input": "1 and 2", "output": "3"}]
    >>> found = convert(Row(Origin("a.jsonl", 1), {"instruction": "Add.", "instances": cases}), Choices())
    >>> [chat.messages[1].content for chat in found]
    ['4', '3']
    """
    need(row.value, ("instruction", "instances"), "a task")
    found = []
    for index, value in enumerate(list_of(row.value["instances"], "instances")):
        field = f"instances[{index}]"
        value = object_of(value, field, "an instance")
        need(value, ("output",), "an instance", field)
        row_fields.refuse(value, _OF_ROWS, field)
        asked = question({"instruction": row.value["instruction"], "input": value.get("input") or ""})
        told = text_of(value["output"], f"{field}.output")
        found.append(as_chat(row, asked, told, ("instruction", f"{field}.output")))
    return found
