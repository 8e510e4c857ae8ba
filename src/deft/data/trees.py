"""Open Assistant's messages, a row each with the id of its parent -> its trees, a row each, as the export of trees has.

The messages of a tree stand side by side in its files. A tree stands where its first message does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any

from deft.core.errors import Problem
from deft.core.types import Row
from deft.data.chunks import Chunk, of

_FIELDS = {"message_id", "parent_id", "role", "text"}


def gathered(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks of a source; where its first row is a message of a tree, those of trees.

    >>> from deft.core.types import Origin
    >>> ids = (("1", None, "prompter"), ("2", "1", "assistant"))
    >>> values = [{"message_id": own, "parent_id": up, "role": role, "text": "Hi"} for own, up, role in ids]
    >>> (chunk,) = gathered(of([Row(Origin("a", line), each) for line, each in enumerate(values, 1)], "a"))
    >>> [row.value["prompt"]["replies"][0]["message_id"] for row in chunk.read()]
    ['2']
    """
    waiting = iter(chunks)
    first = next(waiting, None)
    if first is None:
        return
    every = chain([first], waiting)
    if not _is_message(next(first.read(), None)):
        yield from every
        return
    for source, files_chunks in groupby(every, key=lambda chunk: chunk.source):
        yield from of(_trees(row for chunk in files_chunks for row in chunk.read()), source)


def _is_message(row: Any) -> bool:
    return isinstance(row, Row) and isinstance(row.value, dict) and row.value.keys() >= _FIELDS


def _trees(rows: Iterable[Row | Problem]) -> Iterator[Row | Problem]:
    """The trees of messages that stand side by side; what is no message stays as it is."""
    seen: set[Any] = set()
    tree: list[Row] = []
    last: Any = None
    for row in rows:
        if isinstance(row, Problem) or not _is_message(row):
            yield row
            continue
        name = _tree_of(row, last)
        if tree and name != last:
            yield _grown(tree)
            tree = []
        if not tree and name in seen:
            yield Problem(str(row.origin), "stands apart from its tree", "sort the rows by message_tree_id")
            continue
        seen.add(name)
        tree.append(row)
        last = name
    if tree:
        yield _grown(tree)


def _tree_of(row: Row, last: Any) -> Any:
    """The name of a message's tree: a message without a parent begins one."""
    return row.value.get("message_tree_id") or (row.value["message_id"] if _is_root(row) else last)


def _is_root(row: Row) -> bool:
    parent = row.value["parent_id"]
    return not parent or parent != parent  # NaN, as pandas writes null


def _grown(rows: Sequence[Row]) -> Row | Problem:
    """The tree of its messages, or what is wrong with it."""
    nodes: dict[Any, dict[str, Any]] = {row.value["message_id"]: {**row.value, "replies": []} for row in rows}
    roots = [row for row in rows if _is_root(row)]
    if len(roots) != 1 or len(nodes) < len(rows):
        what = "a message_id twice in one tree" if len(nodes) < len(rows) else f"{len(roots)} messages without a parent"
        return Problem(str(rows[0].origin), what, "a tree has one prompt: mend or remove its rows")
    for row in rows:
        if not _is_root(row):
            parent = nodes.get(row.value["parent_id"])
            if parent is None:
                what = f"parent_id: {str(row.value['parent_id'])[:60]!r} is not in its tree"
                return Problem(str(row.origin), what, "put the parent beside it, or remove the row")
            parent["replies"].append(nodes[row.value["message_id"]])
    root = nodes[roots[0].value["message_id"]]
    if _size(root) < len(rows):
        return Problem(str(rows[0].origin), "messages that are each other's parents", "mend parent_id")
    return Row(rows[0].origin, {"message_tree_id": root.get("message_tree_id"), "prompt": root})


def _size(root: dict[str, Any]) -> int:
    waiting, size = [root], 0
    while waiting:
        size += 1
        waiting += waiting.pop()["replies"]
    return size
