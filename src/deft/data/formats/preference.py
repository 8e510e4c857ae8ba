"""Preference data: {"prompt": ..., "chosen": ..., "rejected": ...}, of which the chosen answer is learnt.

Prompt and answers are strings, messages (OpenAI's or ShareGPT's), or answers that hold the whole chat. Rated chats of
KTO ({"messages" or "prompt" and "completion": ..., "label": true}) are of this kind: what is labelled false is left
out. With the source's `control` naming a text for bad answers these are learnt as well, behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deft.core.types import Conversation, Message, Row
from deft.data import messages, pairs
from deft.data.fields import LeftOut, RowError, kind_of, label_of
from deft.data.format import Choices
from deft.data.formats import alpaca, sharegpt
from deft.data.pairs import Side

_PROMPTS = ("prompt", "messages", "conversations", "question", "instruction")
_RATED = ({"messages", "label"}, {"conversations", "label"}, {"prompt", "completion", "label"})
KEYS = ({"chosen"}, {"chosen", "rejected"}, *({"chosen", key} for key in (*_PROMPTS, "input")), *_RATED)
OPTIONS = {"control"}


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> pair = Row(Origin("a.json", 1), {"prompt": "2+2=", "chosen": "4", "rejected": "5"})
    >>> [message.content for message in convert(pair, Choices())[0].messages]
    ['2+2=', '4']
    """
    if "chosen" not in row.value and "label" in row.value:
        return [_rated(row, choices)]
    if "chosen" not in row.value:
        raise RowError("chosen", "missing", "a row needs chosen, or a label")
    found = [pairs.steered(_answer(row, "chosen", "rejected"), choices)]
    if choices.learns_bad:
        found.append(pairs.steered(_answer(row, "rejected", "chosen"), choices, is_good=False))
    return found


def _answer(row: Row, field: str, other: str) -> Conversation:
    if row.value.get(field) is None:
        raise RowError(field, "missing", "a row needs chosen; a control text for bad answers needs rejected too")
    answer = _side(row.value[field], field)
    prompt_field = next((key for key in _PROMPTS if row.value.get(key) is not None), None)
    if prompt_field is None:
        prompt, answer = _split(answer, row.value.get(other), field, other)
        return pairs.joined(row, prompt, answer, (field, field), row.value.get("tools"))
    prompt = _prompt(row.value, prompt_field)
    if isinstance(prompt, str) and isinstance(answer, list) and answer[0].role != "assistant":
        prompt, answer = answer[:-1], answer[-1:]
    return pairs.joined(row, prompt, answer, (prompt_field, field), row.value.get("tools"))


def _prompt(value: Mapping[str, Any], field: str) -> Side:
    if field == "instruction":
        return [*messages.system(value), Message("user", alpaca.question(value))]
    prompt = _side(value[field], field)
    if field == "question" and isinstance(prompt, str):
        prompt = [Message("user", prompt)]
    return prompt if isinstance(prompt, str) else [*messages.system(value), *prompt]


def _side(value: Any, field: str) -> Side:
    """Text, a message or messages, in OpenAI's keys or ShareGPT's."""
    if isinstance(value, dict):
        return [sharegpt.read(value, field)]
    if isinstance(value, list | tuple):
        return sharegpt.read_all(value, field)
    return pairs.side(value, field)


def _split(answer: Side, other: Any, field: str, other_field: str) -> tuple[Side, Side]:
    """Prompt and answer of a side that holds both: the prompt is what both sides begin with, in whole words."""
    if isinstance(answer, list):
        return answer[:-1], answer[-1:]
    if not isinstance(other, str):
        raise RowError(other_field, f"{kind_of(other)}, not text", "without a prompt, give both sides as text")
    shared = next((i for i, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b), 0)
    edge = next((i for i in range(shared - 1, 0, -1) if answer[i].isspace()), 0)
    if not edge:
        raise RowError(field, f"begins unlike {other_field}, and there is no prompt", "give prompt, chosen, rejected")
    return answer[:edge], answer[edge:]


def _rated(row: Row, choices: Choices) -> Conversation:
    is_good = label_of(row.value["label"], "label")
    if "completion" in row.value:
        prompt, answer = (_side(row.value.get(field), field) for field in ("prompt", "completion"))
        fields = ("prompt", "completion")
    else:
        key = "messages" if "messages" in row.value else "conversations"
        found = _side(row.value.get(key), key)
        if isinstance(found, str):
            raise RowError(key, "text, not a list", "give a list of messages")
        prompt, answer = [*messages.system(row.value), *found[:-1]], found[-1:]
        fields = (key, f"{key}[{len(found) - 1}]")
    conversation = pairs.joined(row, prompt, answer, fields, row.value.get("tools"))
    if not is_good and not choices.learns_bad:
        raise LeftOut("label: false, a bad answer")
    return pairs.steered(conversation, choices, is_good)
