"""`batch` and `schedule` in the configuration."""

from __future__ import annotations

from pydantic import Field, model_validator

from deft.core.config import Section
from deft.plan.schedule import Name as ScheduleName


class BatchConfig(Section):
    """One optimizer step: a number of examples, or as many as fit in a number of tokens."""

    examples: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> BatchConfig:
        if (self.examples is None) == (self.tokens is None):
            raise ValueError("name examples or tokens, one of the two")
        return self


class ScheduleConfig(Section):
    """warmup: a share below 1, steps from 1 on. decay: the falling share of wsd."""

    name: ScheduleName = "cosine"
    warmup: float = Field(0.03, ge=0)
    decay: float = Field(0.2, gt=0, le=1)
