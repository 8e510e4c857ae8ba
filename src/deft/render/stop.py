"""Where a learnt turn ends: at the mark that stops generation.

Source: the stop-mark rule of the prompt law, found by rendering each turn as the last one and as one that goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from deft.render.provenance import Traced
from deft.render.template import Refusal, Template
from deft.types import Message


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of a learnt turn, counted from the turn's last character.

    The `length` characters after it in the turn's own text are learnt, and then `appended`, which the text lacks.

    mark   the characters that stop generation, for the exported generation_config
    """

    length: int
    appended: str
    mark: str


@dataclass(frozen=True, slots=True)
class Marks:
    """What can stop generation: the EOS tokens' texts and all special tokens' texts; `eos` is the tokenizer's own."""

    eos: str
    eos_all: tuple[str, ...]
    special: tuple[str, ...]


_LOOKS_LIKE_A_MARK = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")

PROBES = ("user", "tool", "assistant")
"""What may follow an assistant turn; a template that refuses one of them is not asked about it."""


def find(template: Template, marks: Marks, messages: Sequence[Message], tail: str) -> Stop:
    """The stop of the last of `messages`, whose text ends with `tail` after the turn's last character.

    In order: an EOS token in what always follows the turn; the only special token there; a mark there that the
    tokenizer has no token for, learnt as text; an EOS token that stands only at the very end of a conversation; a mark
    that a template leaves out at the end but writes before the next turn; the tokenizer's EOS, appended. The white
    space after a mark is never learnt.
    """
    followed = _followed(template, messages)
    close = os.path.commonprefix([tail, *followed])
    mark = _first(close, marks.eos_all) or _only(close, marks.special) or _text_mark(close)
    mark = mark or _first(tail, marks.eos_all)
    if mark:
        before = tail[: tail.index(mark)]
        if any(special in before for special in marks.special):
            raise Refusal(f"the template writes {before!r} between the assistant's words and {mark!r}, which ends them")
        return Stop(len(before) + len(mark), "", mark)
    if not tail.strip() and followed:
        begun = _begins(os.path.commonprefix(followed).lstrip(), marks.special) or _begins(followed[0], marks.eos_all)
        if begun:
            return Stop(0, begun, begun)
    if not marks.eos:
        raise Refusal("nothing ends the assistant's turn: the template writes no mark and the tokenizer has no EOS")
    return Stop(0, marks.eos, marks.eos)


def _followed(template: Template, messages: Sequence[Message]) -> list[str]:
    """What follows the last message's last character when a user, a tool or an assistant speaks next."""
    tails = []
    for role in PROBES:
        try:
            text = template.render([*messages, Message(role, "probe")])
        except Refusal:
            continue
        last = last_character(text, len(messages) - 1)
        if last is not None:
            tails.append(str.__getitem__(text, slice(last, None)))
    return tails


def last_character(text: Traced, owner: int) -> int | None:
    """One past the last character of `owner`; None if it has none."""
    at, last = 0, None
    for run_owner, length in text.runs:
        at += length
        if run_owner == owner:
            last = at
    return last


def _first(text: str, marks: Sequence[str]) -> str:
    """The mark that stands first in `text`, or nothing."""
    found = [(text.find(mark), -len(mark), mark) for mark in marks if mark in text]
    return min(found)[2] if found else ""


def _only(text: str, marks: Sequence[str]) -> str:
    """The one special token in `text`; nothing if there are none or several."""
    found = [mark for mark in marks if mark in text]
    whole = [mark for mark in found if not any(mark != other and mark in other for other in found)]
    return whole[0] if len(whole) == 1 and text.count(whole[0]) == 1 else ""


def _text_mark(close: str) -> str:
    """What looks like a mark, where nothing else stands there; nothing otherwise.

    >>> _text_mark("<|im_end|>\\n"), _text_mark("\\n\\n### ")
    ('<|im_end|>', '')
    """
    text = close.strip()
    return text if _LOOKS_LIKE_A_MARK.fullmatch(text) else ""


def _begins(text: str, marks: Sequence[str]) -> str:
    return max((mark for mark in marks if text.startswith(mark)), key=len, default="")
