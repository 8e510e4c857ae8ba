"""`deft.train`: the main job from Python, in the file's keys or in trlx's call."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deft.core import signals
from deft.core.errors import InputError, Problems, user_code
from deft.data import held
from deft.dataset.config import DataConfig, SourceConfig
from deft.run import config as configuration
from deft.run.quiet import quiet
from deft.run.reading import Session
from deft.run.train import Run
from deft.run.train import train as run_config
from deft.training import randomness

if TYPE_CHECKING:
    from deft.evaluation.samples import MetricFn

SHORT = {"lr": "optimizer__lr", "batch": "batch__examples"}
"""Names short enough to type in a notebook."""

ARGUMENTS = ("samples", "eval_prompts", "metric_fn", "stop_sequences")
"""What `train` is given beside the configuration's keys."""

Held = dict[str, tuple[Any, ...]]
"""Rows in memory, by the name that the configuration has for them."""


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
    """Trains a model on data and writes it as a Hugging Face folder: `run.folder / "final"`.

        run = deft.train("Qwen/Qwen2.5-0.5B", "train.jsonl", lr=1e-5, epochs=3, output="runs/first")
        run = deft.train("Qwen/Qwen2.5-0.5B", [{"prompt": "2 + 2?", "completion": " 4."}, ...], data__eval=0.02)
        run.model, run.tokenizer, run.metrics

    model         a folder or a Hub id; its tokenizer lies beside it
    data          a file, several files, or the file's `data` mapping; or rows in memory, in any shape that deft reads:
                  a list, a generator, a data set of `datasets`, a table of pandas, polars or pyarrow. `data__eval=`
                  takes all of them too, or a share of the rows
    samples       rows in memory, as trlx has them: strings, or [prompt, output, prompt, output, ...]
    eval_prompts  answered before training, every `evaluate__every` steps and at the end: strings, lists of messages,
                  or {"prompt": ..., more}, or a file of them; `more` goes to `metric_fn` as lists
    metric_fn     (samples, prompts, outputs, **more) -> {name: [one number per sample]}
    settings      the configuration's keys, dots as double underscores: `optimizer__lr=1e-5`; `lr`, `epochs` and
                  `batch` (examples of a step) are short for three of them

    Started again with the same `output`, it goes on where it ended. Ctrl-C saves the steps that are done before
    KeyboardInterrupt comes out of here; a second one comes at once. Settings of the process are afterwards as
    before. Raises DeftError for what a user can mend, UserCodeError where a function or an iterable of theirs raises.
    """
    if data is not None and samples is not None:
        raise InputError("deft.train: give data or samples, one of the two")
    if not isinstance(model, str | Path):
        raise InputError(_about_model(model))
    in_memory = {} if samples is None else {"samples": held.rows(samples, "samples", "name it with data=")}
    values = configuration.nested({_long(key, value): _plain(value) for key, value in settings.items()})
    values["model"] = str(model)
    values["evaluate"] = _evaluation(values.get("evaluate", {}), eval_prompts, stop_sequences)
    if found := _merged(values.get("data"), data if samples is None else "samples"):
        values["data"] = _in_names(found, in_memory)
    config = _config(values)
    with randomness.preserved(), quiet(), signals.interrupts() as ctrl_c:
        session = Session(rows=in_memory, metric_fn=metric_fn, signals=ctrl_c)
        session.say("" if signals.is_reached_by_interrupts() else _UNREACHED)
        return run_config(config, session)


_UNREACHED = (
    "note: this is not the main thread, and Ctrl-C does not reach it: the run goes on to its end. It saves itself "
    "every checkpoint.every steps, and started again with the same output it goes on from there"
)


def _long(key: str, value: Any) -> str:
    """The configuration's key for a short one; a section given as a mapping keeps its name.

    >>> _long("batch", 8), _long("batch", {"tokens": 4096})
    ('batch__examples', 'batch')
    """
    return key if isinstance(value, Mapping) else SHORT.get(key, key)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _about_model(model: Any) -> str:
    """Why an object is no model to begin from, and what to give."""
    origin = str(getattr(model, "name_or_path", "") or "")
    given = f"what it was loaded from, {origin!r}, or, if it was changed since, " if origin else ""
    saved = "a folder that model.save_pretrained(folder) and tokenizer.save_pretrained(folder) have written"
    what = f"model: {type(model).__name__}, not a folder or a Hub id, of which a run reads the weights itself"
    return f"{what}; give {given}{saved}"


def _evaluation(
    settings: Mapping[str, Any], prompts: str | Path | Iterable[Any] | None, stop_sequences: Sequence[str]
) -> dict[str, Any]:
    """The section `evaluate` with what `train` is given of it."""
    found = dict(settings)
    if prompts is not None:
        found["prompts"] = _listed(prompts, "eval_prompts")
    if stop_sequences:
        found["stop_sequences"] = stop_sequences if isinstance(stop_sequences, str) else tuple(stop_sequences)
    return found


def _listed(values: Any, name: str) -> Any:
    """The values of an iterable, which may be the user's own; a file's name, and None, as they are."""
    if values is None or isinstance(values, str | Path):
        return values
    with user_code(name):
        return tuple(values)


def _merged(settings: Any, data: Any) -> dict[str, Any]:
    """`data` with what `data__...` settings add."""
    is_section = isinstance(data, Mapping) and bool(data.keys() & DataConfig.model_fields.keys())
    found = dict(data) if is_section else {} if data is None else {"train": data}
    return {**found, **(settings or {})}


def _in_names(section: Mapping[str, Any], in_memory: Held) -> dict[str, Any]:
    """The section `data` with a name in place of all rows in memory, which go to `in_memory` under it."""
    found = dict(section)
    for key, name in (("train", "data"), ("eval", "data.eval")):
        if key in found:
            found[key] = _in_name(found[key], name, in_memory)
    return found


def _in_name(value: Any, name: str, in_memory: Held) -> Any:
    """Sources as the configuration has them; rows go to `in_memory`.

    >>> in_memory: Held = {}
    >>> _in_name(["a.jsonl", {"path": ["row"], "times": 2}], "data", in_memory), in_memory
    (('a.jsonl', {'path': 'rows of data[1]', 'times': 2}), {'rows of data[1]': ('row',)})
    """
    if value is None or isinstance(value, str | Path | int | float | SourceConfig):
        return _plain(value)
    if _is_source(value):
        path = value["path"]
        return {**value, "path": str(path) if isinstance(path, str | Path) else _hold(path, name, in_memory)}
    if isinstance(value, list | tuple) and value and all(map(_is_source, value)):
        if all(isinstance(each, str) and _is_text(each) for each in value):
            shown = f"{value[0][:40]!r}"
            raise InputError(f"{name}: a list of text names files, and {shown} is none; rows that are text: samples=")
        return tuple(_in_name(each, f"{name}[{index}]", in_memory) for index, each in enumerate(value))
    return _hold(value, name, in_memory)


def _hold(value: Any, name: str, in_memory: Held) -> str:
    label = f"rows of {name}"
    in_memory[label] = held.rows(value, name)
    return label


def _is_source(value: Any) -> bool:
    """Whether it names a source, as the configuration does, and is no row."""
    if not isinstance(value, Mapping):
        return isinstance(value, str | Path | SourceConfig)
    return "path" in value and value.keys() <= SourceConfig.model_fields.keys()


def _is_text(value: str) -> bool:
    """Whether it is words, and no file's name."""
    return len(value.split()) > 1 and not os.path.exists(value)


def _config(values: Mapping[str, Any]) -> configuration.Config:
    try:
        return configuration.make(values, arguments=ARGUMENTS)
    except Problems as error:
        raise _in_python(error) from None


def _in_python(problems: Problems) -> Problems:
    """With keys as keywords in what is proposed.

    >>> from deft.core.errors import Problem
    >>> print(_in_python(Problems("wrong", [Problem("learning_rate", "unknown key", "deft calls it optimizer.lr")])))
    wrong
      learning_rate: unknown key; deft calls it optimizer__lr
    """
    known = set(configuration.keys())

    def as_keyword(word: re.Match[str]) -> str:
        return word[0].replace(".", "__") if word[0] in known else word[0]

    found = [replace(each, fix=re.sub(r"\w+(\.\w+)+", as_keyword, each.fix)) for each in problems.problems]
    return Problems(problems.heading, found, problems.more)
