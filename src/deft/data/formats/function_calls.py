"""Single calls, as xLAM writes them: {"query": "...", "answers": [{"name", "arguments"}, ...], "tools": [...]}.

The answers are one message of the assistant with all the calls; answers and tools are lists, or their JSON text.
"""

from __future__ import annotations

from deft.core.types import Conversation, Message, Row
from deft.data import messages, names
from deft.data.fields import RowError, kind_of, need, text_of, value_of
from deft.data.format import Choices

KEYS = names.sets(names.QUESTION, ("answers",), ("tools",))
READS = (*names.QUESTION, "answers")


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> calls = '[{"name": "weather", "arguments": {"city": "Oslo"}}]'
    >>> value = {"query": "Oslo?", "answers": calls, "tools": '[{"name": "weather"}]'}
    >>> convert(Row(Origin("a.json", 1), value), Choices())[0].messages[1].tool_calls
    (ToolCall(name='weather', arguments={'city': 'Oslo'}, id=None),)
    """
    need(row.value, ("answers", "tools"), "a row")
    asked = names.fields_of(row.value, question=names.QUESTION)["question"]
    calls = value_of(row.value["answers"], "answers")
    if not isinstance(calls, list | tuple) or not calls:
        what = f"{kind_of(calls)}, not a list of calls" if calls else "no call: nothing to learn"
        raise RowError("answers", what, "give calls, or remove the row")
    found = tuple(messages.tool_call(each, f"answers[{index}]") for index, each in enumerate(calls))
    turns = [Message("user", text_of(row.value[asked], asked)), Message("assistant", "", tool_calls=found)]
    return [messages.chat(row, turns, "answers")]
