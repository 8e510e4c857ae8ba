"""The schemas of tools as APIs and data sets write them -> OpenAI's form, which chat templates read.

Anthropic has `input_schema`, Bedrock `toolSpec`, Gemini `functionDeclarations` with types in capitals; xLAM has a table
of parameters, {"city": {"type": "str", "description": ..., "default": ...}}, whose Python types become JSON Schema's.
Which of them are required xLAM does not say, and so neither do we.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PYTHON_TYPES = {
    **{"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object"},
    **dict.fromkeys(("list", "tuple", "set"), "array"),
}
_SCHEMAS = ("parameters", "input_schema", "inputSchema", "parametersJsonSchema")


def listed(value: Any) -> Any:
    """The tools of a list, or of the object that an API keeps them in.

    >>> listed({"tools": [{"toolSpec": {"name": "f"}}]})
    [{'toolSpec': {'name': 'f'}}]
    >>> listed([{"functionDeclarations": [{"name": "f"}, {"name": "g"}]}])
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


def as_openai(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool in OpenAI's form; one that is in it already is returned as it is.

    >>> as_openai({"name": "weather", "parameters": {"city": {"type": "str, optional"}}})["function"]["parameters"]
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
