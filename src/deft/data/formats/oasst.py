"""Open Assistant's message trees: {"message_tree_id": ..., "prompt": {"role": "prompter", "text", "replies": [...]}}.

The best path is learnt: at each turn the reply ranked first. `answers: all` gives every path, each reply learnt once.
Deleted replies, and those that reviewers refused, are no part of a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deft.core.types import Conversation, Message, Row
from deft.data import messages
from deft.data.fields import RowError, kind_of, need, number_of, object_of, role_of, text_of
from deft.data.format import Choices

KEYS = ({"message_tree_id", "prompt"}, {"message_id", "role", "text"}, {"message_id", "parent_id", "role", "text"})
PARTS = frozenset({"role", "text", "replies", "rank", "deleted", "review_result"})
OPTIONS = {"answers"}
ROLES = {"prompter": "user", "assistant": "assistant", "system": "system", "user": "user"}

_Node = tuple[Message, int]
"""A message and the number of its place in the tree, which tells equal messages apart."""


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> replies = [{"role": "assistant", "text": "5", "rank": 1}, {"role": "assistant", "text": "4", "rank": 0}]
    >>> tree = {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "2+2?", "replies": replies}}
    >>> [message.content for message in convert(Row(Origin("a.jsonl", 1), tree), Choices())[0].messages]
    ['2+2?', '4']
    """
    if row.value.get("prompt") is None:
        raise RowError("prompt", "missing: a message of its own, not a tree", "use the export of trees (*_trees.jsonl)")
    root = object_of(row.value["prompt"], "prompt", "a message with replies")
    paths = [path for path in _paths(root, choices.answers != "all") if path]
    if not paths:
        raise RowError("prompt.replies", "no assistant message: nothing to learn", "remove the row")
    return [messages.chat(row, path, "prompt") for path in _learnt_once(paths)]


def _learnt_once(paths: Sequence[Sequence[_Node]]) -> Iterator[list[Message]]:
    """The messages of each path; a reply that an earlier path learns has no weight, a path without a new one is not."""
    seen: set[int] = set()
    for path in paths:
        new = {place for message, place in path if message.role == "assistant"} - seen
        if new:
            yield [m if m.role != "assistant" or place in new else replace(m, weight=0.0) for m, place in path]
        seen |= new


def _paths(root: Mapping[str, Any], best: bool) -> Iterator[list[_Node]]:
    """The paths from the root to a leaf, each cut after its last assistant message; only the first with `best`."""
    stack: list[tuple[Mapping[str, Any], str, list[_Node]]] = [(root, "prompt", [])]
    place = 0
    while stack:
        value, field, before = stack.pop()
        path = [*before, (_message(value, field), place)]
        place += 1
        replies = _replies(value, field)
        if replies:
            stack += [(reply, name, path) for reply, name in reversed(replies)]
            continue
        spoken = [i for i, (message, _) in enumerate(path) if message.role == "assistant"]
        yield path[: spoken[-1] + 1] if spoken else []
        if best and spoken:
            return


def _message(value: Mapping[str, Any], field: str) -> Message:
    need(value, ("role", "text"), "a message", field)
    role = role_of(value["role"], f"{field}.role", ROLES)
    return Message(role, text_of(value["text"], f"{field}.text"))


def _replies(value: Mapping[str, Any], field: str) -> list[tuple[Mapping[str, Any], str]]:
    """The replies that may be learnt with their fields, the best ranked first."""
    replies = value.get("replies") or []
    if not isinstance(replies, list | tuple):
        raise RowError(f"{field}.replies", f"{kind_of(replies)}, not a list", "give a list of messages")
    named = [(f"{field}.replies[{i}]", reply) for i, reply in enumerate(replies)]
    found = [(object_of(reply, name, "a message"), name) for name, reply in named]
    kept = [each for each in found if not each[0].get("deleted") and each[0].get("review_result") is not False]
    return sorted(kept, key=_rank)


def _rank(reply: tuple[Mapping[str, Any], str]) -> float:
    rank = number_of(reply[0].get("rank"))
    return float("inf") if rank is None else rank
