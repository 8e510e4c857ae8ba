"""Colours: how much a token is learnt, and what became of a row. The terminal and the page use the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deft.core.types import Fate


@dataclass(frozen=True, slots=True)
class Shade:
    """Text on two backgrounds, as #rrggbb, that take turns from token to token."""

    text: str
    first: str
    second: str

    def on_light(self) -> Shade:
        """The same colours for a light page: dark text, pale backgrounds."""
        if self == UNLEARNT:
            return Shade("#59616b", "#eef0f3", "#dfe3e8")
        return Shade("#12161a", *(_hex(_between(_parsed(self.second), _WHITE, share)) for share in (0.68, 0.52)))


UNLEARNT = Shade("#9aa1a9", "#1d2024", "#2a2e34")
LEARNT = Shade("#ffffff", "#14633a", "#1d8049")
SPECIAL, SPECIAL_ON_LIGHT = "#ffd75f", "#8a4b00"
"""The text of control tokens, whatever they weigh."""

_WHITE = (255, 255, 255)
_LITTLE, _LESS, _MORE, _MOST = (0x4A, 0x3A, 0x12), (0xA0, 0x6A, 0x00), (0x1F, 0x6F, 0xB5), (0x7D, 0x3C, 0xC0)

FATES = {
    Fate.TRAINED: "#2e9e62",
    Fate.HELD_OUT: "#3d84d6",
    Fate.LEFT_OUT: "#7f6fb3",
    Fate.CUT: "#c98a0a",
    Fate.TOO_LONG: "#d06a2c",
    Fate.NO_TARGET: "#8a8f98",
    Fate.REFUSED: "#d64545",
}


def shade(weight: float) -> Shade:
    """0 is grey, 1 is green, below 1 from dull to amber, above 1 from blue to purple at 4.

    >>> shade(0.0) is UNLEARNT, shade(1.0) is LEARNT, shade(0.5).first
    (True, True, '#755209')
    """
    if weight == 0:
        return UNLEARNT
    if weight == 1:
        return LEARNT
    if weight < 1:
        colour = _between(_LITTLE, _LESS, weight)
    else:
        colour = _between(_MORE, _MOST, min(1.0, math.log2(weight) / 2))
    return Shade("#ffffff", _hex(colour), _hex(_between(colour, _WHITE, 0.12)))


def _between(a: tuple[int, ...], b: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def _hex(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _parsed(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
