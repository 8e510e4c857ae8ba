"""Chunks of rows -> blocks: read, encoded, looked at and laid out as arrays; what other processes do for `dataset`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np

from deft import tokenizer as edge
from deft.data import shapes, split
from deft.data.choices import Choices
from deft.data.chunks import Chunk
from deft.data.shapes import Outcome
from deft.encoding.pieces import Coder
from deft.encoding.rows import EncodedRow, Example, Policy, RowEncoder
from deft.errors import DeftError, Problem
from deft.fates import BIT
from deft.render.chat import ChatRenderer
from deft.render.stop import Marks
from deft.render.template import Template
from deft.store import COLUMNS, FATES, Block, Stage
from deft.symptoms import Examiner
from deft.types import Conversation, Encoded, Fate, Origin


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a process needs to make blocks of a source.

    hf     the Hugging Face tokenizer
    now    the moment that the template calls now
    shape  of all rows of the source
    """

    hf: Any
    template: str
    now: datetime
    marks: Marks
    policy: Policy
    source: str
    shape: str
    choices: Choices

    def encoder(self) -> RowEncoder:
        tokenizer = edge.wrap(self.hf)
        template = Template(self.template, tokenizer.template_tokens, self.policy.template_kwargs, self.now)
        return RowEncoder(ChatRenderer(template, self.marks, self.policy.rules), Coder(tokenizer), self.policy)


@dataclass(frozen=True, slots=True)
class Coded:
    """A row with its last conversation's fate, and what its own weight multiplies the weights of each example by."""

    row: EncodedRow
    stage: Stage
    digest: int = 0
    scales: tuple[float, ...] = ()


Item = tuple[Chunk, Mapping[Origin, str]]
"""Rows, and which of them are left out because of others."""


def maker(recipe: Recipe) -> Callable[[Item], Block]:
    """What makes blocks of chunks; the same chunk always gives the same block, whatever came before it."""
    row_encoder = recipe.encoder()

    def make(item: Item) -> Block:
        found = outcomes(recipe.source, recipe.shape, recipe.choices, item)
        return block(row_encoder, item[0].source, encoded(row_encoder, found), Examiner(row_encoder))

    return make


def outcomes(source: str, shape: str, choices: Choices, item: Item) -> list[Outcome]:
    """What the rows of a chunk are, in order."""
    chunk, left_out = item
    found = shapes.Reader(source, shape, choices).each(chunk.read())
    return [
        replace(each, conversations=(), left_out=left_out[each.origin]) if each.origin in left_out else each
        for each in found
    ]


def encoded(row_encoder: RowEncoder, found: Sequence[Outcome]) -> list[Coded]:
    """Each row under one fate."""
    conversations = [each for outcome in found for each in outcome.conversations]
    rows = iter(_encoded_many(row_encoder, conversations))
    return [_coded(outcome, list(islice(rows, len(outcome.conversations)))) for outcome in found]


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


def _coded(outcome: Outcome, rows: Sequence[EncodedRow]) -> Coded:
    if outcome.refused:
        return Coded(_lost(outcome.origin, Fate.REFUSED, _why(outcome.refused)), Stage.UNREAD)
    if outcome.left_out:
        return Coded(_lost(outcome.origin, Fate.LEFT_OUT, outcome.left_out), Stage.LEFT_OUT)
    weighed = [_weighed(row) for row in rows]
    scales = tuple(row.conversation.weight for row in weighed for _ in row.examples)
    row = weighed[0] if len(weighed) == 1 else _as_one(weighed)
    return Coded(row, Stage.ENCODED, split.digest(outcome.conversations), scales if row.examples else ())


def _lost(origin: Origin, fate: Fate, reason: str) -> EncodedRow:
    return EncodedRow(Conversation(origin, "text", ()), fate, reason=reason)


def _why(problem: Problem) -> str:
    return f"{problem.what}; {problem.fix}" if problem.fix else problem.what


def _weighed(row: EncodedRow) -> EncodedRow:
    """The row, which has nothing to learn where its own weight is 0."""
    if row.conversation.weight or not row.examples:
        return row
    return replace(row, fate=Fate.NO_TARGET, examples=(), reason="its loss_weight is 0")


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
        any(row.apart for row in rows),
    )


def block(row_encoder: RowEncoder, source: str, coded: Sequence[Coded], examiner: Examiner) -> Block:
    """Rows of one file, laid out."""
    rows = [each.row for each in coded]
    looks = [examiner.look(row) for row in rows]
    examples = [example for row in rows for example in row.examples]
    parts = [part for example in examples for part in example]
    notes = Counter(row.notes for row in rows if row.notes)
    codes = {note: code for code, note in enumerate(notes)} | {(): -1}
    scales = [scale for each in coded for scale in each.scales]
    tails = [(number, *tail) for number, look in enumerate(looks) for tail in look.tails]
    reasons = [(number, row.reason.encode("utf-8")) for number, row in enumerate(rows) if row.reason]
    found: dict[str, Any] = {
        "line": [row.conversation.origin.line for row in rows],
        "item": [row.conversation.origin.item for row in rows],
        "stage": [each.stage for each in coded],
        "fate": [FATES.index(row.fate) for row in rows],
        "digest": [each.digest for each in coded],
        "symptoms": [sum(BIT[name] for name in look.symptoms) for look in looks],
        "notes": [codes[row.notes] for row in rows],
        "row_examples": _ends(len(row.examples) for row in rows),
        "lost_row": [number for number, _ in reasons],
        "lost_end": _ends(len(reason) for _, reason in reasons),
        "reason": np.frombuffer(b"".join(reason for _, reason in reasons), np.uint8),
        "example_parts": _ends(len(example) for example in examples),
        "example_digest": [_digest(example, scale) for example, scale in zip(examples, scales, strict=True)],
        "part_tokens": _ends(len(part.tokens) for part in parts),
        "part_scale": [scale for example, scale in zip(examples, scales, strict=True) for _ in example],
        "tokens": np.concatenate([[], *(part.tokens for part in parts)]),
        "tail_row": [row for row, _, _ in tails],
        "tail_part": [part for _, part, _ in tails],
        "tail_token": [token for _, _, token in tails],
        **_runs(parts),
    }
    found["file"] = np.zeros(len(rows))
    columns = {name: np.asarray(found[name], COLUMNS[name]) for name in COLUMNS}
    return Block(source, columns, tuple(notes), row_encoder.renderer.stop_marks())


def _digest(example: Example, scale: float) -> int:
    found = hashlib.blake2b(np.float64(scale).tobytes(), digest_size=8)
    for part in example:
        found.update(len(part.tokens).to_bytes(8, "little"))
        found.update(part.tokens.astype("<i4", copy=False).tobytes())
        found.update(part.weights.astype("<f4", copy=False).tobytes())
    return int.from_bytes(found.digest(), "little")


def _ends(counts: Any) -> np.ndarray:
    return np.cumsum(np.fromiter(counts, np.int64))


def _runs(parts: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """The weights of all parts as runs, and the targets of each: the first token of a part is predicted by nothing."""
    weights = np.concatenate([np.zeros(0, np.float32), *(part.weights for part in parts)])
    ends = _ends(len(part.tokens) for part in parts)
    first = np.zeros(len(weights), bool)
    first[ends - np.diff(ends, prepend=0)] = True
    begins = np.flatnonzero(first | np.concatenate([[True], weights[1:] != weights[:-1]])[: len(weights)])
    learnt = np.concatenate([[0], np.cumsum((weights > 0) & ~first)])
    return {
        "part_runs": np.searchsorted(begins, ends),
        "part_targets": np.diff(learnt[ends], prepend=0),
        "run_length": np.diff(begins, append=len(weights)),
        "run_weight": weights[begins],
    }
