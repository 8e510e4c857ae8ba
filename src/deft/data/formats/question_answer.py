"""Question and answer: {"question": "...", "answer": "..."} under any of their names, a chat of one turn."""

from __future__ import annotations

from deft.core.types import Conversation, Message, Row
from deft.data import names
from deft.data.fields import RowError, is_absent, text_of
from deft.data.format import Choices

_SPOKEN = names.sets(names.SPEAKER, names.REPLIER)
KEYS = (*names.sets(names.QUESTION, names.ANSWER), *_SPOKEN)


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> (chat,) = convert(Row(Origin("a.jsonl", 1), {"query": "2+2?", "response": "4"}), Choices())
    >>> [(message.role, message.content) for message in chat.messages]
    [('user', '2+2?'), ('assistant', '4')]
    """
    value = row.value
    is_spoken = any(each <= value.keys() for each in _SPOKEN)
    asking, telling = (names.SPEAKER, names.REPLIER) if is_spoken else (names.QUESTION, names.ANSWER)
    asked, told = names.fields_of(value, question=asking, answer=telling).values()
    if not is_absent(value.get("context")):
        fix = f"to put it under the {asked}, say columns: {{instruction: {asked}, input: context, output: {told}}}"
        raise RowError("context", f"is not read beside {asked}", f"{fix}; or say ignore: [context] of the source")
    question, answer = text_of(value[asked], asked), text_of(names.said(value, told), told)
    if not answer.strip():
        raise RowError(told, "an assistant message without words", "fill it in or remove the row")
    return [Conversation(row.origin, "chat", (Message("user", question), Message("assistant", answer)))]
