"""The tool calls of a conversation and their results, mended where tables and APIs write them otherwise than meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deft.core.types import Conversation, Message
from deft.data.fields import shortened, unusable


def mended(conversation: Conversation) -> Conversation:
    """The conversation with results in the order of their calls, and calls without the padding of tables.

    RowError where a result answers no call of the turn before it, or one that has a result.
    """
    for message in conversation.messages:
        if message.tool_calls:
            return _without_padding(_in_order(conversation))
    return conversation


def _in_order(conversation: Conversation) -> Conversation:
    """Few templates show ids: where they do not, the third result is taken for that of the third call."""
    whole = list(conversation.messages)
    if not any(call.id for message in whole for call in message.tool_calls):
        return conversation
    ids: list[str | None] = []
    places: list[int] = []
    for index, message in enumerate(conversation.messages):
        if message.role == "tool":
            places.append(index)
        elif message.role == "assistant":
            _settle(whole, ids, places)
            ids, places = [*([] if places else ids), *(call.id for call in message.tool_calls)], []
    _settle(whole, ids, places)
    return replace(conversation, messages=tuple(whole))


def _settle(whole: list[Message], ids: Sequence[str | None], places: Sequence[int]) -> None:
    """Puts the results that stand at `places` in the order of the calls of their turn, as far as ids name them."""
    results = [whole[place] for place in places]
    answered = [result.tool_call_id for result in results]
    if None in ids or None in answered or len(set(ids)) < len(ids):
        return
    for number, each in enumerate(answered):
        if each not in ids or each in answered[:number]:
            what = (
                f"is a second result of {shortened(repr(each))}"
                if each in ids
                else "answers no call of the turn before"
            )
            raise unusable(f"messages[{places[number]}].tool_call_id", what)
    for place, result in zip(places, sorted(results, key=lambda result: ids.index(result.tool_call_id)), strict=True):
        whole[place] = result


def without_nulls(value: Any, schema: Any = None) -> Any:
    """A JSON value without the null fields of its objects, but for those that their JSON schema requires.

    >>> without_nulls({"city": "Oslo", "unit": None, "day": None}, {"required": ["city", "day"]})
    {'city': 'Oslo', 'day': None}
    """
    if isinstance(value, Mapping):
        inside, required = _part(schema, "properties"), _part(schema, "required") or ()
        kept = ((key, each) for key, each in value.items() if each is not None or key in required)
        return {key: without_nulls(each, _part(inside, key)) for key, each in kept}
    if isinstance(value, list | tuple):
        return [without_nulls(each, _part(schema, "items")) for each in value]
    return value


def _part(schema: Any, key: str) -> Any:
    return schema.get(key) if isinstance(schema, Mapping) else None


def _without_padding(conversation: Conversation) -> Conversation:
    """The conversation without the null arguments by which tables give all calls the same fields.

    A null that the tool's schema requires was said, as is one in arguments that are JSON text: both stay.
    """
    padded = [index for index, each in enumerate(conversation.messages) if each.tool_calls and _is_padded(each)]
    if not padded:
        return conversation
    functions = [tool.get("function", tool) for tool in conversation.tools]
    schemas = {each.get("name"): each.get("parameters") for each in functions if isinstance(each, Mapping)}
    whole = list(conversation.messages)
    for index in padded:
        calls = whole[index].tool_calls
        mended = (replace(each, arguments=without_nulls(each.arguments, schemas.get(each.name))) for each in calls)
        whole[index] = replace(whole[index], tool_calls=tuple(mended))
    return replace(conversation, messages=tuple(whole))


def _is_padded(message: Message) -> bool:
    """False where no argument is null."""
    return any(not isinstance(call.arguments, str) and "None" in repr(call.arguments) for call in message.tool_calls)
