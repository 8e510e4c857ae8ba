"""Rows by content: what is held out depends on a row's words alone, never on its place or the seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from deft.core.types import Conversation, Message


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
            for part in _parts(message):
                found.update(len(part).to_bytes(8, "big") + part.encode("utf-8"))
        if conversation.tools:
            found.update(repr(conversation.tools).encode("utf-8"))
    return int.from_bytes(found.digest(), "big")


def held_out(digests: np.ndarray, share: float) -> np.ndarray:
    """bool [rows]: true for about `share` of all digests, uint64; the same words always fall on the same side.

    >>> held_out(np.array([2**62, 2**63], np.uint64), 0.5).tolist()
    [True, False]
    """
    limit = math.ceil(share * 2**64)
    return np.full(len(digests), True) if limit >= 2**64 else digests < np.uint64(limit)


def _parts(message: Message) -> Iterable[str]:
    yield message.role
    yield message.content
    if message.reasoning:
        yield "reasoning"
        yield message.reasoning
    for call in message.tool_calls:
        yield call.name
        yield repr(call.arguments)
