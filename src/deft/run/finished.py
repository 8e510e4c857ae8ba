"""A finished run that is asked for again: the request that it finished, or what differs, each `old -> new`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deft.core import files
from deft.core.errors import DamagedError, InputError, Problem, Problems
from deft.run import config as configuration
from deft.run import resume
from deft.run.config import Config
from deft.run.resume import Inputs
from deft.training import checkpoint

MEANINGLESS = (
    *resume.IGNORED,
    "device",
    "microbatch_tokens",
    "lanes",
    "sums",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
)
"""Keys that say where and how a run is computed and kept, or are compared by what they lead to."""

SETTLED = ("max_length", "precision")


@dataclass(frozen=True)
class RunRequest:
    """What a run was asked for, as its manifest.json records it.

    files    a digest of each data file by its name
    digests  of what no file's digest stands for: rows in memory or through a user's function, prompts, a user's loss
    """

    inputs: Inputs
    files: Mapping[str, str]
    digests: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, now: RunRequest) -> list[Problem]:
        """What is asked for now and was not then."""
        keys = resume.changed_keys(_without_paths(self.inputs.config), _without_paths(now.inputs.config))
        found = [
            Problem(key, f"{old} -> {new}") for key, (old, new) in keys.items() if not resume.is_of(key, MEANINGLESS)
        ]
        found += resume.other_files(self.inputs, now.inputs, "since it was finished")
        if [*self.files.values()] != [*now.files.values()]:
            order = Problem("data", f"{', '.join(self.files)} -> {', '.join(now.files)}")
            found += [*_changed(self.files, now.files, "not read")] or [order]
        return [*found, *_changed(self.digests, now.digests, "none")]


def is_finished(config: Config) -> bool:
    """Whether an earlier start brought the run to its end: final/, compared, or virtual tokens, and its report; and all
    else that it leaves, unless no checkpoint is left to write that anew from.

    InputError where it is to go on from an earlier step all the same.
    """
    folder = Path(str(config.output))
    result = result_of(config)
    is_there = result.is_dir() and (folder / "report.html").is_file()
    can_add = bool(checkpoint.steps(folder / "checkpoints"))
    if not (resume.goes_on(config) and is_there) or (can_add and not all(each.is_dir() for each in results_of(config))):
        return False
    if config.resume != "auto":
        raise InputError(f"resume: {folder} is finished; move its {result.name}/ away to go back to {config.resume}")
    return True


def result_of(config: Config) -> Path:
    """What a run leaves: final/, or adapter/ where virtual tokens cannot be merged into a model."""
    is_virtual = config.adapter is not None and config.adapter.is_virtual
    return Path(str(config.output)) / ("adapter" if is_virtual else "final")


def results_of(config: Config) -> list[Path]:
    """All folders that a run leaves for others to use, `result_of` first."""
    has_adapter = config.adapter is not None and config.merge is None
    return [*dict.fromkeys([result_of(config), *([Path(str(config.output)) / "adapter"] if has_adapter else [])])]


def is_of(final: Path, about: Mapping[str, Any]) -> bool:
    """Whether an exported folder is whole, and that of the run, and the step, that `about` says (`about_final`)."""
    try:
        return files.verify_own_model(final).about == about
    except DamagedError:
        return False


def about_final(request: RunRequest, step: int) -> dict[str, Any]:
    """What the manifest of final/ says of it: its step, and a digest of what was asked for, wherever that lies."""
    inputs = request.inputs
    keys = resume.changed_keys({}, _without_paths(inputs.config))
    config = {key: now for key, (_, now) in keys.items() if not resume.is_of(key, MEANINGLESS)}
    asked = [config, inputs.model, inputs.tokenizer, inputs.template, inputs.held_out]
    every = [*asked, [*request.files.values()], dict(request.digests)]
    return {"step": step, "request": resume.digest(json.dumps(every, sort_keys=True))}


def verify(result: Path) -> None:
    """Raises DamagedError, with the way to have it again, where what a run leaves is not as it was written."""
    try:
        files.verify_own_model(result)
    except DamagedError as error:
        fix = f"mv {result} {result}.damaged, and run this again: it is written anew from the last checkpoint"
        if not checkpoint.steps(result.parent / "checkpoints"):
            fix = "no checkpoint is left to write it anew from: bring it back from a copy, or name another output="
        raise DamagedError(f"{error}; {fix}") from error


def recorded(folder: Path) -> RunRequest:
    """The request that a run finished. Raises InputError where there is no record of it."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["request"]
        return RunRequest(**{**found, "inputs": Inputs(**found["inputs"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "is finished, and its manifest.json does not say what it was asked for"
        raise InputError(f"{folder}: {what}; name another output= to train again") from error


def settled(config: Config, before: RunRequest) -> Config:
    """The configuration with the `auto`s that the finished run resolved."""
    values, old = config.model_dump(mode="json"), before.inputs.config
    return configuration.make(resume.settled(values, {key: old[key] for key in SETTLED if key in old}))


def stop_unless_same(result: Path, steps: int, before: RunRequest, now: RunRequest, planned: int) -> None:
    """Raises Problems where another run is asked for than the one that is finished, with the way to have it.

    result   what the finished one has left; planned: the steps of what is asked for
    """
    folder = result.parent
    if differences := before.differences(now):
        is_export = all(resume.is_of(problem.where, ["export"]) for problem in differences)
        can_go_on = is_export or (planned > steps and all(resume.may_change(problem.where) for problem in differences))
        is_there = bool(checkpoint.steps(folder / "checkpoints"))
        what_for = "export it anew" if is_export else f"train on from step {steps}"
        here = f"to {what_for}: mv {result} {result}-{steps}, and run this again"
        anew = f"to train on from what it is: model={result}"
        fix = f"name another output=, or {here if can_go_on and is_there else anew}"
        what = f"finished at step {steps}, and this asks for something else"
        raise Problems(f"{folder}: {what}; {fix}:", differences)


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the names of data files, which are compared by content."""
    data = dict(config["data"])
    for key in ("train", "eval"):
        if isinstance(data[key], list | tuple):
            data[key] = [{**source, "path": ""} for source in data[key]]
    return {**config, "data": data}


def _changed(old: Mapping[str, str], new: Mapping[str, str], nothing: str) -> Iterator[Problem]:
    """The digests that differ, by name.

    >>> [str(problem) for problem in _changed({"a.jsonl": "12"}, {"a.jsonl": "34", "b.jsonl": "56"}, "not read")]
    ['a.jsonl: 12 -> 34', 'b.jsonl: not read -> 56']
    """
    for name in sorted({*old, *new}):
        before, now = old.get(name, "")[:12], new.get(name, "")[:12]
        if before != now:
            yield Problem(name, f"{before or nothing} -> {now or nothing}")
