"""`deft.train`: the main job from Python, in the file's keys or in trlx's call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deft.core.errors import user_code
from deft.run import config as configuration
from deft.run.reading import Session
from deft.run.train import Run
from deft.run.train import train as run_config
from deft.training import randomness

if TYPE_CHECKING:
    from deft.evaluation.samples import MetricFn

SHORT = {"lr": "optimizer__lr", "batch": "batch__examples"}
"""Names short enough to type in a notebook."""


def train(
    model: str | Path,
    data: Any = None,
    *,
    samples: Iterable[Any] | None = None,
    eval_prompts: str | Path | Iterable[Any] | None = None,
    metric_fn: MetricFn | None = None,
    stop_sequences: Sequence[str] = (),
    **settings: Any,
) -> Run:
    """Trains `model` on `data` (a path, paths, or the file's `data` mapping) or on `samples` (rows in memory).

    settings      the configuration's keys, dots as double underscores: `optimizer__lr=1e-5`; `lr`, `epochs` and
                  `batch` (examples of a step) are short for three of them
    samples       trlx's: strings, or [prompt, output, prompt, output, ...]; any other shape that deft reads as well
    eval_prompts  answered before training, every `evaluate__every` steps and at the end: strings, lists of messages,
                  or {"prompt": ..., more}, or a file of them; `more` goes to `metric_fn` as lists
    metric_fn     (samples, prompts, outputs, **more) -> {name: [one number per sample]}

    Settings of the process, random generators among them, are afterwards as they were. Raises DeftError for whatever a
    user can mend, UserCodeError where a function or an iterable of theirs raises.
    """
    if (data is None) == (samples is None):
        raise configuration.InputError("deft.train: give data or samples, one of the two")
    if isinstance(samples, str | Path):
        raise configuration.InputError("deft.train: samples are a list of rows; name a file with data=")
    values = configuration.nested({_long(key, value): value for key, value in settings.items()})
    values["model"] = str(model)
    values["data"] = _merged(values.get("data"), "samples" if data is None else data)
    evaluation = dict(values.get("evaluate", {}))
    if eval_prompts is not None:
        evaluation["prompts"] = _listed(eval_prompts, "eval_prompts")
    if stop_sequences:
        evaluation["stop_sequences"] = tuple(stop_sequences)
    values["evaluate"] = evaluation
    with randomness.preserved():
        return run_config(configuration.make(values), Session(samples=_listed(samples, "samples"), metric_fn=metric_fn))


def _long(key: str, value: Any) -> str:
    """The configuration's key for a short one; a section given as a mapping keeps its name.

    >>> _long("batch", 8), _long("batch", {"tokens": 4096})
    ('batch__examples', 'batch')
    """
    return key if isinstance(value, Mapping) else SHORT.get(key, key)


def _listed(values: Any, name: str) -> Any:
    """The values of an iterable, which may be the user's own; a file's name, and None, as they are."""
    if values is None or isinstance(values, str | Path):
        return values
    with user_code(name):
        return tuple(values)


def _merged(settings: Any, data: Any) -> Any:
    """`data` with what `data__...` settings add."""
    settings = dict(settings or {})
    return {**(data if isinstance(data, dict) else {"train": data}), **settings}
