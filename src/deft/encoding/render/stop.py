"""Where a learnt turn ends: at the mark that stops generation.

Source: the stop-mark rule of the prompt law, found by rendering each turn as the last one and as one that goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from deft.core.types import Message
from deft.encoding.render.template import Refusal
from deft.encoding.render.traced import Traced, last_character

RenderMessages = Callable[[Sequence[Message]], Traced]
"""Renders messages as a template does, always with the same tools and switches."""


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


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of a turn's end.

    tail     the text after the turn's last character, where the turn is the last one
    header   what the template writes before an answer: a turn must end before the next one
    plain    the mark that ends plain answers; None if this is one
    opening  what the template writes between the words of the message before and those of the turn
    """

    tail: str
    header: str = ""
    plain: str | None = None
    opening: str = ""


BEGUN = re.compile(r"<[^<>\s]{0,40}\Z")
LOOKS_LIKE_A_MARK = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first.

    >>> any_of(["<s", "<s>"]).findall("<s><s"), any_of([]).findall("a")
    (['<s>', '<s'], [])
    """
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


PROBES = ("user", "tool", "assistant")
"""Who may speak after an assistant turn; a template that refuses one of them is not asked about it."""


def find(render: RenderMessages, marks: Marks, messages: Sequence[Message], ending: Ending) -> Stop:
    """The stop of the last of `messages`.

    In order: an EOS token in what always follows the turn; for tool calls, the mark of plain answers; an EOS token that
    begins the header of who speaks next (a tool after tool calls, else the user); the only special token there; a mark
    there that the tokenizer has no token for, learnt as text; an EOS token that stands only at the very end; the last
    of several special tokens before the next turn's header; a mark that a template leaves out at the end but writes
    before the next turn; the tokenizer's EOS, appended. The white space after a mark is never learnt.
    """
    tail = ending.tail
    followed = _followed(render, messages)
    close = os.path.commonprefix([tail, *followed.values()])
    mark = _first(close, marks.eos_all) or _first(close, [ending.plain] if ending.plain else [])
    if not mark and (stop := _next_header(tail, followed, messages[-1], marks.eos_all)):
        return stop
    if mark := mark or _only(close, marks.special) or _text_mark(close) or _first(tail, marks.eos_all):
        before = tail[: tail.index(mark)]
        _check_before(before, mark, marks, ending)
        return Stop(len(before) + len(mark), "", mark)
    own = _own(close, ending.header, marks.special)
    if last := _last(own, marks.special) if ending.header.strip() else "":
        return Stop(len(own[: own.rindex(last)] + last), "", last)
    if not tail.strip() and followed:
        begun = _begins(os.path.commonprefix([*followed.values()]).lstrip(), marks.special)
        if begun:
            return Stop(0, begun, begun)
    if not marks.eos:
        raise Refusal("nothing ends the assistant's turn: the template writes no mark and the tokenizer has no EOS")
    length = len(own.rstrip()) if ending.plain is not None else 0
    if length and not ending.header.strip() and _first(own, marks.special):
        raise Refusal(f"in {own!r} after the tool calls, no mark can be told from the next turn's header")
    _check_before(tail[:length], marks.eos, marks, ending)
    return Stop(length, marks.eos, marks.eos)


def _next_header(tail: str, followed: Mapping[str, str], turn: Message, eos: Sequence[str]) -> Stop | None:
    r"""The stop where the next speaker's header begins with one of the EOS tokens, whether somebody speaks or not.

    >>> _next_header("!\n", {"user": "!<user>Hi"}, Message("assistant", "So!"), ["<user>"])
    Stop(length=1, appended='<user>', mark='<user>')
    """
    role = "tool" if turn.tool_calls else "user"
    then, own = followed.get(role, next(iter(followed.values()), "")), tail.rstrip()
    mark = _begins(then.removeprefix(own).lstrip(), eos) if then.startswith(own) else ""
    return Stop(len(own), then[len(own) : then.index(mark, len(own))] + mark, mark) if mark else None


def _check_before(before: str, mark: str, marks: Marks, ending: Ending) -> None:
    """What the turn opened may be closed before its mark, but no next turn may begin.

    A plain answer's next turn is told by the token that opens the header, else by any that stand between two turns;
    where there are none, no special token at all may stand between its words and its mark.
    """
    header, opener = ending.header.strip(), _first(ending.header, marks.special)
    refused: Sequence[str] = [header] if header else []
    if ending.plain is None:
        refused = [opener] if opener else [mark for mark in marks.special if mark in ending.opening] or marks.special
    if any(each in before for each in refused):
        raise Refusal(f"the template writes {before!r} between the assistant's words and {mark!r}, which ends them")


def _followed(render: RenderMessages, messages: Sequence[Message]) -> dict[str, str]:
    """What follows the last message's last character when a user, a tool or an assistant speaks next."""
    index, tails = len(messages) - 1, {}
    alone = render(messages)
    end = last_character(alone, index)
    for role in PROBES:
        try:
            text = render([*messages, _probe(role, messages[-1])])
        except Refusal:
            continue
        is_same = end is not None and text.startswith(alone.plain(0, end))
        last = end if is_same else last_character(text, index)
        if last is not None:
            tails[role] = text.plain(last)
    return tails


def _probe(role: str, turn: Message) -> Message:
    if role != "tool" or not turn.tool_calls:
        return Message(role, "probe")
    call = turn.tool_calls[0]
    return Message(role, "probe", name=call.name, tool_call_id=call.id)


def _first(text: str, marks: Sequence[str]) -> str:
    """The mark that stands first in `text`, or nothing."""
    found = [(text.find(mark), -len(mark), mark) for mark in marks if mark in text]
    return min(found)[2] if found else ""


def _only(text: str, marks: Sequence[str]) -> str:
    """The one special token in `text`; nothing if there are none or several."""
    found = [mark for mark in marks if mark in text]
    whole = [mark for mark in found if not any(mark != other and mark in other for other in found)]
    return whole[0] if len(whole) == 1 and text.count(whole[0]) == 1 else ""


def _own(close: str, header: str, special: Sequence[str]) -> str:
    """What always follows a turn, up to the next turn's header or a mark that is not whole.

    >>> _own("}<end><turn><|", "<turn><bot>", ["<turn>", "<end>"]), _own("]<|", "", [])
    ('}<end>', ']')
    """
    opener = _first(header, special) or next(iter(LOOKS_LIKE_A_MARK.findall(header)), "")
    own = close.partition(opener)[0] if opener else close
    return BEGUN.sub("", own)


def _last(own: str, special: Sequence[str]) -> str:
    """The special token that ends `own`, white space aside, and stands there once; or nothing."""
    mark = max((mark for mark in special if own.rstrip().endswith(mark)), key=len, default="")
    return mark if own.count(mark) == 1 else ""


def _text_mark(close: str) -> str:
    """What looks like a mark, where nothing else stands there; nothing otherwise.

    >>> _text_mark("<|im_end|>\\n"), _text_mark("\\n\\n### ")
    ('<|im_end|>', '')
    """
    text = close.strip()
    return text if LOOKS_LIKE_A_MARK.fullmatch(text) else ""


def _begins(text: str, marks: Sequence[str]) -> str:
    return max((mark for mark in marks if text.startswith(mark)), key=len, default="")
