"""`evaluate` in the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from deft.core.config import OrOff, PathText, Section


class EvaluateConfig(Section):
    """Every `every` steps and at the end: held-out loss, and answers to `prompts`, a list or the name of a file."""

    every: Annotated[int | None, Field(ge=1), OrOff] = None
    prompts: PathText | tuple[Any, ...] = ()
    generate: dict[str, Any] = Field({})
    stop_sequences: tuple[str, ...] = ()

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        if value and not isinstance(value, str | Path | list | tuple):
            raise ValueError("name a file, or give a list of prompts")
        return value or ()

    def is_due(self, step: int, total: int) -> bool:
        """Whether to evaluate after a step of a run of `total`."""
        return step == total or (self.every is not None and step % self.every == 0)
