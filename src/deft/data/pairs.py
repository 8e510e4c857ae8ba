"""A prompt and its answer, each a string or messages -> one conversation in which the answer alone is learnt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deft.core.types import Conversation, Message, Row
from deft.data import messages
from deft.data.fields import RowError, text_of
from deft.data.format import Choices

Side = str | list[Message]


def side(value: Any, field: str) -> Side:
    """A prompt or an answer: text, one message, or a list of messages.

    >>> side("2+2=", "prompt")
    '2+2='
    >>> side({"role": "assistant", "content": "4"}, "completion")[0].content
    '4'
    """
    if isinstance(value, dict):
        return messages.read_all([value], field)
    if isinstance(value, list | tuple) and value and all(isinstance(each, str) for each in value):
        fix = "where it is a column of rows, write a row a line; where it holds answers, choose one"
        raise RowError(field, "a list of texts, not text or messages", fix)
    if isinstance(value, list | tuple) or (isinstance(value, str) and value.lstrip().startswith('[{"')):
        return messages.read_all(value, field)
    return text_of(value, field)


def strings(row: Row, prompt: str, answer: str, field: str) -> Conversation:
    """Two strings without roles: a dialogue, which is never put in a template."""
    if not answer:
        raise RowError(field, "empty: nothing to learn", "fill it in or remove the row")
    return Conversation(row.origin, "dialogue", (Message("prompt", prompt), Message("output", answer)))


def joined(row: Row, prompt: Side, answer: Side, fields: tuple[str, str]) -> Conversation:
    """Two strings are a dialogue; where one of the two is messages, a chat, a string then being one turn of it.

    fields  what the row calls prompt and answer
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return strings(row, prompt, answer, fields[1])
    return as_chat(row, prompt, answer, fields)


def as_chat(row: Row, prompt: Side, answer: Side, fields: tuple[str, str]) -> Conversation:
    """A chat, whatever the sides are; an answer that begins with the whole prompt is not asked twice.

    >>> from deft.core.types import Origin
    >>> [m.role for m in as_chat(Row(Origin("a", 1), {}), "2+2?", "4", ("prompt", "completion")).messages]
    ['user', 'assistant']
    """
    asked = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    told = [Message("assistant", answer)] if isinstance(answer, str) else answer
    if told[: len(asked)] == asked:
        told = told[len(asked) :]
    if not any(message.role == "assistant" for message in told):
        raise RowError(fields[1], "no assistant message: nothing to learn", "add the answer or remove the row")
    if not isinstance(answer, str) and any(m.role == "system" for m in told):
        raise RowError(fields[1], "a system message in the answer", f"system messages belong in {fields[0]}")
    if any(messages.is_silent(message) for message in told):
        raise RowError(fields[1], "an assistant message without words", "fill it in or remove the row")
    return messages.chat(row, [*messages.context(asked), *told], fields[0])


def steered(conversation: Conversation, choices: Choices, is_good: bool = True) -> Conversation:
    """The conversation with the source's control text put before its answer.

    >>> from deft.data.format import Control
    >>> from deft.core.types import Origin
    >>> pair = strings(Row(Origin("a", 1), {}), "2+2=", "4", "completion")
    >>> steered(pair, Choices(control=Control("<|good|>"))).messages[1].content
    '<|good|>4'
    """
    if choices.control is None:
        return conversation
    text = choices.control.good if is_good else choices.control.bad or ""
    found = list(conversation.messages)
    learnt = [i for i, m in enumerate(found) if m.role in ("assistant", "output") and m.weight != 0.0]
    for index in learnt[:1]:
        found[index] = replace(found[index], content=text + found[index].content)
    return replace(conversation, messages=tuple(found))
