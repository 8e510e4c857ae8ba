"""What may be wrong with a row that is trained all the same: symptoms, looked for in its messages and its tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from deft.encoding.rows import EncodedRow, RowEncoder
from deft.render import policy
from deft.types import Conversation, Encoded, Fate, Message

DECODED_ROWS = 50
"""Rows with the same kinds of messages are decoded to see whether the template shows every field, until so many did."""

Level = Literal["note", "warning"]


@dataclass(frozen=True, slots=True)
class Symptom:
    """How much it matters, what it is ({s} and {have} agree with the number of rows), and what to do.

    >>> Symptom("note", "open{s} with BOS twice", "mend it").of(1), Symptom("note", "{have} two", "").of(2)
    ('1 row opens with BOS twice', '2 rows have two')
    """

    level: Level
    what: str
    fix: str

    def of(self, rows: int) -> str:
        """The symptom as a sentence about so many rows."""
        return f"1 row {self._of_one}" if rows == 1 else f"{rows} rows {self.what.format(s='', have='have')}"

    @property
    def here(self) -> str:
        """The symptom, said of the row above it, and what to do."""
        return f"{self._of_one}; {self.fix}"

    @property
    def _of_one(self) -> str:
        return self.what.format(s="s", have="has")


SYMPTOMS: Mapping[str, Symptom] = {
    "no_stop": Symptom(
        "warning",
        "end{s} without a token that stops the model",
        "give the tokenizer an EOS token, or end the row with an answer",
    ),
    "double_bos": Symptom("warning", "open{s} with BOS twice", "take one out of the chat template"),
    "empty_answer": Symptom(
        "warning", "{have} an answer without words: only stopping is learnt there", "fill it in, or remove the row"
    ),
    "special_tokens_as_text": Symptom(
        "note", "{have} special tokens in a message", "they are encoded as text, never as control tokens"
    ),
    "encoded_apart": Symptom(
        "note",
        "{have} prompt and answer encoded apart, as one encoding would merge their edge",
        "inference encodes the prompt alone as well",
    ),
    "duplicate": Symptom(
        "warning", "say{s} exactly what an earlier row says", "remove repetitions, or leave them if they are meant"
    ),
    "in_evaluation": Symptom(
        "note", "stand{s} in the evaluation data too", "it is not trained, so that both stay apart"
    ),
    "dropped_content": Symptom(
        "warning", "{have} a message that the chat template does not show", "choose another with template="
    ),
    "dropped_reasoning": Symptom(
        "warning", "{have} reasoning that the chat template does not show", "choose one that shows it with template="
    ),
    "dropped_tool_calls": Symptom(
        "warning",
        "{have} tool calls that the chat template does not show",
        "choose one that knows tools with template=",
    ),
    "dropped_tools": Symptom(
        "warning", "{have} tools that the chat template does not show", "choose one that knows tools with template="
    ),
    "dropped_name": Symptom(
        "note", "{have} names that the chat template does not show", "choose another with template= if they matter"
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


_Signature = tuple[frozenset[tuple[str, bool, bool, bool]], bool]


@dataclass(frozen=True, slots=True)
class Look:
    """What is found in a row: names of `SYMPTOMS`, in their order, but for those that other rows decide.

    tails  per text whose last learnt token does not always stop the model: its number, and the tokens that would, if
           another row's template ended turns with one of them
    """

    symptoms: tuple[str, ...] = ()
    tails: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Examiner:
    """Names each row's symptoms; `_whole` counts the rows of a kind that were shown whole, before any that was not."""

    row_encoder: RowEncoder
    _whole: Counter[_Signature] = field(default_factory=Counter, repr=False)
    _partial: set[_Signature] = field(default_factory=set, repr=False)

    def look(self, row: EncodedRow) -> Look:
        """What is found in a row; in one that is lost, nothing."""
        if not row.examples:
            return Look()
        found = {*self._of_tokens(row), *self._dropped(row)}
        if any(_is_empty_answer(message) for message in row.conversation.messages):
            found.add("empty_answer")
        return Look(tuple(name for name in SYMPTOMS if name in found), tuple(self._tails(row)))

    def _of_tokens(self, row: EncodedRow) -> Iterator[str]:
        if row.literal:
            yield "special_tokens_as_text"
        if row.apart:
            yield "encoded_apart"
        bos = self.row_encoder.tokenizer.bos_id
        parts = [part for example in row.examples for part in example]
        if bos is not None and any(part.tokens[:2].tolist() == [bos, bos] for part in parts):
            yield "double_bos"

    def _tails(self, row: EncodedRow) -> Iterator[tuple[int, int]]:
        parts = [part for example in row.examples for part in example]
        # Windows of one long text go on in the next one, and a cut answer must not teach stopping.
        ends = parts[-1:] if row.conversation.kind == "text" else parts
        if row.fate != Fate.CUT:
            for number, part in enumerate(ends):
                yield from ((number, token) for token in self._last(part))

    def _last(self, part: Encoded) -> list[int]:
        """The last learnt token, and the one before it if that was white space; none if one of them always stops."""
        learnt = part.tokens[np.flatnonzero(part.weights > 0)]
        found: list[int] = []
        for token in learnt[::-1].tolist():
            if token in self._always:
                return []
            found.append(token)
            if self._decode([token]).strip():
                break
        return found

    @cached_property
    def _always(self) -> frozenset[int]:
        return stop_ids(self.row_encoder, ())

    def _dropped(self, row: EncodedRow) -> set[str]:
        """The fields of a chat of which the row's texts show nothing."""
        kind = _signature(row.conversation)
        is_known = self._whole[kind] >= DECODED_ROWS and kind not in self._partial
        if row.fate == Fate.CUT or is_known or self.row_encoder.is_raw(row.conversation):
            return set()
        found = set(self._missing(row, row.conversation))
        self._whole[kind] += 1
        if found:
            self._partial.add(kind)
        return found

    def _missing(self, row: EncodedRow, conversation: Conversation) -> Iterator[str]:
        text = "".join(_squeezed(self._decode(part.tokens.tolist())) for example in row.examples for part in example)
        weights = policy.weights(conversation.messages, self.row_encoder.train_on(conversation))
        last = max((index for index, weight in enumerate(weights) if weight > 0), default=-1)
        # What comes after the last learnt turn stands in no text.
        for name, value in _fields(conversation.messages[: last + 1], conversation.tools):
            if not any(form in text for form in self._forms(value)):
                yield name

    def _forms(self, value: str) -> Iterator[str]:
        """How a field may stand in a text: as it is, escaped in JSON, or as the tokenizer gives it back."""
        yield _squeezed(value)
        yield _squeezed(json.dumps(value, ensure_ascii=False)[1:-1])
        yield _squeezed(json.dumps(value)[1:-1])
        yield _squeezed(self._decode(self.row_encoder.tokenizer.literal(value, continues=True)))

    def _decode(self, ids: list[int]) -> str:
        text: str = self.row_encoder.tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=False)
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
    """(symptom if it is dropped, text) of all that a template is handed."""
    for message in messages:
        yield "dropped_content", message.content
        yield "dropped_reasoning", message.reasoning
        yield "dropped_name", message.name or ""
        for call in message.tool_calls:
            for text in (call.name, *_leaves(call.arguments)):
                yield "dropped_tool_calls", text
    for tool in tools:
        yield "dropped_tools", str(tool.get("function", tool).get("name", ""))


def _leaves(arguments: Any) -> Iterator[str]:
    """The texts in a tool call's arguments.

    >>> list(_leaves('{"city": "Paris", "days": [1, "two"]}'))
    ['Paris', 'two']
    """
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = arguments
        arguments = parsed
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, list):
        for value in arguments:
            yield from _leaves(value) if not isinstance(value, str) else [value]
    elif isinstance(arguments, str):
        yield arguments


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim and tokenizers move."""
    return "".join(text.split())
