"""Hold-out by content: what is held out depends on a conversation's words alone, never on its place or the seed."""

from __future__ import annotations

import hashlib

from deft.types import Conversation


def is_held_out(conversation: Conversation, share: float) -> bool:
    """True for about `share` of all conversations; the same words always fall on the same side.

    >>> from deft.types import Message, Origin
    >>> rows = [Conversation(Origin("a", i), "text", (Message("output", str(i)),)) for i in range(1000)]
    >>> 150 < sum(is_held_out(row, 0.2) for row in rows) < 250
    True
    """
    if share <= 0:
        return False
    digest = hashlib.blake2b(digest_size=8)
    for message in conversation.messages:
        for part in (message.role, message.content):
            digest.update(len(part).to_bytes(8, "big") + part.encode("utf-8"))
    return int.from_bytes(digest.digest(), "big") < share * 2**64
