"""What is learnt: `train_on` and the weights that rows carry -> one weight per message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from deft.core.types import Kind, Message

TrainOn = Literal["assistant", "last_assistant", "completion", "all"]

DEFAULT: dict[Kind, TrainOn] = {"text": "all", "dialogue": "completion", "chat": "assistant"}
"""What is learnt where `train_on` is not said."""

_LEARNT_ROLES = {"assistant", "output"}


def weights(messages: Sequence[Message], train_on: TrainOn) -> list[float]:
    """How much each message is learnt: its own weight, or 1 or 0 by the policy.

    A weight that a row carries counts on messages that the policy learns; it never makes another role a target.

    >>> chat = [Message("user", "a"), Message("assistant", "b", 0.5), Message("user", "c"), Message("assistant", "d")]
    >>> weights(chat, "assistant"), weights(chat, "last_assistant")
    ([0.0, 0.5, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0])
    """
    learnt = [train_on == "all" or message.role in _LEARNT_ROLES for message in messages]
    if train_on == "last_assistant" and any(learnt):
        last = max(index for index, is_learnt in enumerate(learnt) if is_learnt)
        learnt = [index == last for index in range(len(messages))]
    return [
        (1.0 if message.weight is None else message.weight) if is_learnt else 0.0
        for message, is_learnt in zip(messages, learnt, strict=True)
    ]
