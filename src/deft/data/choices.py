"""What the user of a source chooses, as far as its formats need to know it beside the row itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Answers = Literal["best", "all"]


@dataclass(frozen=True, slots=True)
class Control:
    """HALOs' control tokens: the text put before an answer, by whether it is a good one.

    Without `bad` only good answers are learnt; with it bad ones are learnt too, behind their own text.
    """

    good: str
    bad: str | None = None


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of one source.

    columns  what a format calls a field -> what the rows call it; no other field is read then
    answers  of several answers to one prompt: the best one, or all good ones; None is the format's own default
    control  text before good and bad answers
    split    rows that name another split are left out; None reads all
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    answers: Answers | None = None
    control: Control | None = None
    split: str | None = None

    def options(self) -> set[str]:
        """The choices that only some formats know, as far as they were made.

        >>> Choices(answers="best").options()
        {'answers'}
        """
        return {name for name in ("answers", "control") if getattr(self, name) is not None}

    @property
    def learns_bad(self) -> bool:
        """Whether bad answers are learnt too, behind their control text."""
        return self.control is not None and self.control.bad is not None
