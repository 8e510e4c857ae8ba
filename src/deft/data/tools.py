"""Tools and their calls as APIs, tables and data sets write them -> OpenAI's form, which chat templates read.

Anthropic has `input_schema`, Bedrock `toolSpec`, Gemini `functionDeclarations` with types in capitals; xLAM has a table
of parameters, {"city": {"type": "str", "description": ..., "default": ...}}, whose Python types become JSON Schema's.
Which of them are required xLAM does not say, and so neither do we.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deft.core.types import Conversation, Message
from deft.data.fields import RowError, kind_of, object_of, refuse_nan, shortened, unusable, value_of

_PYTHON_TYPES = {
    **{"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object"},
    **dict.fromkeys(("list", "tuple", "set"), "array"),
}
_SCHEMAS = ("parameters", "input_schema", "inputSchema", "parametersJsonSchema")


def read(value: Any, field: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Tools as a list or its JSON text -> OpenAI's form, without nulls; bare schemas with a name are wrapped.

    >>> read('[{"name": "add", "parameters": {"properties": {"a": {}, "b": null}}}]')
    ({'type': 'function', 'function': {'name': 'add', 'parameters': {'properties': {'a': {}}}}},)
    """
    value = _listed(value_of(value, field))
    if not isinstance(value, list | tuple):
        raise RowError(field, f"{kind_of(value)}, not a list", "give a list of tools, or its JSON text")
    return tuple(_tool(each, f"{field}[{index}]") for index, each in enumerate(value))


def _tool(value: Any, field: str) -> Mapping[str, Any]:
    value = without_nulls(object_of(value_of(value, field), field, "a tool"))
    inner = value.get("function", value.get("toolSpec", value))
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise RowError(f"{field}.name", "missing or not text", "a tool needs a name")
    refuse_nan(value, field)
    return _as_openai(value)


def _listed(value: Any) -> Any:
    """The tools of a list, or of the object that an API keeps them in.

    >>> _listed({"tools": [{"toolSpec": {"name": "f"}}]})
    [{'toolSpec': {'name': 'f'}}]
    >>> _listed([{"functionDeclarations": [{"name": "f"}, {"name": "g"}]}])
    [{'name': 'f'}, {'name': 'g'}]
    """
    if isinstance(value, Mapping) and isinstance(value.get("tools"), list | tuple):
        value = value["tools"]
    if not isinstance(value, list | tuple):
        return value
    return [tool for each in value for tool in _declared(each)]


def _declared(value: Any) -> Sequence[Any]:
    for key in ("functionDeclarations", "function_declarations"):
        if isinstance(value, Mapping) and isinstance(value.get(key), list | tuple):
            return [_lower_types(each) for each in value[key]]
    return [value]


def _as_openai(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool in OpenAI's form; one that is in it already is returned as it is.

    >>> _as_openai({"name": "weather", "parameters": {"city": {"type": "str, optional"}}})["function"]["parameters"]
    {'type': 'object', 'properties': {'city': {'type': 'string'}}}
    """
    if "function" in value:
        return value
    inner = value.get("toolSpec", value)
    key = next((key for key in _SCHEMAS if isinstance(inner.get(key), Mapping)), None)
    inner = {name: each for name, each in inner.items() if name != "type" or each != "function"}
    if key is None:
        return {"type": "function", "function": inner}
    schema = inner[key].get("json", inner[key])
    schema = _of_table(schema) if _is_table(schema) else schema
    renamed = {("parameters" if name == key else name): each for name, each in inner.items()}
    return {"type": "function", "function": {**renamed, "parameters": schema}}


def _is_table(schema: Any) -> bool:
    """Whether a schema is xLAM's table of parameters; one of them may be called type."""
    if not isinstance(schema, Mapping) or not schema or "properties" in schema:
        return False
    return all(isinstance(each, Mapping) and isinstance(each.get("type"), str) for each in schema.values())


def _of_table(table: Mapping[str, Any]) -> dict[str, Any]:
    properties = {name: {**each, "type": _json_type(each["type"])} for name, each in table.items()}
    return {"type": "object", "properties": properties}


def _json_type(name: str) -> str:
    """JSON Schema's name of a Python type, `List[int], optional` as well; any other name stays.

    >>> _json_type("List[int], optional"), _json_type("string")
    ('array', 'string')
    """
    word = name.partition(",")[0].partition("[")[0].strip().lower()
    return _PYTHON_TYPES.get(word, name)


def _lower_types(schema: Any) -> Any:
    """A schema of Gemini's with JSON Schema's types: STRING is string."""
    if isinstance(schema, Mapping):
        return {
            key: each.lower() if key == "type" and isinstance(each, str) else _lower_types(each)
            for key, each in schema.items()
        }
    return [_lower_types(each) for each in schema] if isinstance(schema, list | tuple) else schema


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
