"""A whole source in one go, through the two passes of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from deft.core.errors import Problem
from deft.core.types import Conversation, Origin, Row
from deft.data import shapes
from deft.data.chunks import HeldRows
from deft.data.format import Choices


@dataclass(frozen=True, slots=True)
class Understood:
    """A source read whole: its shape, its conversations in order, and the rows that were refused and left out."""

    shape: str
    conversations: tuple[Conversation, ...]
    refused: tuple[Problem, ...]
    left_out: tuple[tuple[Origin, str], ...]

    def rows(self) -> Iterator[tuple[Conversation, ...]]:
        """The conversations of each row."""
        return (tuple(row) for _, row in groupby(self.conversations, key=lambda conversation: conversation.origin))


def understand(
    rows: Iterable[Row | Problem], source: str, shape: str = "auto", choices: Choices | None = None
) -> Understood:
    """Every row in the one shape of its source, or refused with its reason. Raises Problems as `shapes.survey` does."""
    chunk, choices = HeldRows(source, tuple(rows)), choices or Choices()
    survey = shapes.survey([shapes.counter((source, shape, choices))(chunk)], source, shape, choices)
    needless = dict(survey.left_out)
    outcomes = list(shapes.Reader(source, survey.shape, choices).each(chunk.read()))
    refused = tuple(outcome.refused for outcome in outcomes if outcome.refused)
    assert set(survey.refused) <= set(refused)
    assert survey.refused_rows == len(refused)
    left_out = [(each.origin, each.left_out or needless.get(each.origin, "")) for each in outcomes]
    kept = [each for each in outcomes if each.origin not in needless]
    conversations = tuple(conversation for outcome in kept for conversation in outcome.conversations)
    return Understood(survey.shape, conversations, refused, tuple(each for each in left_out if each[1]))
