"""What to do with a row of no shape that deft knows: the closest shape, and the line that would map its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deft.core.registry import closest
from deft.data import documents, names
from deft.data.fields import shortened
from deft.data.format import keys_of, known_fields, load
from deft.data.format import names as formats

_TURNS = re.compile(
    r"^(?:USER|Human|User|HUMAN|### ?(?:User|Human)): ?.*?^\W*(?:ASSISTANT|Assistant|GPT): ?", re.M | re.S
)
"""A question and its answer in one text, as Glaive and older corpora write them."""

A_ROW_A_LINE = "write a row a line, as pandas does with orient='records', lines=True"


def near(value: Any) -> str:
    """The fix for a row that no format reads.

    >>> near({"prompt": "2+2=", "told": "4"})
    'prompt_completion is closest and needs answer; or map the fields: columns: {prompt: prompt, completion: told}'
    >>> near({"ask": "2+2?", "tell": "4"})
    'map the fields: columns: {prompt: ask, completion: tell}'
    """
    if not isinstance(value, dict):
        return "give objects, or lists of messages" if isinstance(value, list | tuple) else "give objects or text"
    under = documents.rows_under(value)
    if under:
        return f"the rows stand in the list under {under[0]!r}: {A_ROW_A_LINE}"
    if documents.of_table(value):
        return f"these are columns, not a row: {A_ROW_A_LINE}"
    told = next((key for key, each in value.items() if isinstance(each, str) and _TURNS.search(each)), None)
    if told:
        how = 'make {"messages": [...]} of them by a function of yours: format: pkg.mod:fn'
        return f"the turns stand in one text, {shortened(told)!r}, behind headers such as USER: and ASSISTANT:; {how}"
    if not {"role", "from"}.isdisjoint(value):
        return 'a message alone is no row: put those of a chat in one list, {"messages": [...]}'
    line, found = names.mapping(value), _closest(value)
    found = found or ("" if line else _misspelt(value))
    if not line or (found and "{text:" in line):
        line = "name a function of yours that makes rows: format: pkg.mod:fn"
    else:
        line = f"map the fields: {line}"
    return f"{found}; or {line}" if found else line


def _closest(value: Mapping[str, Any]) -> str:
    """The format that a row has most of, and what it lacks; nothing where it has no field of any."""
    name, lacking = max(((form, *_lacks(form, value)) for form in formats()), key=lambda found: found[2])[:2]
    if not value.keys() & {field for known in load(name).keys for field in known}:
        name = ""
    if name and lacking:
        return f"{name} is closest and needs {' and '.join(lacking)}"
    if name:
        return f"{name} is closest, but {' and '.join(key for key in value if key not in keys_of(value))} is null"
    return ""


def _misspelt(value: Mapping[str, Any]) -> str:
    """A question about the first field whose name is like one that formats read; nothing where there is none."""
    questions = ((key, closest(str(key), known_fields())) for key in value if key not in known_fields())
    return next((f"{shortened(str(key))!r}: {question}" for key, question in questions if question), "")


def _lacks(name: str, value: Mapping[str, Any]) -> tuple[list[str], tuple[int, int, int]]:
    """What a row lacks to be of a format, and how near it is: fields that it has, and lacks, and in how many ways."""
    ways = [(len(known & value.keys()), -len(known - value.keys())) for known in load(name).keys]
    best = max(ways)
    known = load(name).keys[ways.index(best)]
    return sorted(known - value.keys()), (*best, ways.count(best))
