"""trlx dialogues: ["prompt", "output", "prompt", "output", ...]. Outputs are learnt, no template is used."""

from __future__ import annotations

from deft.core.types import Conversation, Message, Row
from deft.data.fields import RowError, list_of, text_of
from deft.data.format import Choices

KEYS = ({"<list of text>"},)


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """Empty strings are kept: they follow trlx's rules (the last output then is the EOS token alone).

    >>> from deft.core.types import Origin
    >>> (dialogue,) = convert(Row(Origin("a.jsonl", 1), ["Hi", "Hello", "Bye", "Bye"]), Choices())
    >>> [message.role for message in dialogue.messages]
    ['prompt', 'output', 'prompt', 'output']
    """
    texts = list_of(row.value, "dialogue")
    if len(texts) % 2:
        raise RowError("dialogue", f"{len(texts)} messages", "prompts and outputs alternate: an even number")
    roles = ("prompt", "output") * (len(texts) // 2)
    messages = (Message(role, text_of(text, f"[{i}]")) for i, (role, text) in enumerate(zip(roles, texts, strict=True)))
    return [Conversation(row.origin, "dialogue", tuple(messages))]
