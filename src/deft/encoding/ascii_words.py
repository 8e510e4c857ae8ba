"""ASCII text -> ids, word by word: each word of a byte-level BPE tokenizer is encoded once and then remembered.

Such a tokenizer cuts a text into words by a regular expression, and encodes each word whatever stands around it. Words
repeat, so most of a text is looked up. On ASCII the expression says the same in Python's `re` as in the tokenizer,
once its Unicode classes are written out; where it uses anything else, or where the words of made-up texts turn out
differently, there is no `AsciiWords`. Text that is not ASCII, or that holds a token which is looked for before the text
is cut into words, is left to the tokenizer.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

_CLASSES = {"L": "a-zA-Z", "N": "0-9", "Nd": "0-9", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": ""}
_CLASSES |= {"P": "!-#%-*,-/:;?@\\[-\\]_{}", "S": "$+<->\\^`|~", "Nl": "", "No": "", "Mn": ""}
"""The ASCII characters of each Unicode category, as they stand inside brackets."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the library's ByteLevel cuts by where it is asked to."""

_PART = re.compile(r"\\p\{(\w+)\}|(\\[sSrnt])|(\\[^\w])|(\[\^?)|(\])|(\(\?(?:i?:|!|=))|(\}\+|[(^$.\\])|(.)", re.DOTALL)

_REMEMBERED_WORDS, _REMEMBERED_LENGTH = 200_000, 48
"""How many words are remembered, and the longest of them."""

_CHECKED = 300
"""Made-up texts that are cut both ways before the words of a tokenizer are trusted."""


class AsciiWords:
    """The words of one tokenizer, and their ids."""

    def __init__(self, tokenizer: Tokenizer, words: re.Pattern[str]) -> None:
        self._model = tokenizer.model
        self._to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._words = words
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.content]
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._known = _Known(self)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> AsciiWords | None:
        """None unless the tokenizer is byte-level BPE and its words can be found by `re`."""
        pattern = _pattern(tokenizer.pre_tokenizer) if isinstance(tokenizer.model, models.BPE) else None
        words = None if pattern is None else translated(pattern)
        return cls(tokenizer, words) if words and _agrees(tokenizer.pre_tokenizer, words) else None

    def ids(self, text: str) -> bytes | None:
        """The ids as int32; None where the text must be left to the tokenizer."""
        if not text.isascii() or self._added.search(text):
            return None
        words = self._words.findall(text)
        if sum(map(len, words)) != len(text):
            return None
        return b"".join(map(self._known.__getitem__, words))

    def encoded(self, word: str) -> bytes:
        """The ids of one word."""
        ((mapped, _),) = self._to_bytes.pre_tokenize_str(word)
        return np.array([token.id for token in self._model.tokenize(mapped)], np.int32).tobytes()


class _Known(dict[str, bytes]):
    def __init__(self, words: AsciiWords) -> None:
        self._all = words

    def __missing__(self, word: str) -> bytes:
        ids = self._all.encoded(word)
        if len(word) <= _REMEMBERED_LENGTH and len(self) < _REMEMBERED_WORDS:
            self[word] = ids
        return ids


def translated(pattern: str) -> re.Pattern[str] | None:
    """The expression for ASCII text in Python's `re`; None where it uses what may mean something else there.

    >>> translated(r"[^\\r\\n\\p{L}]?\\p{L}+|\\s+").pattern
    '[^\\\\r\\\\na-zA-Z]?[a-zA-Z]+|\\\\s+'
    >>> translated(r"(a)\\1")
    """
    found, is_inside = [], False
    for part in _PART.finditer(pattern):
        category, space, escaped, opening, closing, group, unknown, literal = part.groups()
        if unknown or (category and category not in _CLASSES) or (is_inside and (opening or group)):
            return None
        if is_inside and literal == "&":
            return None
        is_inside = bool(opening) or (is_inside and not closing)
        if category:
            inside = _CLASSES[category]
            found.append(inside if is_inside else f"[{inside}]" if inside else "(?!)")
        else:
            found.append(space or escaped or opening or closing or group or literal)
    try:
        return re.compile("".join(found), re.ASCII)
    except re.error:
        return None


def _pattern(pre_tokenizer: Any) -> str | None:
    """The one expression by which a pre-tokenizer cuts a text; None where there is not just one."""
    if pre_tokenizer is None:
        return None
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if any(step.get("add_prefix_space") or step["type"] not in ("Split", "ByteLevel") for step in steps):
        return None
    splits = [step for step in steps if step["type"] == "Split"]
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if len(levels) != 1 or steps[-1] is not levels[0]:
        return None
    if not splits:
        return _GPT2 if levels[0]["use_regex"] else None
    is_plain = len(splits) == 1 and splits[0]["behavior"] == "Isolated" and not splits[0]["invert"]
    return splits[0]["pattern"].get("Regex") if is_plain and not levels[0]["use_regex"] else None


def _agrees(pre_tokenizer: Any, words: re.Pattern[str]) -> bool:
    """True if made-up texts have the same words both ways."""
    draw = random.Random(0)
    usual = [chr(code) for code in range(128)] + list(" \n\r\t'aAsStTlLreEvVm019.,!-  \n\n") * 4
    texts = ["".join(draw.choices(usual, k=draw.randint(1, 40))) for _ in range(_CHECKED)]
    cuts = ((text, pre_tokenizer.pre_tokenize_str(text)) for text in texts)
    return all(words.findall(text) == [text[start:end] for _, (start, end) in found] for text, found in cuts)
