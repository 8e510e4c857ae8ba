"""What earlier starts of a run have done, and what changed since: each `old -> new`, refused or applied by a rule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deft.core import files
from deft.core.errors import Problem, Problems
from deft.dataset import cache
from deft.dataset.row_digests import RowDigests
from deft.distributed.world import World
from deft.model.config import FILE
from deft.model.security import INDEX
from deft.plan.order import Batching
from deft.run import config as configuration
from deft.run.config import Config
from deft.run.folder import is_run
from deft.tracking import jsonl
from deft.training import checkpoint, resuming
from deft.training.checkpoint import Found
from deft.training.state import TrainState

AUTOS = ("max_length", "microbatch_tokens", "lanes", "device", "precision")
"""Keys whose `auto` was resolved when the run began; it is not resolved again."""

REFUSED = ("seed", "quantize", "loss.name", "loss.normalize", "optimizer.name", "precision", "adapter", "freeze")
"""Keys without which the run would be another one, but for `FREE` below them."""

FREE = ("adapter.dropout", "adapter.start")

ROWS = ("data", "max_length", "overflow", "truncation_side", "template", "template_kwargs", "reasoning")
"""Keys that decide what rows become: refused where a row comes out otherwise."""

IGNORED = ("output", "resume", "model", "merge", "adapter.start", "template", "shard")
"""Keys that are compared by what they lead to, or say nothing of the run."""

DESCRIBES = ("config.json", "generation_config.json", INDEX, FILE)
"""Files of a model's or adapter's folder that say what it is."""

READ_FROM = {"model": ("model", "merge", "adapter.start"), "tokenizer": ("model",), "template": ("template", "model")}
"""Which keys name the folders that each comes from."""

APPLIED = {
    "batch": "applies from the next step on: the rest of the epoch is cut anew, each row still comes once",
    "epochs": "applies: the schedule follows the new length",
    "steps": "applies: the schedule follows the new length",
}


@dataclass(frozen=True)
class Inputs:
    """What a run is trained on, as far as it fits into JSON; `rows` are kept beside it.

    config    resolved
    model     a fingerprint of the base's files; tokenizer, template, held_out, ledger: digests
    plan      a digest of the steps done so far
    versions  of packages, and what else the last bits of a result depend on
    """

    config: Mapping[str, Any]
    model: str
    tokenizer: str
    template: str
    held_out: str
    ledger: str
    plan: str
    versions: Mapping[str, str]
    processes: int


@dataclass(frozen=True)
class EarlierStarts:
    """What earlier starts of a run have done: the checkpoint that it goes on from, if there is one."""

    found: Found | None = None

    @property
    def step(self) -> int:
        """The steps that are done."""
        return self.found.checkpoint.step if self.found else 0

    @property
    def cursor(self) -> Mapping[str, Any]:
        return self.found.checkpoint.values["cursor"] if self.found else {}

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation that is due before the next step is done."""
        return bool(self.cursor.get("is_evaluated"))

    def settled(self, config: Config) -> Config:
        """The configuration with the `auto`s that the run began with."""
        if self.found is None:
            return config
        before = self.found.checkpoint.values["inputs"]["config"]
        return configuration.make(settled(config.model_dump(mode="json"), before))

    def batchings(self, asked: Batching) -> tuple[tuple[int, Batching], ...]:
        """What cuts steps, and from which step on: as in the checkpoint, and from there on as it is asked for."""
        earlier = tuple((since, Batching(**each)) for since, each in self.cursor.get("batchings", ()))
        return earlier if earlier and earlier[-1][1] == asked else (*earlier, (self.step, asked))

    def rows(self) -> RowDigests:
        """Those that were trained when the checkpoint was taken."""
        assert self.found is not None
        columns = {name: tensor.numpy() for name, tensor in self.found.checkpoint.tensors["rows"].items()}
        return RowDigests(tuple(self.cursor["sources"]), **columns)

    def changes(self, folder: Path, now: Inputs, rows: RowDigests) -> list[str]:
        """Lines on what changed since the checkpoint; Problems where the run cannot go on with it."""
        if self.found is None:
            return []
        before = Inputs(**self.found.checkpoint.values["inputs"])
        keys = changed_keys(before.config, now.config)
        if refused := _refused(self.step, before, now, keys, self.rows().differences(rows)):
            what = f"not what was trained until step {self.step}; put it back, or train anew with another output=:"
            raise Problems(f"{folder}: {what}", refused)
        return [f"since step {self.step}: {change}" for change in _applied(keys, before, now)]

    def cut_back(self, folder: Path, now: Inputs, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Takes what is of later steps than the checkpoint out of the run folder; returns the metrics of the others.

        Losses of other held-out rows than those of `now` are set aside, as they do not compare.
        """
        step = self.step if self.found else -1
        notes = checkpoint.set_aside(folder / "checkpoints", step)
        for note in notes:
            say(note)
        cut = partial(jsonl.cut, is_kept=bool(notes))
        if self.found and self.found.checkpoint.values["inputs"]["held_out"] != now.held_out:
            jsonl.cut(folder / "eval.jsonl", -1, is_kept=True)
        for name in ("eval", "samples"):
            cut(folder / f"{name}.jsonl", step if self.is_evaluated else step - 1)
        return cut(folder / "metrics.jsonl", step)

    def restore(self, state: TrainState) -> None:
        """Moves a state that was built anew to where the run goes on."""
        if self.found is not None:
            resuming.restore(state, self.found.checkpoint)


NEW_RUN = EarlierStarts()


def earlier_starts(config: Config, say: Callable[[str], None], world: World) -> EarlierStarts:
    """What to go on from, which all ranks verify; what earlier starts left half written is removed."""
    folder = Path(str(config.output))
    if world.is_first:
        for each in (folder, folder / "checkpoints"):
            files.sweep(each)
    if not world.from_first("whether it goes on", lambda: goes_on(config)):
        return NEW_RUN
    found = checkpoint.find(folder / "checkpoints", config.resume, world)
    for note in found.notes if found else ():
        say(note)
    return EarlierStarts(found)


def goes_on(config: Config) -> bool:
    """Whether a run may go on where an earlier start in its folder ended."""
    return config.resume != "never" and is_run(Path(str(config.output)))


def settled(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the checkpoint's values where nothing is asked for.

    >>> settled({"max_length": None, "device": "auto", "seed": 1}, {"max_length": 128, "device": "cpu", "seed": 0})
    {'max_length': 128, 'device': 'cpu', 'seed': 1}
    """
    asks_nothing = {key for key in AUTOS if key in config and config[key] in (None, "auto")}
    return {**config, **{key: before[key] for key in asks_nothing if key in before}}


def fingerprint(folder: Path) -> str:
    """A digest of a model's or adapter's folder: what describes it, and every byte of its weights."""
    described = [folder / name for name in DESCRIBES if (folder / name).is_file()]
    paths = sorted([*described, *folder.glob("*.safetensors")])
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        digests = pool.map(cache.file_digests, ([str(path)] for path in paths))
        return digest(
            *(text for path, each in zip(paths, digests, strict=True) for text in (path.name, *each.values()))
        )


def digest(*texts: str) -> str:
    """The SHA-256 of texts.

    >>> digest("a", "b") == digest("ab")
    False
    """
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def plan_digest(orders: Iterable[np.ndarray]) -> str:
    """The SHA-256 of the members of steps, one array each."""
    found = hashlib.sha256()
    for order in orders:
        found.update(np.ascontiguousarray(order, np.int64).tobytes() + b"|")
    return found.hexdigest()


def _refused(
    step: int, before: Inputs, now: Inputs, keys: Mapping[str, tuple[Any, Any]], rows: Mapping[str, str]
) -> list[Problem]:
    """What keeps a run from going on: keys, then files, then rows, then the plan; the first kind that there is.

    keys  that have changed: (old, new)
    rows  source -> what is different in it
    """
    refused = [Problem(key, f"{old} -> {new}") for key, (old, new) in keys.items() if _is_refused(key)]
    refused += other_files(before, now, f"since step {step}")
    if rows and not refused:
        refused += _about_rows(step, rows, {key: change for key, change in keys.items() if is_of(key, ROWS)})
    if before.plan != now.plan and not refused:
        refused.append(_about_the_plan(step, before, now))
    return refused


def other_files(before: Inputs, now: Inputs, since: str) -> Iterator[Problem]:
    """Model, tokenizer and template, as far as their files are others."""
    keys = changed_keys(before.config, now.config)
    for name, causes in READ_FROM.items():
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            others = {key: f"{was} -> {is_now}" for key, (was, is_now) in keys.items() if key in causes}
            where = ", ".join(text if key == name else f"{key} {text}" for key, text in others.items()) or "its files"
            yield Problem(name, f"{where} changed {since}: {old[:12]} -> {new[:12]}")


def may_change(key: str) -> bool:
    """Whether a run can go on from a checkpoint though this key, or what is called so, has changed."""
    return is_of(key, Config.model_fields) and not (_is_refused(key) or is_of(key, (*ROWS, "model")))


def _is_refused(key: str) -> bool:
    return is_of(key, REFUSED) and not is_of(key, FREE)


def _about_rows(step: int, different: Mapping[str, str], causes: Mapping[str, tuple[Any, Any]]) -> list[Problem]:
    if causes:
        rows = "; ".join(f"{source} {what}" for source, what in different.items())
        return [Problem(key, f"{old} -> {new} makes other rows: {rows}") for key, (old, new) in causes.items()]
    return [Problem(source, f"changed since step {step}: {what}") for source, what in different.items()]


def _about_the_plan(step: int, before: Inputs, now: Inputs) -> Problem:
    if now.plan == plan_digest([]):
        return Problem(
            "epochs", f"they would end before step {step}, which is done", f"steps={step} ends the run there"
        )
    versions = f"numpy {before.versions['numpy']} -> {now.versions['numpy']}"
    return Problem("the plan", f"the steps until {step} come out otherwise ({versions})", "use the numpy of before")


def _applied(keys: Mapping[str, tuple[Any, Any]], before: Inputs, now: Inputs) -> list[str]:
    told = [
        f"{key} {old} -> {new} {next((rule for name, rule in APPLIED.items() if is_of(key, [name])), 'applies')}"
        for key, (old, new) in keys.items()
        if not _is_refused(key) and not is_of(key, IGNORED)
    ]
    if before.held_out != now.held_out:
        told.append("the held-out rows are others than before: their losses do not compare")
    if before.ledger != now.ledger:
        changed = f"ledger {before.ledger[:12]} -> {now.ledger[:12]}"
        told.append(f"{changed} applies: the same rows are trained, but not all that ledger.json says is as before")
    if before.processes != now.processes:
        told.append(f"processes {before.processes} -> {now.processes} applies")
    told += [
        f"{package} {old} -> {now.versions.get(package)} applies: results may differ in their last bits"
        for package, old in before.versions.items()
        if now.versions.get(package) != old
    ]
    return told


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new); of a section that only one of them has, its own key and its name.

    >>> changed_keys({"adapter": {"name": "lora", "r": 4}, "a": {"b": 1}}, {"adapter": None, "a": {"b": 2}})
    {'adapter': ('lora', None), 'a.b': (1, 2)}
    """
    for key in now:
        pair = (before.get(key, {}), now[key])
        if None in pair and any(isinstance(each, Mapping) for each in pair):
            one, other = (each and each.get("name", each) for each in pair)
            before, now = {**before, key: one}, {**now, key: other}
    old, new = dict(_flat(before)), dict(_flat(now))
    return {
        key: (old.get(key), new.get(key)) for key in [*new, *(old.keys() - new.keys())] if old.get(key) != new.get(key)
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def is_of(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)
