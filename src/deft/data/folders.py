"""A folder that holds a data set as `datasets` knows it -> the files of one split.

Splits are named by README.md's `configs` (a clone of a Hub repository), by dataset_dict.json (`save_to_disk`), or by
the files and folders themselves: train.jsonl, data/test-00000-of-00002.parquet, validation/a.csv.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deft.core.errors import InputError
from deft.core.registry import closest

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(\w+?)-\d{5}-of-\d{5}")
_FIRST_WORD = re.compile(r"[A-Za-z]+")
Splits = Mapping[str, Sequence[Path]]


def splits(folder: Path, files: Sequence[Path], subset: str | None = None) -> dict[str, list[Path]]:
    """The files of each split; none where the folder has no splits.

    files   the data in it and below it
    subset  one of README.md's configs

    Raises InputError where there is no such subset, or where some files are of a split and some of none.
    """
    found = _of_configs(folder, files, subset)
    if found:
        return found
    if subset is not None:
        raise InputError(f"{folder}: no subset {subset!r}: its README.md names none; leave subset out")
    by_name: dict[str | None, list[Path]] = {}
    saved = _saved_splits(folder)
    for file in files:
        inner = file.relative_to(folder)
        by_name.setdefault(inner.parts[0] if inner.parts[0] in saved else _split_of(inner), []).append(file)
    alone = by_name.pop(None, [])
    if alone and len(by_name) > 1:
        what = f"it holds the splits {', '.join(map(str, by_name))}, and {alone[0].name} that is of none"
        raise InputError(f"{folder}: {what}; name the files, or a pattern such as {folder}/train*")
    return {} if alone else {str(name): each for name, each in by_name.items()}


def chosen(folder: Path, found: Splits, split: str | None, is_named: bool) -> list[Path]:
    """The files of one split, or of all where there is one alone and the user named none.

    split  the user's, where it `is_named`, or what is read by default
    """
    if split is not None and split in found:
        return list(found[split])
    if split is None or (len(found) < 2 and not is_named):
        return [file for files in found.values() for file in files]
    fix = closest(split, found) or f"say split: {next(iter(found), split)}"
    there = f"there is {', '.join(found)}" if found else "its files have no splits"
    raise InputError(f"{folder}: no split {split!r}; {there}; {fix if found else 'leave split out'}")


def _split_of(file: Path) -> str | None:
    """The split that a file's path below its folder names.

    >>> [_split_of(Path(name)) for name in ("data/train_sft-00000-of-00002-ab12.parquet", "dev/a.jsonl", "a.jsonl")]
    ['train_sft', 'validation', None]
    """
    for part in reversed(file.parts):
        word = _FIRST_WORD.match(part)
        if word and word[0].lower() in _WORDS and not part[word.end() : word.end() + 1].isalnum():
            shard = _SHARD.match(part)
            return shard[1] if shard else _WORDS[word[0].lower()]
    return None


def _saved_splits(folder: Path) -> list[str]:
    try:
        found = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [str(name) for name in found] if isinstance(found, list) else []


def _of_configs(folder: Path, files: Sequence[Path], subset: str | None) -> dict[str, list[Path]]:
    """The splits that README.md's `configs` name."""
    configs = _configs(folder)
    if not configs:
        return {}
    name = subset or ("default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else "")
    if name not in configs:
        what = f"no subset {name!r}" if name else "it has several subsets"
        raise InputError(f"{folder}: {what}; say subset: {' or '.join(configs)}")
    found = {}
    for split, patterns in _patterns(configs[name]):
        places = {place for pattern in patterns for place in folder.glob(pattern)}
        found[split] = [file for file in files if file in places]
    return {split: inside for split, inside in found.items() if inside}


def _configs(folder: Path) -> dict[str, Any]:
    try:
        head = (folder / "README.md").read_text(encoding="utf-8").split("---\n")
        found = (yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else {}) or {}
        return {str(each.get("config_name", "default")): each.get("data_files") for each in found.get("configs") or ()}
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        return {}


def _patterns(data_files: Any) -> list[tuple[str, list[str]]]:
    """Each split with its patterns, as `data_files` names them: a pattern, some, or some with their split."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, Mapping) else ("train", entry)
        patterns = path if isinstance(path, list) else [path]
        found.setdefault(str(split), []).extend(each for each in patterns if isinstance(each, str) and each)
    return list(found.items())
