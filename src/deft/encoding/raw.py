"""Text and dialogues -> ids and weights, by trlx's rules (tokenize_dialogue of CarperAI/trlx 3340c2f).

Each message is encoded apart, so no token lies across a prompt's end. The last output is closed by EOS, once. BOS
stands once: where the tokenizer itself puts one, or where something learnt comes first (EOS where there is no BOS). A
cut on the right takes EOS away with the tail, so a cut answer does not teach stopping; a cut on the left keeps the end.

Unlike trlx, special tokens inside a message are text, prompt-first dialogues get the BOS that the tokenizer puts, and a
sentencepiece tokenizer opens only the first message with a space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deft.core.types import Message
from deft.encoding.tokenizer import Tokenizer

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Piece:
    """The ids of one message, learnt with one weight."""

    ids: tuple[int, ...]
    weight: float
    is_output: bool


def pieces(messages: Sequence[Message], weights: Sequence[float], tokenizer: Tokenizer) -> tuple[list[Piece], int]:
    """The messages encoded apart, the last one closed by EOS; and how many special tokens stand in them as text."""
    eos = tokenizer.hf.eos_token or ""
    coded, literal = [], 0
    for index, (message, weight) in enumerate(zip(messages, weights, strict=True)):
        is_last = index == len(messages) - 1
        text = message.content.removesuffix(eos) if is_last and eos else message.content
        ids = tokenizer.literal(text, continues=index > 0) if text else []
        if is_last and tokenizer.eos_id is not None:
            ids = [*ids, tokenizer.eos_id]
        literal += len(tokenizer.find_special(text))
        coded.append(Piece(tuple(ids), weight, message.role == "output"))
    return coded, literal


def cut(parts: Sequence[Piece], max_length: int, side: Side) -> list[Piece]:
    """The first (right) or last (left) `max_length` tokens; messages left without tokens go.

    >>> prompt, output = Piece((1, 2, 3), 0.0, False), Piece((4, 5), 1.0, True)
    >>> [piece.ids for piece in cut([prompt, output], 4, "right")]
    [(1, 2, 3), (4,)]
    >>> [piece.ids for piece in cut([prompt, output], 3, "left")]
    [(3,), (4, 5)]
    """
    kept: list[Piece] = []
    room = max_length
    for piece in reversed(parts) if side == "left" else parts:
        ids = piece.ids[:room] if side == "right" else piece.ids[max(0, len(piece.ids) - room) :]
        room -= len(ids)
        kept.append(Piece(ids, piece.weight, piece.is_output))
    ordered = reversed(kept) if side == "left" else kept
    return [piece for piece in ordered if piece.ids]


def whole(parts: Sequence[Piece], tokenizer: Tokenizer) -> list[Piece]:
    """All of them, with BOS in front where it belongs."""
    return fit(parts, tokenizer, length(parts) + 1, "right")


def length(parts: Sequence[Piece]) -> int:
    return sum(len(part.ids) for part in parts)


def fit(parts: Sequence[Piece], tokenizer: Tokenizer, max_length: int, side: Side) -> list[Piece]:
    """`cut`, with BOS in front where it belongs and counted."""
    if not tokenizer.start_ids:
        return cut(parts, max_length, side)
    start = Piece(tuple(tokenizer.start_ids), 0.0, False)
    if tokenizer.puts_bos:
        return [start, *cut(parts, max_length - 1, side)]
    kept = cut(parts, max_length, side)
    if not kept or not kept[0].is_output:
        return kept
    return [start, *cut(kept, max_length - 1, side)]


def join(parts: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T] and weights float32 [T] of the pieces in order."""
    ids = np.array([token for piece in parts for token in piece.ids], np.int32)
    weights = np.repeat(np.array([p.weight for p in parts], np.float32), [len(p.ids) for p in parts])
    return ids, weights


def windows(ids: np.ndarray, weights: np.ndarray, max_length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A long text in pieces of at most `max_length` tokens, in which every token is learnt exactly once.

    Each window after the first opens with the last token of the one before, not learnt again.

    >>> ids, weights = np.arange(6), np.array([0, 1, 1, 1, 1, 1])
    >>> [(w.tolist(), v.tolist()) for w, v in windows(ids, weights, 4)]
    [([0, 1, 2, 3], [0, 1, 1, 1]), ([3, 4, 5], [0, 1, 1])]
    """
    found = []
    for start in range(0, max(1, len(ids) - 1), max_length - 1):
        learnt = weights[start : start + max_length].copy()
        if start:
            learnt[0] = 0
        found.append((ids[start : start + max_length], learnt))
    return found
