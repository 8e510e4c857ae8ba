"""A data set of the Hugging Face Hub, by its id, through `datasets`: the extra `hub`. No code of the data set runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deft.core.errors import InputError
from deft.core.types import Origin, Row


def read(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """The rows of one split, streamed; lines are rows from 1. Raises InputError where it cannot be had."""
    try:
        import datasets
    except ImportError as error:
        fix = "if it is a Hub data set: pip install 'deft-sft[hub]'"
        raise InputError(f"{name}: no such file or folder; {fix}") from error
    try:
        found: Any = datasets.load_dataset(name, subset, split=split, streaming=True)
        for number, value in enumerate(found, start=1):
            yield Row(Origin(name, number), value)
    except Exception as error:  # what the network, the Hub and its libraries raise has no common kind
        what = " ".join(str(error).split())[:300]
        raise InputError(f"{name}: cannot be read from the Hub, split {split!r}: {what}") from error


def fingerprint(name: str, subset: str | None) -> str:
    """What the Hub's files are known by, as `datasets` knows them; nothing where it cannot say."""
    try:
        import datasets

        builder: Any = datasets.load_dataset_builder(name, subset)
        return str(builder.hash or "")
    except Exception:  # the error comes when the rows are read
        return ""
