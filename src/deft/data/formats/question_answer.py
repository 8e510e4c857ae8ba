"""Question and answer: {"question": "...", "answer": "..."}, a chat of one turn."""

from __future__ import annotations

from deft.core.types import Conversation, Message, Row
from deft.data.fields import RowError, need, text_of
from deft.data.format import Choices

KEYS = ({"question", "answer"},)


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> (chat,) = convert(Row(Origin("a.jsonl", 1), {"question": "2+2?", "answer": "4"}), Choices())
    >>> [(message.role, message.content) for message in chat.messages]
    [('user', '2+2?'), ('assistant', '4')]
    """
    need(row.value, ("question", "answer"), "a row")
    question, answer = text_of(row.value["question"], "question"), text_of(row.value["answer"], "answer")
    if not answer.strip():
        raise RowError("answer", "an assistant message without words", "fill it in or remove the row")
    return [Conversation(row.origin, "chat", (Message("user", question), Message("assistant", answer)))]
