"""Warnings about rows that are trained all the same, found in their messages and their tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deft.core.types import Conversation, Encoded, Fate, Message
from deft.encoding.render.answer_start import EMPTY
from deft.encoding.render.proof import forms, without_space
from deft.encoding.render.template_inputs import arguments_of
from deft.encoding.rows import EncodedRow, RowEncoder, message_weights

DECODED_ROWS = 50
"""Of rows with the same kinds of messages this number is decoded to see whether the template shows every field."""

Level = Literal["note", "warning"]


@dataclass(frozen=True, slots=True)
class DataWarning:
    """How much it matters, what it is ({s} and {have} agree with the number of rows), and what to do.

    >>> DataWarning("note", "open{s} with BOS twice", "mend it").of(1), DataWarning("note", "{have} two", "").of(2)
    ('1 row opens with BOS twice', '2 rows have two')
    """

    level: Level
    what: str
    fix: str

    def of(self, rows: int) -> str:
        """The warning as a sentence about a number of rows."""
        return f"1 row {self._of_one}" if rows == 1 else f"{rows} rows {self.what.format(s='', have='have')}"

    @property
    def here(self) -> str:
        """The warning, said of the row above it, and what to do."""
        return f"{self._of_one}; {self.fix}"

    @property
    def _of_one(self) -> str:
        return self.what.format(s="s", have="has")


WARNINGS: Mapping[str, DataWarning] = {
    "no_stop": DataWarning(
        "warning",
        "end{s} without a token that stops the model",
        "give the tokenizer an EOS token, or end the row with an answer",
    ),
    "double_bos": DataWarning("warning", "open{s} with BOS twice", "take one out of the chat template"),
    "empty_answer": DataWarning(
        "warning", "{have} an answer without words: only stopping is learnt there", "fill it in, or remove the row"
    ),
    "special_tokens_as_text": DataWarning(
        "note", "{have} special tokens in a message", "they are encoded as text, never as control tokens"
    ),
    "empty_reasoning": DataWarning(
        "warning",
        "learn{s} an empty block of reasoning: the prompt opens one and the answer has none",
        "give the answers reasoning, or name a prompt without it in template_kwargs",
    ),
    "thinking_off": DataWarning(
        "note",
        "{have} an answer without reasoning, learnt after the prompt that asks for none",
        "call the model with the same switch, or say reasoning: empty or require",
    ),
    "moved_reasoning": DataWarning(
        "note",
        "{have} reasoning between marks in an answer",
        "the chat template gets it as reasoning and writes it in its own way",
    ),
    "empty_block": DataWarning(
        "note",
        "{have} an empty block of reasoning in an answer",
        "the chat template gets an answer without reasoning and writes it in its own way",
    ),
    "reasoning_as_text": DataWarning(
        "note",
        "{have} marks of reasoning in an answer, and the chat template has no reasoning",
        "they are learnt as text; choose one that has it with template= to learn them as reasoning",
    ),
    "rendered_as_text": DataWarning(
        "warning",
        "{have} turns that the chat template wrote beforehand, read as plain text",
        "say data.render=rendered to read its marks as control tokens and learn what the assistant says; of messages, "
        "give the words alone",
    ),
    "begins_otherwise": DataWarning(
        "warning",
        "begin{s} otherwise than the chat template begins a conversation today",
        "see that the model is asked with the same beginning (system prompt, date), or give messages",
    ),
    "lost_characters": DataWarning(
        "warning",
        "{have} characters for which the tokenizer has no token: the model does not see them",
        "take a tokenizer that covers them, or remove the rows",
    ),
    "changed_characters": DataWarning(
        "note",
        "{have} learnt text that the tokenizer changes (case, accents, width), so that it does not decode back",
        "nothing to do if the model is meant to write so",
    ),
    "encoded_apart": DataWarning(
        "note",
        "{have} prompt and answer encoded apart, as one encoding would merge their edge",
        "inference encodes the prompt alone as well",
    ),
    "duplicate": DataWarning(
        "warning", "say{s} exactly what an earlier row says", "remove repetitions, or leave them if they are meant"
    ),
    "in_evaluation": DataWarning(
        "note", "stand{s} in the evaluation data too", "it is not trained, so that both stay apart"
    ),
    "undeclared_tools": DataWarning(
        "warning",
        "call{s} a tool that is not among the row's tools: the model learns to call what it is not offered",
        "declare the tool, or remove the call",
    ),
    "marks_of_media": DataWarning(
        "warning",
        "{have} a mark of a picture, sound or video in a text: deft trains on text, and the answer may rest on it",
        "remove the rows, or the marks where nothing was meant to be seen",
    ),
    "contrary_rating": DataWarning(
        "warning", "rate{s} the chosen answer below the rejected one", "turn them round, or remove the rows"
    ),
    "dropped_content": DataWarning(
        "warning", "{have} an earlier answer that the chat template does not show", "choose another with template="
    ),
    "dropped_reasoning": DataWarning(
        "warning", "{have} reasoning that the chat template does not show", "choose one that shows it with template="
    ),
    "dropped_tool_calls": DataWarning(
        "warning",
        "{have} tool calls that the chat template does not show",
        "choose one that knows tools with template=",
    ),
    "dropped_tools": DataWarning(
        "warning", "{have} tools that the chat template does not show", "choose one that knows tools with template="
    ),
    "dropped_name": DataWarning(
        "note", "{have} names that the chat template does not show", "choose another with template= if they matter"
    ),
    "dropped_kwargs": DataWarning(
        "warning", "{have} template_kwargs that the chat template does not read", "choose another with template="
    ),
    "dropped_weight": DataWarning(
        "note", "{have} a weight on words that are not the assistant's, and are not learnt", "train_on: all learns them"
    ),
}
"""In the order in which they are told. Names are those of ledger.json."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know before training: what it is, the first rows that have it, what to do.

    >>> str(Finding("warning", "2 rows open with BOS twice", "take one out", ("a.jsonl:1", "a.jsonl:7")))
    'warning: 2 rows open with BOS twice (a.jsonl:1, a.jsonl:7); take one out'
    """

    level: Level
    what: str
    fix: str
    rows: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" ({', '.join(self.rows)})" if self.rows else ""
        return f"{self.level}: {self.what}{where}; {self.fix}"


BIT: Mapping[str, int] = {name: 1 << place for place, name in enumerate(WARNINGS)}
"""The bit of each warning in a set of them."""

_Signature = tuple[frozenset[tuple[str, bool, bool, bool]], bool]


@dataclass(frozen=True, slots=True)
class RowCheck:
    """What is found in a row: names of WARNINGS, but for those that other rows decide.

    tails  per text whose last learnt token does not always stop the model: its number, and the tokens that would, if
           another row's template ended turns with one of them
    """

    warnings: frozenset[str] = frozenset()
    tails: tuple[tuple[int, int], ...] = ()

    @property
    def bits(self) -> int:
        return sum(BIT[name] for name in self.warnings)


def check(row_encoder: RowEncoder, rows: Iterable[EncodedRow]) -> list[RowCheck]:
    """What is found in each row; nothing in one that is lost.

    Once DECODED_ROWS rows with the same kinds of messages were shown whole, further ones are not decoded.
    """
    shown_whole: dict[_Signature, float] = {}
    always = stop_ids(row_encoder, ())
    found = []
    for row in rows:
        kind = _signature(row.conversation)
        dropped: set[str] = set()
        is_shown = row.examples and row.fate != Fate.CUT and not row_encoder.is_raw(row.conversation)
        if is_shown and shown_whole.setdefault(kind, 0) < DECODED_ROWS:
            dropped = set(_dropped(row_encoder, row))
            shown_whole[kind] += -math.inf if dropped else 1
        tails = tuple(_tails(row_encoder, row, always))
        found.append(RowCheck(frozenset(dropped | {*_of_row(row_encoder, row)}), tails) if row.examples else RowCheck())
    return found


def _of_row(row_encoder: RowEncoder, row: EncodedRow) -> Iterator[str]:
    if row_encoder.policy.render == "rendered":
        if not row_encoder.begins_so(row.conversation):
            yield "begins_otherwise"
    elif any(row_encoder.holds_answers(message) for message in row.conversation.messages):
        yield "rendered_as_text"
    elif row.literal:
        yield "special_tokens_as_text"
    if row.loses_characters:
        yield "lost_characters"
    if row.changes_characters:
        yield "changed_characters"
    if row.split_at_edges:
        yield "encoded_apart"
    bos = row_encoder.tokenizer.bos_id
    if bos is not None and any(part.tokens[:2].tolist() == [bos, bos] for part in _parts(row)):
        yield "double_bos"
    if any(_is_empty_answer(message) for message in row.conversation.messages):
        yield "empty_answer"
    yield from row.conversation.doubts
    declared = {name for tool in row.conversation.tools if (name := tool.get("function", tool).get("name"))}
    called = {call.name for message in row.conversation.messages for call in message.tool_calls}
    if declared and not called <= declared:
        yield "undeclared_tools"
    if any(map(_MEDIA.search, (message.content for message in row.conversation.messages))):
        yield "marks_of_media"
    yield from _reasoning(row_encoder, row)


_MEDIA = re.compile(
    r"[<\[]\|?(?:start_of_|begin_of_)?(?:image|img|audio|video|vision)"
    r"(?:_(?:\d+|pad|start|token|placeholder|soft_token))?\|?[>\]]",
    re.IGNORECASE,
)
"""What corpora and models write where something is seen or heard."""
_MARKED = {"reasoning": "moved_reasoning", "empty": "empty_block", "text": "reasoning_as_text"}
_SWITCHED_OFF = re.compile(r"\b\w+=false\b")


def _reasoning(row_encoder: RowEncoder, row: EncodedRow) -> Iterator[str]:
    if row_encoder.is_raw(row.conversation):
        return
    if any(EMPTY in note for note in row.notes):
        yield "empty_reasoning"
    if any(map(_SWITCHED_OFF.search, row.notes)):
        yield "thinking_off"
    marked = {row_encoder.renderer.marked(message) for message in row.conversation.messages}
    yield from (_MARKED[each] for each in marked if each)
    if not row.conversation.template_kwargs.keys() <= set(row_encoder.renderer.template.variables):
        yield "dropped_kwargs"
    is_all = row_encoder.train_on(row.conversation) == "all"
    if not is_all and any(m.weight and m.role not in ("assistant", "output") for m in row.conversation.messages):
        yield "dropped_weight"


def _parts(row: EncodedRow) -> list[Encoded]:
    return [part for example in row.examples for part in example]


def _tails(row_encoder: RowEncoder, row: EncodedRow, always: frozenset[int]) -> Iterator[tuple[int, int]]:
    # Windows of one long text go on in the next one, and a cut answer must not teach stopping.
    ends = _parts(row)[-1:] if row.conversation.kind == "text" else _parts(row)
    if row.fate != Fate.CUT:
        for number, part in enumerate(ends):
            yield from ((number, token) for token in _last_learnt(row_encoder, part, always))


def _last_learnt(row_encoder: RowEncoder, part: Encoded, always: frozenset[int]) -> list[int]:
    """The last learnt token, and the one before it if that was white space; none if one of them always stops."""
    learnt = part.tokens[np.flatnonzero(part.weights > 0)]
    found: list[int] = []
    for token in learnt[::-1].tolist():
        if token in always:
            return []
        found.append(token)
        if _decode(row_encoder, [token]).strip():
            break
    return found


def _dropped(row_encoder: RowEncoder, row: EncodedRow) -> Iterator[str]:
    """The fields of a chat of which the row's texts show nothing."""
    text = "".join(without_space(_decode(row_encoder, part.tokens.tolist())) for part in _parts(row))
    messages, _ = row_encoder.renderer.apart(row.conversation.messages)
    weights = message_weights(messages, row_encoder.train_on(row.conversation))
    last = max((index for index, weight in enumerate(weights) if weight > 0), default=-1)
    # What comes after the last learnt turn stands in no text.
    for name, value in _fields(messages[: last + 1], row.conversation.tools):
        if not any(form in text for form in _forms(row_encoder, value)):
            yield name


def _forms(row_encoder: RowEncoder, value: str) -> Iterator[str]:
    """How a field may stand in a text: as a template writes it, or as the tokenizer gives it back."""
    yield from forms(value)
    yield without_space(_decode(row_encoder, row_encoder.tokenizer.literal(value, continues=True)))


def _decode(row_encoder: RowEncoder, ids: list[int]) -> str:
    text: str = row_encoder.tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=False)
    return text


def stop_ids(row_encoder: RowEncoder, marks: Iterable[str]) -> frozenset[int]:
    """EOS, the ids of generation_config and of the marks that turns ended with: the export names them all."""
    tokenizer = row_encoder.tokenizer
    named = {tokenizer.special_tokens.get(mark) for mark in (*row_encoder.renderer.marks.eos_all, *marks)}
    return frozenset(each for each in {tokenizer.eos_id, *named} if each is not None)


def _is_empty_answer(message: Message) -> bool:
    is_learnt = message.role in ("assistant", "output") and message.weight != 0
    return is_learnt and not (message.content.strip() or message.reasoning or message.tool_calls)


def _signature(conversation: Conversation) -> _Signature:
    kinds = {(m.role, bool(m.reasoning), bool(m.tool_calls), bool(m.name)) for m in conversation.messages}
    return frozenset(kinds), bool(conversation.tools)


def _fields(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(warning if it is dropped, text) of all that a template is handed."""
    for message in messages:
        yield "dropped_content", message.content
        yield "dropped_reasoning", message.reasoning
        yield "dropped_name", message.name or ""
        for call in message.tool_calls:
            for text in (call.name, *_texts(arguments_of(call))):
                yield "dropped_tool_calls", text
    for tool in tools:
        yield "dropped_tools", str(tool.get("function", tool).get("name", ""))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a tool call's arguments.

    >>> list(_texts({"city": "Paris", "days": [1, "two"]}))
    ['Paris', 'two']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)
