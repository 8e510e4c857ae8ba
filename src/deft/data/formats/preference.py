"""Preference data: {"prompt": ..., "chosen": ..., "rejected": ...}, of which the chosen answer is learnt.

Prompt and answers are strings, messages (OpenAI's or ShareGPT's), or answers that hold the whole chat. Without a prompt
two texts are split behind the last `Assistant:`, as in Anthropic's hh-rlhf. Rated chats of KTO ({"messages" or "prompt"
and "completion": ..., "label": true}) are of this kind: what is labelled false is left out. With the source's `control`
naming a text for bad answers these are learnt as well, behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deft.core.types import Conversation, Message, Row
from deft.data import names, pairs
from deft.data.fields import LeftOut, RowError, is_absent, kind_of, label_of, number_of
from deft.data.format import Choices
from deft.data.formats import alpaca, sharegpt
from deft.data.pairs import Side

_ASKING = (*names.PROMPT, *names.QUESTION, *names.INSTRUCTION)
_PROMPTS = ("prompt", "messages", "conversations", *_ASKING[1:])
_LABELS = ("label", "kto_tag")
KEYS = (
    *({"chosen"}, {"chosen", "rejected"}),
    *names.sets(("chosen",), (*_PROMPTS, *names.UNDER_INSTRUCTION)),
    *names.sets(("messages", "conversations"), _LABELS),
    *names.sets(_ASKING, names.ANSWER, _LABELS),
    *names.sets(names.INSTRUCTION, names.UNDER_INSTRUCTION, names.ANSWER, _LABELS),
)
OPTIONS = {"control"}
PARTS = sharegpt.PARTS
_RATING = re.compile("score|rating|reward")
_HEADER = re.compile(r"(?:^|\n|### ?)Assistant:")


def reads(keys: frozenset[str]) -> tuple[str, ...]:
    """The fields that are read of a row: of a pair other ones than of a rated answer, and one prompt.

    >>> sorted(reads(frozenset({"prompt", "chosen", "rejected", "messages"})))
    ['chosen', 'prompt', 'rejected']
    """
    prompt = next((key for key in _PROMPTS if key in keys), "prompt")
    under = names.UNDER_INSTRUCTION if "instruction" in keys else ()
    asked = (prompt, "instruction", *under) if under else (prompt,)
    return (*asked, "chosen", "rejected") if "chosen" in keys else (*asked, *_LABELS, "completion", *names.ANSWER)


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> pair = Row(Origin("a.json", 1), {"prompt": "2+2=", "chosen": "4", "rejected": "5"})
    >>> [message.content for message in convert(pair, Choices())[0].messages]
    ['2+2=', '4']
    """
    label = next((name for name in _LABELS if name in row.value), None)
    if row.value.get("chosen") is None and label:
        return [_rated(row, choices, label)]
    if "chosen" not in row.value:
        raise RowError("chosen", "missing", "a row needs chosen, or a label")
    found = [pairs.steered(_answer(row, "chosen", "rejected"), choices)]
    if _is_contrary(row.value):
        found = [replace(each, doubts=("contrary_rating",)) for each in found]
    if choices.learns_bad:
        found.append(pairs.steered(_answer(row, "rejected", "chosen"), choices, is_good=False))
    return found


def _is_contrary(value: Mapping[str, Any]) -> bool:
    """Whether ratings of the two answers, under whatever name, say that the rejected one is the better.

    >>> _is_contrary({"score_chosen": 1.0, "score_rejected": 7}), _is_contrary({"chosen-rating": 5})
    (True, False)
    """
    rated = [key for key in value if isinstance(key, str) and "chosen" in key and _RATING.search(key)]
    pairs_of = ((number_of(value[key]), number_of(value.get(key.replace("chosen", "rejected")))) for key in rated)
    return any(good is not None and bad is not None and good < bad for good, bad in pairs_of)


def _answer(row: Row, field: str, other: str) -> Conversation:
    if row.value.get(field) is None:
        raise RowError(field, "missing", "a row needs chosen; a control text for bad answers needs rejected too")
    answer = _side(row.value[field], field)
    prompt_field = _prompt_field(row.value)
    if prompt_field is None:
        prompt, answer = _split(answer, row.value.get(other), field, other)
        return pairs.joined(row, prompt, answer, (field, field))
    prompt = _prompt(row.value, prompt_field)
    if isinstance(prompt, str) and isinstance(answer, list) and answer[0].role != "assistant":
        is_asked = any(prompt.strip() in message.content for message in answer[:-1])
        if answer[-1].role == "assistant" and not is_asked:
            raise RowError(prompt_field, f"says something else than the messages of {field}", "take one of them out")
        prompt, answer = answer[:-1], answer[-1:]
    return pairs.joined(row, prompt, answer, (prompt_field, field))


def _prompt_field(value: Mapping[str, Any]) -> str | None:
    """What the row calls its prompt; RowError where two fields of the kind are texts that differ."""
    there = [name for name in _PROMPTS if value.get(name) is not None]
    texts = [name for name in there if isinstance(value[name], str) and not is_absent(value[name])]
    if "instruction" in texts:
        texts = [name for name in texts if name not in names.UNDER_INSTRUCTION]
    names.agree(value, texts)
    is_under = "instruction" in there and there[0] in names.UNDER_INSTRUCTION
    return "instruction" if is_under else next(iter(there), None)


def _prompt(value: Mapping[str, Any], field: str) -> Side:
    if field == "instruction":
        return [Message("user", alpaca.question(value))]
    prompt = _side(value[field], field)
    if field in names.QUESTION and isinstance(prompt, str):
        prompt = [Message("user", prompt)]
    return prompt


def _side(value: Any, field: str) -> Side:
    """Text, a message or messages, in OpenAI's keys or ShareGPT's."""
    if isinstance(value, dict):
        return [sharegpt.read(value, field)]
    if isinstance(value, list | tuple):
        return sharegpt.read_all(value, field)
    return pairs.side(value, field)


def _split(answer: Side, other: Any, field: str, other_field: str) -> tuple[Side, Side]:
    """Prompt and answer of a side that holds both: the prompt ends with the last `Assistant:`, and is the other's too.

    >>> _split("\\n\\nHuman: Best fruit?\\n\\nAssistant: Plum.", None, "chosen", "rejected")
    ('\\n\\nHuman: Best fruit?\\n\\nAssistant:', ' Plum.')
    """
    if isinstance(answer, list):
        return answer[:-1], answer[-1:]
    if other is not None and not isinstance(other, str):
        raise RowError(other_field, f"{kind_of(other)}, not text", "without a prompt, give both sides as text")
    edge = max((found.end() for found in _HEADER.finditer(answer)), default=0)
    if not edge:
        raise RowError(field, "there is no prompt, and no `Assistant:` in the text that ends one", "give prompt")
    if other is not None and other[:edge] != answer[:edge]:
        raise RowError(field, f"{other_field} has another text up to the last `Assistant:`", "give prompt")
    if not answer[edge:].strip():
        raise RowError(field, "no words behind the last `Assistant:`", "fill it in or remove the row")
    return answer[:edge], answer[edge:]


def _rated(row: Row, choices: Choices, label: str) -> Conversation:
    is_good = _is_good(row.value, label)
    chat = next((name for name in ("messages", "conversations") if row.value.get(name) is not None), None)
    if chat:
        found = _side(row.value[chat], chat)
        if isinstance(found, str):
            raise RowError(chat, "text, not a list", "give a list of messages")
        prompt: Side = found[:-1]
        answer: Side = found[-1:]
        fields = (chat, f"{chat}[{len(found) - 1}]")
    else:
        told = names.fields_of(row.value, completion=("completion", *names.ANSWER))["completion"]
        asked = _prompt_field(row.value)
        if asked is None:
            raise RowError("prompt", "missing", "a rated answer needs its prompt")
        prompt, answer = _prompt(row.value, asked), _side(row.value[told], told)
        fields = (asked, told)
    conversation = pairs.joined(row, prompt, answer, fields)
    if not is_good and not choices.learns_bad:
        raise LeftOut(f"{label}: false, a bad answer")
    return pairs.steered(conversation, choices, is_good)


def _is_good(value: Mapping[str, Any], label: str) -> bool:
    try:
        return label_of(value[label], label)
    except RowError as error:
        fix = f"{error.fix}; where it means something else, name the format, as data.format: prompt_completion"
        raise RowError(error.field, error.what, fix) from error
