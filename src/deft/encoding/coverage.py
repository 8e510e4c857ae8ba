"""Which characters a tokenizer has tokens for.

A tokenizer without tokens for bytes drops characters that it does not know, or writes its unknown token for them, and a
normalizer may delete or change some. Whether any of it can happen is decided once for a tokenizer; where it can, each
character is tried once, alone, and remembered, so that most texts are not encoded again.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

_BYTES = pre_tokenizers.ByteLevel.alphabet()
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_BYTE_TOKEN = re.compile(rb"<0x([0-9A-F]{2})>")
_SPACES = "▁ĠĊĉčÂ"
"""What tokens write for white space."""

_SPACES_ALONE = re.compile(r"(?: |\\[snrt]|[+*]|\{\d*,?\d*\})+")
"""Regular expressions that match white space alone."""

_HARMLESS = {"NFC", "NFD", "Prepend", "ByteLevel", "Strip"}
"""Normalizers that leave what a text says, white space aside."""


class Kept(IntEnum):
    """What becomes of a text. UNSURE: only the text around a character says what becomes of it."""

    WHOLE = 1
    CHANGED = 2
    UNSURE = 3
    LOST = 4


@dataclass(frozen=True)
class Coverage:
    """What a tokenizer keeps of texts, white space aside.

    backend  the tokenizer, which takes special tokens in them for text and opens them with nothing
    _known   uint8: what becomes of the character of each code, alone; 0 where it was not tried

    >>> from tokenizers import normalizers
    >>> made = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    >>> made.normalizer = normalizers.Lowercase()
    >>> found = Coverage(made)
    >>> found.kept("ab").name, found.kept("Ab").name, found.kept("a 日 b").name, found.keeps_nothing("日本")
    ('WHOLE', 'CHANGED', 'LOST', True)
    """

    backend: Tokenizer
    _known: np.ndarray = field(default_factory=lambda: np.zeros(0x110000, np.uint8), repr=False, compare=False)

    def kept(self, text: str) -> Kept:
        """WHOLE, CHANGED where characters become others that Unicode tells apart, LOST where some have no token."""
        if text.isascii() and self._keeps_ascii:
            return Kept.WHOLE
        worst = Kept(self._each(text).max(initial=Kept.WHOLE))
        is_certain = self._is_by_character and (worst < Kept.UNSURE or (worst == Kept.LOST and self._is_bpe))
        return worst if is_certain else self._together(text)

    def keeps_nothing(self, text: str) -> bool:
        """Whether a text that says something has no token but unknown ones."""
        if not text.strip() or self.kept(text) != Kept.LOST:
            return False
        if self._is_by_character and self._is_bpe and Kept.UNSURE not in (each := self._each("".join(text.split()))):
            return bool((each == Kept.LOST).all())
        encoding = self.backend.encode(text, add_special_tokens=False)
        known = zip(encoding.tokens, encoding.ids, strict=True)
        return not any(token.strip(_SPACES).strip() for token, index in known if index != self._unknown)

    def _each(self, text: str) -> np.ndarray:
        """uint8: what becomes of each character, alone."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        found = self._known[codes]
        if not found.all():
            for code in np.unique(codes[found == 0]).tolist():
                self._known[code] = self._alone(chr(code))
            found = self._known[codes]
        return np.asarray(found)

    def _alone(self, character: str) -> Kept:
        if character.isspace():
            return Kept.WHOLE
        if self._is_by_words or (self.backend.normalizer and unicodedata.combining(character)):
            return Kept.UNSURE
        return self._together(character)

    def _together(self, text: str) -> Kept:
        """What becomes of a text, found by encoding it."""
        written = self._written(text)
        if not self._spells(text, written) or any(_said(each) and not _said(self._written(each)) for each in {*text}):
            return Kept.LOST
        return Kept.WHOLE if _said(written) == _said(text) else Kept.CHANGED

    def _written(self, text: str) -> str:
        """The text as the normalizer leaves it."""
        normalizer = self.backend.normalizer
        found: str = text if normalizer is None else normalizer.normalize_str(text)
        return found

    def _spells(self, text: str, written: str) -> bool:
        """Whether the tokens of a text spell all that the normalizer leaves of it, `written`."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        if self._unknown in encoding.ids:
            return False
        cut = self.backend.pre_tokenizer
        pieces = "".join(piece for piece, _ in cut.pre_tokenize_str(written)) if cut else written
        tokens = "".join(token.removeprefix(self._prefix).removesuffix(self._suffix) for token in encoding.tokens)
        if bool(_said(pieces)) != bool(_said(written)):
            return False
        return tokens == pieces or _of_bytes(tokens) == pieces.encode("utf-8")

    @cached_property
    def _unknown(self) -> int | None:
        model = self.backend.model
        if isinstance(model, models.Unigram):
            unknown: int | None = json.loads(self.backend.to_str())["model"].get("unk_id")
            return unknown
        return self.backend.token_to_id(model.unk_token) if model.unk_token else None

    @cached_property
    def _prefix(self) -> str:
        """What tokens inside a word begin with."""
        return getattr(self.backend.model, "continuing_subword_prefix", None) or ""

    @cached_property
    def _suffix(self) -> str:
        """What tokens at a word's end end with."""
        return getattr(self.backend.model, "end_of_word_suffix", None) or ""

    @cached_property
    def _is_bpe(self) -> bool:
        """Whether a character without a token has none beside others either: its tokens grow from single characters."""
        return isinstance(self.backend.model, models.BPE)

    @cached_property
    def _is_by_words(self) -> bool:
        """Whether a word is known or unknown as a whole, whatever its characters."""
        return isinstance(self.backend.model, models.WordPiece | models.WordLevel)

    @cached_property
    def _is_by_character(self) -> bool:
        """Whether what becomes of a character does not depend on the text around it."""
        normal = steps(self.backend.normalizer, "normalizers")
        return all(_is_of_spaces(step) or _is_of_one_character(step) for step in normal)

    @cached_property
    def _keeps_ascii(self) -> bool:
        return self._is_by_character and all(self._alone(chr(code)) == Kept.WHOLE for code in range(32, 127))


def steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer does, step by step.

    >>> steps(pre_tokenizers.Sequence([pre_tokenizers.Whitespace()]), "pretokenizers")
    [{'type': 'Whitespace'}]
    """
    return [] if part is None else _flat(json.loads(part.__getstate__()), inner)


def _flat(step: dict[str, Any], inner: str) -> list[dict[str, Any]]:
    return [each for part in step[inner] for each in _flat(part, inner)] if step["type"] == "Sequence" else [step]


def keeps_all(backend: Tokenizer) -> bool:
    """Whether a tokenizer keeps every text whole: it has tokens for all bytes, and changes nothing before."""
    normal, cuts = steps(backend.normalizer, "normalizers"), steps(backend.pre_tokenizer, "pretokenizers")
    if any(step["type"] not in _HARMLESS and not _is_of_spaces(step) for step in normal):
        return False
    if any(step.get("behavior") == "Removed" or step["type"] == "CharDelimiterSplit" for step in cuts):
        return False
    is_byte_level = any(step["type"] == "ByteLevel" for step in (*normal, *cuts))
    needed = _BYTES if is_byte_level and isinstance(backend.model, models.BPE) else _BYTE_TOKENS
    falls_back = needed is _BYTES or getattr(backend.model, "byte_fallback", False)
    return falls_back and all(backend.token_to_id(token) is not None for token in needed)


def _is_of_spaces(step: dict[str, Any]) -> bool:
    if step["type"] != "Replace":
        return False
    pattern = step["pattern"]
    return (
        not pattern["String"].strip() if "String" in pattern else _SPACES_ALONE.fullmatch(pattern["Regex"]) is not None
    )


def _is_of_one_character(step: dict[str, Any]) -> bool:
    return step["type"] != "Replace" or len(step["pattern"].get("String", "--")) == 1


def _said(text: str) -> str:
    """A text without white space, its characters composed."""
    return unicodedata.normalize("NFC", "".join(text.replace("▁", " ").split()))


def _of_bytes(tokens: str) -> bytes:
    return _BYTE_TOKEN.sub(lambda found: bytes([int(found[1], 16)]), tokens.encode("utf-8"))
