"""Rows on a terminal: every token on its own shade, coloured by its weight; separators where there is no colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from deft.commands.show.rows import Shown, ShownRow
from deft.commands.show.tokens import FATES, PART_OF_CHARACTER, SPECIAL, ShownToken, shade, visible
from deft.dataset.data_warnings import WARNINGS

_Styled = tuple[str, Style]


def write(console: Console, shown: Shown) -> None:
    """The legend, the rows, and how many there are."""
    _print(console, [_legend(shown.rows, console)])
    for row in shown.rows:
        console.print()
        _print(console, _row(row, console))
    console.print()
    _print(console, [Text(shown.extent)])


def _print(console: Console, lines: Iterable[Text]) -> None:
    for line in lines:
        console.print(line, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)


def _legend(rows: Sequence[ShownRow], console: Console) -> Text:
    """What the colours that occur mean."""
    if _is_plain(console):
        return Text(f"│ between tokens, ⟦learnt⟧, ⟦learnt⟧0.5 with weight 0.5, {PART_OF_CHARACTER} part of a character")
    tokens = [token for row in rows for text in row.texts for token in text]
    legend = Text()
    for weight in sorted({token.weight for token in tokens}):
        name = {0.0: "not learnt", 1.0: "learnt"}.get(weight, f"weight {weight:g}")
        legend.append(f" {name} ", _style(ShownToken(0, "", weight, False), 0)).append(" ")
    legend.append(" <control token> ", _style(ShownToken(0, "", 0.0, True), 1)).append("  ↵ newline")
    if any(not token.text for token in tokens):
        legend.append(f"  {PART_OF_CHARACTER} part of a character")
    return legend


def _row(row: ShownRow, console: Console) -> Iterator[Text]:
    yield _heading(row)
    if row.reason:
        yield Text(f"  {_one_line(row.reason)}", FATES[row.fate])
    for name in row.warnings:
        style = "yellow" if WARNINGS[name].level == "warning" else "bright_black"
        yield Text(f"  {WARNINGS[name].level}: {WARNINGS[name].here}", style)
    for how in row.fallbacks:
        yield Text(f"  note: its mask needed a fallback: {_one_line(how)}", "bright_black")
    for role, words in row.words:
        yield Text(f"  {_one_line(role)}: {_one_line(words)}", "bright_black")
    for number, text in enumerate(row.texts, start=1):
        if len(row.texts) > 1:
            yield Text(f"text {number} of {len(row.texts)}", "bright_black")
        yield from _laid_out(_plain(text) if _is_plain(console) else _coloured(text), console.width)
    left = row.tokens - sum(map(len, row.texts))
    if row.texts and left:
        yield Text(f"... and {left} more tokens", "bright_black")


def _heading(row: ShownRow) -> Text:
    heading = Text(_one_line(str(row.origin)), "bold")
    heading.append(f"  {row.shape}  ", "not bold")
    heading.append(row.fate.value.replace("_", " "), f"bold {FATES[row.fate]}")
    if row.tokens:
        heading.append(f"  {row.tokens} tokens, {row.learnt} learnt", "not bold")
    return heading


def _coloured(tokens: Sequence[ShownToken]) -> Iterator[_Styled]:
    for at, token in enumerate(tokens):
        yield visible(token.text), _style(token, at)


def _style(token: ShownToken, at: int) -> Style:
    colours = shade(token.weight)
    text = SPECIAL if token.is_special else colours.text
    background = colours.second if at % 2 else colours.first
    return Style(color=text, bgcolor=background, bold=token.is_special)


def _plain(tokens: Sequence[ShownToken]) -> Iterator[_Styled]:
    """Bars between tokens, brackets around what is learnt, with the weight where it is not 1."""
    for at, token in enumerate(tokens):
        before = tokens[at - 1].weight if at else 0.0
        after = tokens[at + 1].weight if at + 1 < len(tokens) else 0.0
        opens = "⟦" if token.weight and token.weight != before else "│" if at and token.weight == before else ""
        closes = "⟧" if token.weight and token.weight != after else ""
        grade = f"{token.weight:g}" if closes and token.weight != 1 else ""
        yield opens + visible(token.text) + closes + grade, Style.null()


def _laid_out(pieces: Iterable[_Styled], width: int) -> Iterator[Text]:
    """Lines of at most `width` cells; a line ends where its text has a newline, and no space is lost at an end."""
    line, used = Text(), 0
    for text, style in pieces:
        run = ""
        for character in text:
            size = cell_len(character)
            if character == "\n" or used + size > width:
                yield line.append(run, style)
                line, used, run = Text(), 0, ""
            if character != "\n":
                run, used = run + character, used + size
        line.append(run, style)
    if used:
        yield line


def _one_line(text: str) -> str:
    return "".join(visible(text).splitlines()) if text else ""


def _is_plain(console: Console) -> bool:
    return console.color_system is None or console.no_color
