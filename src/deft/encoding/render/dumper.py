"""JSON as chat templates write it, with the owners of its texts and numbers kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deft.encoding.render.provenance import (
    TEMPLATE,
    Traced,
    escaped,
    join,
)


@dataclass(frozen=True, slots=True)
class Style:
    """The options of json.dumps that templates may set."""

    ensure_ascii: bool = False
    indent: int | str | None = None
    separators: tuple[str, str] | None = None
    sort_keys: bool = False

    def plain(self, value: Any) -> str:
        """`value` by json.dumps itself."""
        return json.dumps(
            value,
            ensure_ascii=self.ensure_ascii,
            indent=self.indent,
            separators=self.separators,
            sort_keys=self.sort_keys,
        )


def dumps(value: Any, style: Style | None = None) -> Traced:
    """`json.dumps(value)`; keys and values keep their owners, all else is the template's.

    >>> text = dumps({"city": Traced.of('a "b"', 7), "n": [1, None]})
    >>> text, text.runs
    ('{"city": "a \\\\"b\\\\"", "n": [1, null]}', ((-1, 10), (7, 7), (-1, 18)))
    """
    style = style or Style()
    text = style.plain(value)
    traced = join("", _pieces(value, style, 0))
    return traced if str.__eq__(traced, text) else Traced.of(text, TEMPLATE)


def _pieces(value: Any, style: Style, level: int) -> Iterator[str]:
    if isinstance(value, str):
        yield from _string(value, style)
    elif isinstance(value, Mapping):
        yield from _mapping(value, style, level)
    elif isinstance(value, list | tuple):
        yield from _between("[", "]", ([item] for item in value), style, level)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
    else:
        yield style.plain(value)


def _string(value: str, style: Style) -> Iterator[str]:
    def escape(text: str) -> str:
        return json.dumps(text, ensure_ascii=style.ensure_ascii)[1:-1]

    yield '"'
    yield escaped(value, escape) if isinstance(value, Traced) else escape(value)
    yield '"'


def _mapping(value: Mapping[Any, Any], style: Style, level: int) -> Iterator[str]:
    items = sorted(value.items()) if style.sort_keys else value.items()
    yield from _between("{", "}", items, style, level)


def _between(opening: str, closing: str, items: Any, style: Style, level: int) -> Iterator[str]:
    """Items, each a value or a key and a value, in brackets."""
    comma, colon = style.separators or ("," if style.indent is not None else ", ", ": ")
    step = " " * style.indent if isinstance(style.indent, int) else style.indent
    first = True
    yield opening
    for item in items:
        yield "" if first else comma
        first = False
        if step is not None:
            yield "\n" + step * (level + 1)
        if len(item) == 2:
            yield from _string(item[0], style) if isinstance(item[0], str) else ('"', style.plain(item[0]), '"')
            yield colon
        yield from _pieces(item[-1], style, level + 1)
    if step is not None and not first:
        yield "\n" + step * level
    yield closing
