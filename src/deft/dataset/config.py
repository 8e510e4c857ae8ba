"""`data` in the configuration: which rows, and what of them is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from deft.core.config import PathText, Section, as_meant
from deft.data.fields import LARGEST_WEIGHT
from deft.data.format import Answers, Control
from deft.encoding.rows import Render, TrainOn


class SourceConfig(Section):
    """Rows: a file, a folder, a glob, - or a Hub id; `format` is found by looking unless it is named.

    columns      what a format calls a field -> what the rows call it: {prompt: question, completion: answer}
    ignore       fields of rows and messages that are not to be read, nor to be told of: [weight, image, id]
    answers      of several to one prompt: the best, or all good ones; each format has its default
    control      HALOs' control tokens: text before good and bad answers
    subset       of a data set of the Hub, or in a folder
    split        of such a data set or of a HALOs file; train (test for data.eval) by default
    times        how often its rows are learnt in an epoch; a share of them, drawn by seed, where it is not whole
    loss_weight  multiplies the weight of every token
    max_rows     reads no further
    """

    path: PathText
    format: str = "auto"
    columns: dict[str, str] = Field({})
    ignore: tuple[str, ...] = ()
    answers: Answers | None = None
    control: Control | None = None
    subset: str | None = None
    split: str | None = None
    times: float = Field(1.0, gt=0, le=1000)
    loss_weight: float = Field(1.0, gt=0, le=LARGEST_WEIGHT)
    max_rows: int | None = Field(None, ge=1)


class DataConfig(Section):
    """The rows. `eval` is a share of the training rows by content hash, or sources of its own.

    format      of every source that names none
    split       of every training source that names none
    add_tokens  new tokens, for which the model gets rows: texts that are one token wherever they stand in a row
    """

    train: tuple[SourceConfig, ...]
    eval: float | tuple[SourceConfig, ...] = 0.0
    format: str = "auto"
    split: str | None = None
    train_on: TrainOn | None = None
    learn_reasoning: bool = True
    learn_tool_calls: bool = True
    render: Render = "auto"
    allow_refused: int = Field(0, ge=0)
    add_tokens: tuple[str, ...] = ()

    @field_validator("add_tokens", mode="before")
    @classmethod
    def _one_token(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("add_tokens")
    @classmethod
    def _are_tokens(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for at, token in enumerate(value):
            if not token.strip() or token != token.strip():
                raise ValueError(f"{token!r} is blank or has white space at an end")
            if token in value[:at]:
                raise ValueError(f"{token!r} stands twice")
        return value

    @field_validator("train", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        return _as_sources(value)

    @field_validator("eval", mode="before")
    @classmethod
    def _share_or_sources(cls, value: Any) -> Any:
        try:
            return 0.0 if value is None else float(as_meant(value, float))
        except (TypeError, ValueError):
            return _as_sources(value)

    @field_validator("eval")
    @classmethod
    def _is_share(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("a share is at least 0 and below 1; of a number of rows it is that number by all rows")
        return value


def _as_sources(value: Any) -> Any:
    """One path, a list of paths, or source objects -> source objects."""
    entries = [value] if isinstance(value, str | Path | Mapping | SourceConfig) else value
    if not isinstance(entries, Sequence) or not entries:
        raise ValueError("name a file, or a list of files")
    return tuple({"path": str(entry)} if isinstance(entry, str | Path) else entry for entry in entries)
