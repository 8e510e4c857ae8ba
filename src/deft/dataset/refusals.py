"""Rows that keep a run from starting: refused, too long, all lost, or of another model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

from deft.core.errors import Problem, Problems, grouped
from deft.core.types import Fate
from deft.data.shapes import Survey
from deft.dataset import ledger
from deft.dataset.build import Dataset
from deft.encoding.tokenizer import Tokenizer

WayOut = Callable[[str], str]
TRIED = 3
"""For the first row of this number of kinds of problems other settings are tried."""
SOON_ENCODED = 20_000
"""Up to this many rows are encoded before those that cannot be read stop the run: all problems come in one error."""


def stop_if_unreadable(surveys: Sequence[Survey], allowed: int) -> None:
    """Raises Problems where more rows of large sources cannot be read than are allowed to be refused."""
    rows, refused = sum(survey.rows for survey in surveys), sum(survey.refused_rows for survey in surveys)
    if rows > SOON_ENCODED and refused > allowed:
        named = [problem for survey in surveys for problem in survey.refused]
        heading = f"{refused} of {rows} rows cannot be read, and none was encoded (data.allow_refused={refused} does):"
        raise Problems(heading, named, refused - len(named))


def stop_if_lost(
    data: Dataset, allowed: int, *, may_be_too_long: bool, share: float = 0.0, way_out: WayOut = lambda row: ""
) -> None:
    """Raises Problems where more rows are refused than is allowed, one is too long and may not be, or none is left.

    share    of the rows that is held out
    way_out  what lets a row pass, in words
    """
    refused = ledger.met(data.ledgers, Fate.REFUSED)
    if refused > allowed:
        heading = f"{refused} rows are refused (data.allow_refused={refused} trains without them):"
        _stop(data, Fate.REFUSED, heading, way_out)
    too_long = ledger.met(data.ledgers, Fate.TOO_LONG)
    if too_long and not may_be_too_long:
        _stop(data, Fate.TOO_LONG, f"{too_long} rows are too long (overflow: error):", way_out)
    if not data.train:
        held = ledger.met(data.ledgers, Fate.HELD_OUT)
        why = f" data.eval={share} holds out all {held} rows; a smaller share does not" if share and held else ""
        lost = [problem for fate in Fate for problem in ledger.named(data.ledgers, fate) if problem.what]
        nothing = [] if why else [Problem("data.train", "no rows")]
        raise Problems(f"no row is left to train on:{why}", _with_ways(lost, way_out) or nothing)


def stop_if_out_of_vocabulary(data: Dataset, tokenizer: Tokenizer, size: int) -> None:
    """Raises Problems where rows have tokens that a model of `size` embeddings does not know."""
    largest = (data.train + data.held_out).out_of_vocabulary(size) if len(tokenizer.hf) > size else {}
    if largest:
        text, fix = tokenizer.hf.convert_ids_to_tokens, "tokenizer and model must belong together"
        problems = [
            Problem(str(row), f"token {index} ({text(index)!r}) is past the model's {size}", fix)
            for row, index in largest.items()
        ]
        raise Problems(f"{len(largest)} rows have tokens that the model does not know:", problems)


def _stop(data: Dataset, fate: Fate, heading: str, way_out: WayOut) -> NoReturn:
    named = ledger.named(data.ledgers, fate)
    more = ledger.met(data.ledgers, fate) - sum(1 + problem.others for problem in named)
    raise Problems(heading, _with_ways(named, way_out), more)


def _with_ways(problems: Sequence[Problem], way_out: WayOut) -> list[Problem]:
    """One problem of each kind; the first of them say what lets their row pass."""
    found = grouped(problems)
    tried = [replace(each, fix=way) if (way := way_out(each.where)) else each for each in found[:TRIED]]
    return tried + found[TRIED:]
