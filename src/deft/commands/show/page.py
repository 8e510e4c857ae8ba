"""Rows as one self-contained page: nothing is fetched, and what rows say is text, never markup or code."""

from __future__ import annotations

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib import resources
from itertools import groupby
from string import Template
from typing import Any

from deft.commands.show.rows import Shown, ShownRow
from deft.commands.show.tokens import (
    FATES,
    NEWLINE,
    PART_OF_CHARACTER,
    SPECIAL,
    SPECIAL_ON_LIGHT,
    Shade,
    ShownToken,
    shade,
    visible,
)
from deft.core.types import Fate
from deft.dataset.data_warnings import WARNINGS

LEGEND_WEIGHTS = 12
"""How many weights have a patch in the legend."""


def page(shown: Shown, facts: Mapping[str, str], limit: int) -> str:
    """The page as HTML; the same rows give the same bytes.

    facts  "model" and "template", in words
    limit  the most rows that were asked for, which the page says
    """
    weights = sorted({token.weight for row in shown.rows for text in row.texts for token in text} | {0.0, 1.0})
    style, script = _part("page.css") + _colours(weights), _part("page.js")
    fates = Counter(row.fate for row in shown.rows)
    return Template(_part("page.html")).substitute(
        style=style,
        script=script,
        style_digest=_digest(style),
        script_digest=_digest(script),
        model=escape(facts["model"]),
        template=escape(facts["template"]),
        extent=escape(shown.extent),
        limit=limit,
        legend=_legend(weights),
        sources=_options((source, source) for source in _sources(shown.rows)),
        fates=_options((fate.value, f"{_words(fate)} ({fates[fate]})") for fate in Fate if fates[fate]),
        counts=_counts(shown.rows),
        rows=_as_data(shown.rows, weights),
    )


def _part(name: str) -> str:
    return resources.files("deft.commands.show").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What the page's policy allows to run: this very text, so that a script that slipped in would not."""
    return "sha256-" + b64encode(sha256(text.encode("utf-8")).digest()).decode("ascii")


def _colours(weights: Sequence[float]) -> str:
    light = "".join(_rule(index, shade(weight).on_light()) for index, weight in enumerate(weights))
    dark = "".join(_rule(index, shade(weight)) for index, weight in enumerate(weights))
    fates = "".join(f".fate-{fate} {{ background: {colour} }}\n" for fate, colour in FATES.items())
    return (
        f"{fates}:root {{ --special: {SPECIAL_ON_LIGHT} }}\n{light}"
        f"@media (prefers-color-scheme: dark) {{\n:root {{ --special: {SPECIAL} }}\n{dark}}}\n"
    )


def _rule(index: int, colours: Shade) -> str:
    return f".w{index} {{ --text: {colours.text}; --first: {colours.first}; --second: {colours.second} }}\n"


def _legend(weights: Sequence[float]) -> str:
    names = {0.0: "not learnt", 1.0: "learnt"}
    patches = [
        f'<span class="token w{index}">{names.get(weight, f"weight {weight:g}")}</span>'
        for index, weight in enumerate(weights[:LEGEND_WEIGHTS])
    ]
    patches.append('<span class="token w0 special">control token</span>')
    return " ".join(patches) + f" {NEWLINE} newline, {PART_OF_CHARACTER} part of a character; each shade is a token"


def _options(options: Iterable[tuple[str, str]]) -> str:
    return "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)


def _sources(rows: Iterable[ShownRow]) -> list[str]:
    return list(dict.fromkeys(row.origin.source for row in rows))


def _counts(rows: Sequence[ShownRow]) -> str:
    """A table with a line per source: rows by fate, tokens, learnt tokens."""
    lines = [_cells("th", "source", "rows", *map(_words, Fate), "tokens", "learnt")]
    for source in _sources(rows):
        own = [row for row in rows if row.origin.source == source]
        fates = Counter(row.fate for row in own)
        tokens, learnt = sum(row.tokens for row in own), sum(row.learnt for row in own)
        lines.append(_cells("td", source, len(own), *(fates[fate] for fate in Fate), tokens, learnt))
    return f"<table>{''.join(lines)}</table>"


def _cells(tag: str, *cells: object) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def _words(fate: Fate) -> str:
    return fate.value.replace("_", " ")


def _as_data(rows: Sequence[ShownRow], weights: Sequence[float]) -> str:
    """The rows as JSON in which no character can end the element that holds it.

    kinds    [id, shown text, is special], each once; a text names them by number
    weights  a text's weights as [number in `weights`, how many tokens]
    """
    kinds: dict[tuple[int, str, bool], int] = {}
    grades = {weight: index for index, weight in enumerate(weights)}
    listed = [_row(row, kinds, grades) for row in rows]
    found = {"kinds": [[index, text, int(special)] for index, text, special in kinds], "weights": list(weights)}
    text = json.dumps({**found, "rows": listed}, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _row(row: ShownRow, kinds: dict[tuple[int, str, bool], int], grades: Mapping[float, int]) -> dict[str, Any]:
    return {
        "row": str(row.origin),
        "source": row.origin.source,
        "shape": row.shape,
        "fate": row.fate.value,
        "reason": row.reason,
        "notes": [
            *([WARNINGS[name].level, WARNINGS[name].here] for name in row.warnings),
            *(["note", f"its mask needed a fallback: {how}"] for how in row.fallbacks),
        ],
        "words": row.words,
        "tokens": row.tokens,
        "learnt": row.learnt,
        "left": row.tokens - sum(map(len, row.texts)) if row.texts else 0,
        "texts": [{"kinds": [_kind(t, kinds) for t in text], "weights": _runs(text, grades)} for text in row.texts],
    }


def _kind(token: ShownToken, kinds: dict[tuple[int, str, bool], int]) -> int:
    return kinds.setdefault((token.id, visible(token.text), token.is_special), len(kinds))


def _runs(text: Iterable[ShownToken], grades: Mapping[float, int]) -> list[list[int]]:
    return [[grade, len(list(same))] for grade, same in groupby(grades[token.weight] for token in text)]
