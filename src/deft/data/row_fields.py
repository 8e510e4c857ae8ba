"""What a row or a message may say beside the fields of its format, under all usual names; it means the same in each.

Read are how much it is learnt, the system prompt, tools, the answer's reasoning and variables of the chat template.
What deft cannot honour refuses the row: pictures, a context that the format does not read, weights inside a message. A
field is absent where it is null, NaN, empty text or an empty list, as tables fill their columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from deft.core.types import Conversation, Message
from deft.data import json_text, tools
from deft.data.fields import (
    LARGEST_WEIGHT,
    RowError,
    is_absent,
    json_of,
    kind_of,
    object_of,
    shortened,
    text_of,
    unusable,
)
from deft.data.names import folded

WEIGHTS = ("loss_weight", "weight", "sample_weight", "loss_scale")
FLAGS = ("loss", "loss_mask", "train", "training", "trainable", "learn", "train_on_turn")
MASKS = ("masked", "mask")
"""Numbers of 0 or more; true where it is learnt; true where it is not."""
LEARNT = frozenset((*WEIGHTS, *FLAGS, *MASKS))
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "instructions")
TOOLS = ("tools", "functions", "available_tools", "tool_config")
REASONING = (
    *("reasoning_content", "reasoning", "thinking", "reasoning_details", "rationale", "chain_of_thought"),
    *("complex_cot", "thinking_trajectories", "deepseek_thinking_trajectory", "gemini_thinking_trajectory"),
)
TEMPLATE_KWARGS = ("chat_template_kwargs", "template_kwargs")

_UNSEEN = "deft trains on text, and the answer may rest on what is seen or heard"
_APART = "parts of a message cannot be weighed apart"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("image", "images", "image_url", "image_urls", "image_path", "image_paths"), _UNSEEN),
    **dict.fromkeys(("audio", "audios", "video", "videos", "audio_path", "video_path"), _UNSEEN),
    **dict.fromkeys(("train_detail", "training_detail", "completion_mask", "assistant_masks"), _APART),
}
"""What refuses a row that has it, there or in a message, and why."""
_BESIDE = "rows of this shape have none, and the answer may rest on it"
CONTEXT = {
    **dict.fromkeys(("context", "history", "chat_history", "conversation_history"), _BESIDE),
    **dict.fromkeys(("document", "passage", "passages", "paragraph", "article"), _BESIDE),
    **dict.fromkeys(("options", "choices"), _BESIDE),
    "documents": "deft hands no documents to a template, and the answer may rest on them",
}
"""What refuses a row whose format does not read it, and any message."""
_UNCLOSED = "the turn goes on, and deft teaches the model to stop behind each"
IN_MESSAGE = {**REFUSED, **CONTEXT, "prefix": _UNCLOSED, "end_turn": _UNCLOSED}
"""What refuses a row where one of its messages has it."""

COMMON = LEARNT.union(SYSTEM, TOOLS, REASONING, TEMPLATE_KWARGS, REFUSED, CONTEXT)
"""All that this module reads of a row."""

_HARMLESS = {**dict.fromkeys(LEARNT), "end_turn": True}
"""The value with which a field refuses nothing, where it is another one than false."""
_SWITCHES = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}
_MESSAGES_AS_TEXT = '[{"'


def refuse(value: Mapping[str, Any], reasons: Mapping[str, str], field: str = "") -> None:
    """RowError for the first field of a row or message that keeps it from being learnt."""
    if not reasons.keys().isdisjoint(value):
        for key, why in reasons.items():
            if key in value and not is_absent(value[key]) and value[key] is not _HARMLESS.get(key, False):
                raise unusable(_under(field, key), why)


def learnt(value: Mapping[str, Any], field: str = "") -> float | None:
    """How much a row or message is learnt by all that it says of it, None where it says nothing.

    RowError where two fields contradict each other, or one is no weight.

    >>> learnt({"weight": 0.5, "train": True}), learnt({"masked": "true"}), learnt({"loss": None})
    (0.5, 0.0, None)
    """
    said = [key for key in LEARNT.intersection(value) if not is_absent(value[key])]
    if len(said) < 2:
        return _weight(said[0], value[said[0]], _under(field, said[0])) if said else None
    said.sort(key=[*WEIGHTS, *FLAGS, *MASKS].index)
    found = {key: _weight(key, value[key], _under(field, key)) for key in said}
    first = found[said[0]]
    for key, weight in found.items():
        if bool(weight) != bool(first) or (key in WEIGHTS and weight != first):
            raise unusable(_under(field, key), f"contradicts {said[0]}")
    return first


def _weight(key: str, value: Any, field: str) -> float:
    """A number from 0 to a million, or true or false, as they are or in words."""
    given = _as_number(value)
    is_known = isinstance(given, bool | int | float) and (
        0 <= given <= LARGEST_WEIGHT if key in WEIGHTS else given in (0, 1)
    )
    if not is_known:
        shown = "a huge number" if isinstance(value, int) and abs(value) > LARGEST_WEIGHT else shortened(repr(value))
        what = "not a weight" if key in WEIGHTS else "neither true nor false"
        fix = "give a number of 0 or more, 1 is usual" if key in WEIGHTS else "say true or false"
        raise RowError(field, f"{shown} is {what}", f"{fix}, or say ignore: [{key}] of the source")
    return float(not given) if key in MASKS else float(given)


def _as_number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    try:
        return _SWITCHES[word] if word in _SWITCHES else float(word)
    except ValueError:
        return value


def spread(value: dict[str, Any], own: frozenset[str]) -> dict[str, Any]:
    """The row with the weights that it lists for its messages given to each of them.

    own  the row's fields that its format reads

    >>> spread({"messages": [{"role": "user"}, {"role": "assistant"}], "loss_mask": [0, 1]}, frozenset({"messages"}))
    {'messages': [{'role': 'user', 'loss_mask': 0}, {'role': 'assistant', 'loss_mask': 1}]}
    """
    listed = {key: as_list(value[key], "[") for key in sorted(LEARNT.intersection(value))}
    found = {key: weights for key, weights in listed.items() if weights}
    if not found:
        return value
    lists = {key: each for key in own if (each := as_list(value[key])) and _are_objects(each)}
    value = {key: each for key, each in value.items() if key not in found}
    for key, weights in found.items():
        if len(lists) != 1:
            raise unusable(key, "a list, and the row has no one list of messages that it is of")
        (name, messages), *_ = lists.items()
        if len(weights) != len(messages):
            raise unusable(key, f"{len(weights)} values for {len(messages)} messages: it must have one for each")
        pairs = enumerate(zip(messages, weights, strict=True))
        lists[name] = [_weighed(each, key, weight, f"{name}[{index}]") for index, (each, weight) in pairs]
    return value | lists


def _weighed(message: dict[str, Any], key: str, weight: Any, field: str) -> dict[str, Any]:
    if is_absent(weight):
        return message
    if not is_absent(message.get(key)) and message[key] != weight:
        raise unusable(f"{field}.{key}", f"contradicts {key} of the row")
    return {**message, key: weight}


def as_list(value: Any, start: str = _MESSAGES_AS_TEXT) -> list[Any]:
    """A list, from JSON text too where it begins with `start`; empty for anything else."""
    if isinstance(value, str) and value.lstrip().startswith(start):
        try:
            value = json_text.decode(value)
        except json_text.NotJson:
            return []
    return list(value) if isinstance(value, list | tuple) else []


def _are_objects(values: Iterable[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def ignoring(value: Any, names: Iterable[str]) -> Any:
    """A row without the fields that its source ignores, in the row, in its messages and in their parts.

    >>> ignoring({"id": 7, "messages": [{"role": "user", "id": 8}]}, ["id"])
    {'messages': [{'role': 'user'}]}
    """
    return _without(value, {folded(part) for name in names for part in (name, name.rpartition("[].")[2])})


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        kept = ((key, each) for key, each in value.items() if not isinstance(key, str) or folded(key) not in keys)
        return {key: each if key in (*TOOLS, "tool_calls") else _without_in(each, keys) for key, each in kept}
    return _without_in(value, keys)


def _without_in(value: Any, keys: set[str]) -> Any:
    """A list of objects without some fields, from JSON text too; what is none stays as it is."""
    listed = as_list(value)
    return [_without(each, keys) for each in listed] if listed and _are_objects(listed) else value


def applied(
    found: Sequence[Conversation], value: Any, own: frozenset[str], odd: Sequence[Odd] = ()
) -> tuple[Conversation, ...]:
    """The conversations of a row with all that the row says beside the fields `own`, which its format has read.

    odd  those of its messages that have unusual fields

    >>> from deft.core.types import Origin
    >>> chat = Conversation(Origin("a", 1), "chat", (Message("user", "Hi"), Message("assistant", "Hello")))
    >>> applied([chat], {"system_prompt": "Be brief.", "weight": 0.5}, frozenset())[0].messages[0].content
    'Be brief.'
    """
    offered = _tools(value, own, odd)
    if isinstance(value, dict) and not COMMON.isdisjoint(value):
        said = {key: each for key, each in value.items() if key in COMMON and key not in own and not is_absent(each)}
        found = _with_all(found, said) if said else found
        if offered and found[0].kind == "text":
            raise unusable(_first(said, TOOLS), "a text has no place for tools")
    if offered:
        found = [replace(each, tools=offered) for each in found]
    return tuple(map(tools.mended, found))


def _with_all(found: Sequence[Conversation], said: Mapping[str, Any]) -> Sequence[Conversation]:
    """The conversations with what is `said` beside the format, but for tools."""
    refuse(said, {**REFUSED, **CONTEXT})
    weight, variables = learnt(said), _template_kwargs(said)
    if variables and found[0].kind == "text":
        raise unusable(_first(said, TEMPLATE_KWARGS), "a text has no place for variables of a template")
    found = [replace(each, template_kwargs=variables) for each in found] if variables else found
    found = [replace(each, weight=weight) for each in found] if weight is not None else found
    return _thinking(_prompted(found, said), said)


def _first(said: Mapping[str, Any], names: Iterable[str]) -> str:
    return next((name for name in names if name in said), "")


def _agreed(found: Mapping[str, Any]) -> Any:
    """What the fields of `found` say, None for none; RowError where they differ."""
    values = list(found.values())
    for key, value in found.items():
        if value != values[0]:
            raise unusable(key, f"contradicts {next(iter(found))}")
    return values[0] if values else None


def _prompted(found: Sequence[Conversation], said: Mapping[str, Any]) -> Sequence[Conversation]:
    """The conversations, which begin with the row's system prompt."""
    prompts = {key: words(said[key], key) for key in SYSTEM if key in said}
    prompt = _agreed(prompts)
    return [_beginning(each, prompt, next(iter(prompts))) for each in found] if prompt else found


def _beginning(conversation: Conversation, prompt: str, field: str) -> Conversation:
    if conversation.kind == "text":
        raise unusable(field, "a text has no place for a system prompt")
    first = conversation.messages[0]
    if first.role not in ("system", "developer"):
        return replace(conversation, messages=(Message("system", prompt), *conversation.messages))
    if first.content.strip() != prompt.strip():
        raise unusable(field, "the messages begin with another system prompt")
    return conversation


def words(value: Any, field: str) -> str:
    """A system prompt as text, as typed parts, or as a message; RowError where it holds anything else.

    >>> words({"role": "system", "parts": [{"text": "Be brief."}]}, "systemInstruction")
    'Be brief.'
    """
    if isinstance(value, str) and value.lstrip().startswith(_MESSAGES_AS_TEXT):
        value = json_of(value, field)
    if isinstance(value, list | tuple):
        return "".join(words(each, f"{field}[{index}]") for index, each in enumerate(value))
    if isinstance(value, dict):
        key = next((key for key in ("content", "parts", "text", "value") if value.get(key) is not None), None)
        if key is None:
            raise unusable(field, "an object without text")
        return words(value[key], f"{field}.{key}")
    return text(value, field)


def text(value: Any, field: str) -> str:
    """`value` if it is text; RowError with the way out otherwise."""
    if not isinstance(value, str):
        raise unusable(field, f"{kind_of(value)}, not text")
    return text_of(value, field)


def thought(value: Any, field: str) -> str:
    """Reasoning as text, as a list of texts that is one, or as OpenRouter's details, whose texts follow each other.

    >>> thought(["Easy."], "thinking_trajectories")
    'Easy.'
    >>> thought([{"type": "reasoning.text", "text": "Ea"}, {"type": "reasoning.text", "text": "sy."}], "details")
    'Easy.'
    """
    if isinstance(value, list | tuple) and value and _are_objects(value):
        pieces = [each.get("text") or each.get("summary") for each in value]
        if not all(isinstance(each, str) for each in pieces):
            raise unusable(field, "has a part without text, as encrypted ones are")
        return "".join(text(each, field) for each in pieces)
    if isinstance(value, list | tuple) and len(value) == 1:
        return text(value[0], f"{field}[0]")
    return text(value, field)


def _tools(value: Any, own: frozenset[str], odd: Sequence[Odd]) -> tuple[Mapping[str, Any], ...]:
    """The tools that a row offers, itself or in a system message."""
    if not odd and not any(key in value for key in TOOLS):
        return ()
    said = {key: value[key] for key in TOOLS if key in value and key not in own} if isinstance(value, dict) else {}
    for name, index, message in odd:
        said |= {f"{name}[{index}].{key}": message[key] for key in TOOLS if key in message}
    found = {field: tools.read(each, field) for field, each in said.items() if not is_absent(each)}
    return _agreed(found) or ()


def _template_kwargs(said: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the chat template: true or false, numbers or text."""
    found: dict[str, Any] = {}
    for field in (each for each in TEMPLATE_KWARGS if each in said):
        for name, value in object_of(json_of(said[field], field), field, "an object of variables").items():
            if value is None or (isinstance(value, list | dict) and not value):
                continue
            if name in _RESERVED or not isinstance(value, bool | int | float | str):
                what = "set by deft itself" if name in _RESERVED else f"{kind_of(value)}, not true, a number or text"
                raise RowError(f"{field}.{name}", what, f"take it out, or say ignore: [{field}] of the source")
            if found.setdefault(name, value) != value:
                raise unusable(field, f"contradicts {TEMPLATE_KWARGS[0]}")
    return found


def _thinking(found: Sequence[Conversation], said: Mapping[str, Any]) -> Sequence[Conversation]:
    """The conversations, whose one answer has the reasoning of the row."""
    given = {key: said[key] for key in REASONING if key in said and not is_switch(said[key])}
    reasoning = _agreed({key: thought(value, key) for key, value in given.items()})
    if not reasoning:
        return found
    field = next(iter(given))
    answers = [message for each in found for message in each.messages if _is_answer(message)]
    if found[0].kind == "text":
        raise unusable(field, "a text has no place for reasoning")
    if len(answers) != 1:
        raise unusable(field, f"reasoning beside {len(answers)} answers: it belongs to one answer of a prompt")
    if answers[0].reasoning and answers[0].reasoning.strip() != reasoning.strip():
        raise unusable(field, "the answer has other reasoning")
    return [
        replace(each, messages=tuple(replace(m, reasoning=reasoning) if _is_answer(m) else m for m in each.messages))
        for each in found
    ]


def _is_answer(message: Message) -> bool:
    return message.role in ("assistant", "output") and message.weight != 0


def is_switch(value: Any) -> bool:
    """Whether a field named reasoning tells that there is some, in place of saying it.

    >>> is_switch("off"), is_switch(True), is_switch("Two and two.")
    (True, True, False)
    """
    return isinstance(value, bool | int | float) or (isinstance(value, str) and value.strip().lower() in _SWITCHES)


Odd = tuple[str, int, dict[str, Any]]
"""An object in a list of a row, with its field and its place there."""


def odd_ones(value: Any, own: frozenset[str], usual: frozenset[str]) -> list[Odd]:
    """The objects in the lists that a format reads of a row, or in the row where it is a list, with other than `usual`
    fields.

    >>> odd_ones({"messages": [{"role": "user"}, {"role": "user", "id": 7}]}, {"messages"}, frozenset({"role"}))
    [('messages', 1, {'role': 'user', 'id': 7})]
    """
    found: list[Odd] = []
    for name in own if isinstance(value, dict) else ("",):
        each = value[name] if name else value
        if isinstance(each, str):
            each = as_list(each) if _MESSAGES_AS_TEXT in each else ()
        for index, item in enumerate(each if isinstance(each, list | tuple) else ()):
            if isinstance(item, dict) and not usual.issuperset(item):
                found.append((name, index, item))
    return found


def unread(
    value: Any, keys: frozenset[str], own: frozenset[str], odd: Sequence[Odd], parts: frozenset[str]
) -> frozenset[str]:
    """The names of all that nothing reads of a row: its fields, and those of its messages.

    keys   the row's fields
    own    those that its format reads
    odd    those of its messages that have unusual fields, of which `parts` are read

    >>> messages = [{"role": "user", "content": "Hi", "id": 7}]
    >>> row, odd = {"messages": messages, "score": 0.5, "split": ""}, [("messages", 0, messages[0])]
    >>> sorted(unread(row, frozenset(row), frozenset({"messages"}), odd, frozenset({"role", "content"})))
    ['messages[].id', 'score']
    """
    others = _strangers(keys, own) if isinstance(value, dict) else frozenset()
    if not others and not odd:
        return others
    found = [key for key in others if not is_absent(value[key]) and (key not in REASONING or is_switch(value[key]))]
    for name, _, each in odd:
        found += [f"{name}[].{key}" for key in each.keys() - parts if not is_absent(each[key])]
    return frozenset(found)


@lru_cache(maxsize=10_000)
def _strangers(keys: frozenset[str], own: frozenset[str]) -> frozenset[str]:
    """The fields of a row that nothing reads, and those named reasoning, which may be a switch that nothing reads."""
    return keys - own - COMMON.difference(REASONING)


def _under(field: str, key: str) -> str:
    return f"{field}.{key}" if field else key
