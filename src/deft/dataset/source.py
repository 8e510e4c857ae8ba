"""Where rows come from: a source by name, standard input, or rows in memory; and its chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deft.core.types import Origin
from deft.data import chunks, sources, trees
from deft.data.chunks import Chunk
from deft.data.format import Choices
from deft.data.sources import Listing, Part

NAMED_FILES = 10
"""How many of the files that are not read are named."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A source by name, or rows that a caller holds.

    subset       of a Hub data set
    choices      what its formats need to know
    times        how often its rows are learnt in an epoch; a share of them where it is no whole number
    loss_weight  multiplies the weight of every token
    max_rows     reads no further
    piped        the chunks of standard input, which can be read once
    """

    path: str
    format: str = "auto"
    rows: tuple[Any, ...] | None = None
    subset: str | None = None
    choices: Choices = field(default_factory=Choices)
    times: float = 1.0
    loss_weight: float = 1.0
    max_rows: int | None = None
    piped: tuple[Chunk, ...] = ()

    @property
    def is_by_name(self) -> bool:
        """Whether it can be read again by its name alone."""
        return self.rows is None and not self.piped

    @property
    def listing(self) -> Listing:
        """The files that it consists of, and what lies beside them; none where it is not on this disk."""
        is_here = self.is_by_name and not sources.is_on_the_hub(self.path)
        return sources.listing(self.path, self.part) if is_here else Listing(())

    def files(self) -> list[str]:
        return list(self.listing.files)

    @property
    def part(self) -> Part:
        """The part of a data set that is read."""
        return Part(self.subset, self.choices.split, self.choices.names_split)

    def split_read(self) -> str:
        """Which split of a folder is read, and what else there is; nothing where there is no choice."""
        found = sources.splits(self.path, self.subset) if self.is_by_name else {}
        if len(found) < 2 or self.choices.split not in found:
            return ""
        others = ", ".join(name for name in found if name != self.choices.split)
        return f"{self.path}: reads split {self.choices.split} of it; there is {others} too (split: chooses)"

    def unread(self) -> str:
        """What lies in its folder, or fits its pattern, and is not read; nothing where that is all.

        >>> SourceSpec("a", rows=("x",)).unread()
        ''
        """
        names = self.listing.unread
        if not names:
            return ""
        shown = ", ".join(name.removeprefix(f"{self.path}/") for name in names[:NAMED_FILES])
        more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
        fix = f"deft reads {', '.join(sources.SUFFIXES)}, also as {', '.join(sources.COMPRESSED)}: rename what is data"
        return f"{self.path}: {len(names)} of what lies there is not read: {shown}{more}; {fix}"

    def chunks(self) -> Iterator[Chunk]:
        """Its rows in order. Raises InputError where they cannot be read."""
        if self.rows is not None:
            found: Iterator[Chunk] = chunks.of(sources.from_values(self.rows, self.path), self.path)
        elif self.piped:
            found = iter(self.piped)
        else:
            found = sources.chunks(self.path, self.part)
        if self.format in ("auto", "oasst") and not self.choices.columns:
            found = trees.gathered(found)
        return found if self.max_rows is None else chunks.limited(found, self.max_rows)


Item = tuple[Chunk, Mapping[Origin, str]]
"""Rows, and which of them are left out because of others, and why."""


def items(source: SourceSpec, left_out: Sequence[tuple[Origin, str]]) -> Iterator[Item]:
    """The chunks of a source, each with those of its rows that are left out.

    >>> rows = SourceSpec("a", rows=("x", "y"))
    >>> [(len(chunk.rows), reasons) for chunk, reasons in items(rows, [(Origin("a", 2), "worse")])]
    [(2, {Origin(source='a', line=2, item=0): 'worse'})]
    """
    waiting = deque(left_out)
    for chunk in source.chunks():
        found = {}
        while waiting and _stands_in(waiting[0][0], chunk):
            origin, why = waiting.popleft()
            found[origin] = why
        yield chunk, found


def _stands_in(origin: Origin, chunk: Chunk) -> bool:
    """Whether a row that no earlier chunk has is in this one."""
    return origin.source == chunk.source and (origin.line, origin.item) <= chunk.last
