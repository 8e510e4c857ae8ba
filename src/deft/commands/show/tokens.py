"""Ids -> what each token writes and its colours: every token can be seen, and none can act on a terminal or a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from deft.core.types import Encoded, Fate
from deft.encoding.tokenizer import Tokenizer

NEWLINE, TAB, PART_OF_CHARACTER = "↵", "⇥", "‥"
"""How a newline and a tab are shown, and a token that holds some bytes of a character that a later one completes."""

_LONGEST_CHARACTER = 8
"""More tokens than this never share a character; bytes that make none by then are no UTF-8."""
_DIRECTIONS = (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF, 0x2028, 0x2029)
"""Characters that have no width, change the direction of writing, or break lines."""
_SIGNS = {
    **{code: f"⟨{code:02X}⟩" for code in (*range(0x7F, 0xA0), *_DIRECTIONS, *range(0xD800, 0xE000))},
    **{code: chr(0x2400 + code) for code in range(0x20)},
    ord("\n"): NEWLINE + "\n",
    ord("\t"): TAB,
}


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token: its id, the text it writes, how much it is learnt, and whether it is a control token or a new one."""

    id: int
    text: str
    weight: float
    is_special: bool


@dataclass(frozen=True)
class TokenTexts:
    """Texts of single tokens, with the space that some tokenizers keep in a token and drop from the front of a text."""

    tokenizer: Tokenizer
    _known: dict[int, str] = field(default_factory=dict, repr=False)

    def shown(self, encoded: Encoded) -> tuple[ShownToken, ...]:
        """Every token of an example. The first one has weight 0, as there is nothing to predict it from."""
        ids, weights = encoded.tokens.tolist(), encoded.weights.tolist()
        texts = self.texts(ids)
        return tuple(
            ShownToken(index, text, weight if at else 0.0, index in self._special)
            for at, (index, text, weight) in enumerate(zip(ids, texts, weights, strict=True))
        )

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What each token writes; a character stands with the token that completes it, "" with those before."""
        texts: list[str] = []
        while len(texts) < len(ids):
            text = self._alone(ids[len(texts)])
            at = len(texts)
            texts += self._together(ids[at : at + _LONGEST_CHARACTER]) if text.endswith("\ufffd") else [text]
        return texts

    def _alone(self, index: int) -> str:
        if index not in self._known:
            self._known[index] = self._special.get(index) or self._decoded([index])
        return self._known[index]

    def _together(self, ids: Sequence[int]) -> list[str]:
        """Texts of the first ids until their bytes are whole characters."""
        texts, done = [], 0
        for count in range(1, len(ids) + 1):
            whole = self._decoded(ids[:count])
            settled = whole.rstrip("\ufffd")
            texts.append(settled[done:])
            done = max(done, len(settled))
            if settled == whole:
                return texts
        return [self._alone(ids[0])]

    def _decoded(self, ids: Sequence[int]) -> str:
        # After another token a decoder keeps the space in front.
        anchor, text = self._anchor
        whole = self._decode([*anchor, *ids])
        return whole[len(text) :] if whole.startswith(text) else self._decode(list(ids))

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=False)
        return text

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        ids = self.tokenizer.ids("a")[-1:]
        return ids, self._decode(ids)

    @cached_property
    def _special(self) -> dict[int, str]:
        new = {index: str(self.tokenizer.hf.convert_ids_to_tokens(index)) for index in self.tokenizer.new_ids}
        return {index: text for text, index in self.tokenizer.special_tokens.items()} | new


def visible(text: str) -> str:
    """A token's text with a sign for what has none; a newline keeps its sign and the break.

    >>> visible("a\\n"), visible("\\t\\x1b[31m"), visible("\\u202e"), visible("")
    ('a↵\\n', '⇥␛[31m', '⟨202E⟩', '‥')
    """
    return text.translate(_SIGNS) or PART_OF_CHARACTER


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
