"""Chunks of rows -> encoded chunks: read, encoded, checked and laid out as Arrow arrays. Worker processes run this."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from deft.core.errors import DeftError, Problem
from deft.core.types import Conversation, Encoded, Fate, Message, Origin
from deft.data import shapes
from deft.data.format import Choices
from deft.data.shapes import Outcome
from deft.dataset import data_warnings
from deft.dataset.source import Item, SourceSpec
from deft.dataset.store import FATES, SCHEMA, EncodedChunk, Stage, example_digest
from deft.encoding.edges import Coder
from deft.encoding.render.chat import ChatRenderer
from deft.encoding.render.stop import Marks
from deft.encoding.render.template import Chosen, Template, choose
from deft.encoding.rows import EncodedRow, Policy, RowEncoder
from deft.encoding.tokenizer import Tokenizer


def template_of(tokenizer: Tokenizer, setting: str) -> Chosen:
    """The chat template that `template` asks for. Raises InputError as `choose` does."""
    own, named = tokenizer.chat_template, tokenizer.named_templates
    return choose(setting, own, tokenizer.puts_bos, tokenizer.special_tokens, named)


def encoder(tokenizer: Tokenizer, chosen: Chosen, policy: Policy, stop_ids: Sequence[int] = ()) -> RowEncoder:
    """What turns conversations into tokens.

    stop_ids  those of the model's generation_config
    """
    return _fresh(tokenizer, chosen.source, tokenizer.marks(stop_ids), policy)


def _fresh(tokenizer: Tokenizer, source: str, marks: Marks, policy: Policy) -> RowEncoder:
    template = Template(source, tokenizer.template_tokens, policy.template_kwargs)
    return RowEncoder(ChatRenderer(template, marks, policy.rules), Coder(tokenizer), policy)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a process needs to encode the rows of a source. shape: of all its rows."""

    tokenizer: Tokenizer
    template: str
    marks: Marks
    policy: Policy
    source: str
    shape: str
    choices: Choices

    @classmethod
    def of(cls, row_encoder: RowEncoder, source: SourceSpec, shape: str) -> Recipe:
        renderer, policy = row_encoder.renderer, row_encoder.policy
        template = renderer.template.source
        return cls(row_encoder.tokenizer, template, renderer.marks, policy, source.path, shape, source.choices)

    def encoder(self) -> RowEncoder:
        return _fresh(self.tokenizer, self.template, self.marks, self.policy)


@dataclass(frozen=True, slots=True)
class FatedRow:
    """A row with its last conversation's fate. scales: what multiplies the weights of each of its examples."""

    row: EncodedRow
    stage: Stage
    digest: int = 0
    scales: tuple[float, ...] = ()


def maker(recipe: Recipe) -> Callable[[Item], EncodedChunk]:
    """What encodes chunks; the same chunk always gives the same bytes, whatever came before it."""
    row_encoder = recipe.encoder()

    def make(item: Item) -> EncodedChunk:
        found = outcomes(recipe.source, recipe.shape, recipe.choices, item)
        return laid_out(row_encoder, item[0].source, encoded(row_encoder, found))

    return make


def outcomes(source: str, shape: str, choices: Choices, item: Item) -> list[Outcome]:
    """What the rows of a chunk are, in order."""
    chunk, left_out = item
    found = shapes.Reader(source, shape, choices).each(chunk.read())
    return [
        replace(each, conversations=(), left_out=left_out[each.origin]) if each.origin in left_out else each
        for each in found
    ]


def encoded(row_encoder: RowEncoder, found: Sequence[Outcome]) -> list[FatedRow]:
    """Each row under one fate."""
    conversations = [each for outcome in found for each in outcome.conversations]
    rows = iter(_encoded_many(row_encoder, conversations))
    return [_fated(outcome, list(islice(rows, len(outcome.conversations)))) for outcome in found]


def _encoded_many(row_encoder: RowEncoder, conversations: Sequence[Conversation]) -> list[EncodedRow]:
    try:
        return row_encoder.encode_many(conversations)
    except DeftError:
        raise
    except Exception:
        for conversation in conversations:
            try:
                row_encoder.encode(conversation)
            except Exception as error:
                what = f"{conversation.origin}: {type(error).__name__}: {error}"
                raise DeftError(f"{what}: deft has a bug; please report it with this row") from error
        raise


def _fated(outcome: Outcome, rows: Sequence[EncodedRow]) -> FatedRow:
    if outcome.refused:
        return FatedRow(_lost(outcome.origin, Fate.REFUSED, _why(outcome.refused)), Stage.UNREAD)
    if outcome.left_out:
        return FatedRow(_lost(outcome.origin, Fate.LEFT_OUT, outcome.left_out), Stage.LEFT_OUT)
    weighed = [_weighed(row) for row in rows]
    scales = tuple(row.conversation.weight for row in weighed for _ in row.examples)
    row = weighed[0] if len(weighed) == 1 else _as_one(weighed)
    return FatedRow(row, Stage.ENCODED, digest(outcome.conversations), scales if row.examples else ())


def digest(conversations: Sequence[Conversation]) -> int:
    """64 bits of all the words of a row, with their roles; equal rows have equal digests wherever they stand.

    >>> from deft.core.types import Origin
    >>> a, b = (Conversation(Origin("a", line), "text", (Message("output", "Hi"),)) for line in (1, 2))
    >>> digest([a]) == digest([b])
    True
    """
    found = hashlib.blake2b(digest_size=8)
    for conversation in conversations:
        for message in conversation.messages:
            for part in _words(message):
                found.update(len(part).to_bytes(8, "big") + part.encode("utf-8"))
        for more in (conversation.tools, conversation.template_kwargs):
            if more:
                found.update(repr(more).encode("utf-8"))
    return int.from_bytes(found.digest(), "big")


def _words(message: Message) -> Iterable[str]:
    yield message.role
    yield message.content
    if message.reasoning:
        yield "reasoning"
        yield message.reasoning
    for call in message.tool_calls:
        yield call.name
        yield repr(call.arguments)


def _lost(origin: Origin, fate: Fate, reason: str) -> EncodedRow:
    return EncodedRow(Conversation(origin, "text", ()), fate, reason=reason)


def _why(problem: Problem) -> str:
    return f"{problem.what}; {problem.fix}" if problem.fix else problem.what


def _weighed(row: EncodedRow) -> EncodedRow:
    """The row, which has nothing to learn where its own weight is 0."""
    if row.conversation.weight or not row.examples:
        return row
    return replace(row, fate=Fate.NO_TARGET, examples=(), reason="its weight is 0")


def _as_one(rows: Sequence[EncodedRow]) -> EncodedRow:
    """Several conversations of one row as the row: refused where one is, else trained as far as they are."""
    refused = [row for row in rows if row.fate == Fate.REFUSED]
    lost = [row for row in rows if not row.examples]
    if refused or len(lost) == len(rows):
        return (refused or lost)[0]
    is_whole = all(row.fate == Fate.TRAINED for row in rows)
    return EncodedRow(
        rows[0].conversation,
        Fate.TRAINED if is_whole else Fate.CUT,
        tuple(example for row in rows for example in row.examples),
        f"{len(lost)} of its {len(rows)} conversations are not trained: {lost[0].reason}" if lost else "",
        max(row.literal for row in rows),
        any(row.split_at_edges for row in rows),
        tuple(dict.fromkeys(note for row in rows for note in row.notes)),
        any(row.loses_characters for row in rows),
        any(row.changes_characters for row in rows),
    )


def laid_out(row_encoder: RowEncoder, file: str, fated: Sequence[FatedRow]) -> EncodedChunk:
    """Rows of one file in the form of SCHEMA."""
    rows = [each.row for each in fated]
    checks = data_warnings.check(row_encoder, rows)
    found = {
        "file": [file] * len(rows),
        "line": [row.conversation.origin.line for row in rows],
        "item": [row.conversation.origin.item for row in rows],
        "stage": [each.stage for each in fated],
        "fate": [FATES.index(row.fate) for row in rows],
        "reason": [row.reason for row in rows],
        "digest": [each.digest for each in fated],
        "warnings": [check.bits for check in checks],
        "fallbacks": ["\n".join(row.notes) or None for row in rows],
        "tails": [[{"text": text, "token": token} for text, token in check.tails] for check in checks],
    }
    columns = [pa.array(values, SCHEMA.field(name).type) for name, values in found.items()]
    batch = pa.RecordBatch.from_arrays([*columns, _examples(fated)], schema=SCHEMA)
    return EncodedChunk(batch, row_encoder.stop_marks())


def _examples(fated: Sequence[FatedRow]) -> pa.ListArray:
    """The column `examples`."""
    scales = [scale for each in fated for scale in each.scales]
    examples = [example for each in fated for example in each.row.examples]
    parts = [part for example in examples for part in example]
    kind = SCHEMA.field("examples").type
    digests = np.array([example_digest(*each) for each in zip(examples, scales, strict=True)], np.uint64)
    lists = _lists(
        [len(example) for example in examples], _parts(parts, kind.value_type.field("parts").type.value_type)
    )
    structs = _struct(kind.value_type, digests, np.array(scales, np.float64), lists)
    return _lists([len(each.row.examples) for each in fated], structs)


def _parts(parts: Sequence[Encoded], kind: pa.StructType) -> pa.StructArray:
    lengths = np.array([len(part.tokens) for part in parts], np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in parts)], dtype=np.int32)
    weights = np.concatenate([np.zeros(0, np.float32), *(part.weights for part in parts)])
    ends = np.cumsum(lengths)
    is_first = np.zeros(len(weights), bool)
    is_first[ends - lengths] = True
    starts = np.flatnonzero(is_first | np.concatenate([[True], weights[1:] != weights[:-1]])[: len(weights)])
    runs = _struct(
        kind.field("runs").type.value_type,
        np.diff(starts, append=len(weights)).astype(np.int32),
        weights[starts].astype(np.float32),
    )
    # The first token of a text is predicted by nothing.
    targets = np.diff(np.concatenate([[0], np.cumsum((weights > 0) & ~is_first)])[ends], prepend=0)
    run_counts = np.diff(np.searchsorted(starts, ends), prepend=0)
    return _struct(kind, _lists(lengths, tokens), _lists(run_counts, runs), targets.astype(np.int32))


def _lists(lengths: Sequence[int] | np.ndarray, values: Any) -> pa.ListArray:
    """Values as lists with these lengths, int32."""
    offsets = np.concatenate([[0], np.cumsum(lengths)], dtype=np.int32, casting="unsafe")
    return pa.ListArray.from_arrays(pa.array(offsets), values if isinstance(values, pa.Array) else pa.array(values))


def _struct(kind: pa.StructType, *fields: Any) -> pa.StructArray:
    arrays = [each if isinstance(each, pa.Array) else pa.array(each) for each in fields]
    return pa.StructArray.from_arrays(arrays, fields=list(kind))
