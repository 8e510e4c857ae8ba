"""What a model's files may say: nothing that makes transformers run code or look outside. Read before it reads them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from deft.core.errors import InputError, Problem

INDEX = "model.safetensors.index.json"
DOCUMENTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX)
_KERNEL_KEYS = ("attn_implementation", "experts_implementation")


def check_config(path: str) -> None:
    """Raises InputError where a model's config.json asks for code to be run: its own, or a kernel from the hub.

    Code that is named at the top of the file, beside an architecture that transformers has, is left unused.
    """
    raw, _ = PreTrainedConfig.get_config_dict(path)
    for key, value in _entries(raw):
        where = f"{path}: config.json: {'.'.join(key)}"
        if key[-1] == "trust_remote_code" and value:
            raise _refusal(where, "asks to trust code that comes with the model", "remove it, or use another model")
        if key[-1] == "auto_map" and len(key) > 1:
            raise _refusal(where, "names code that comes with the model", "remove it, or use another model")
        if any(name in key[-1] for name in _KERNEL_KEYS) and isinstance(value, str) and "/" in value:
            raise _refusal(where, f"names {value}, code to be fetched and run", "remove it")


def check_keys(path: str) -> None:
    """Raises InputError where a key stands twice in a JSON file of a model: the last one would count."""
    for name in DOCUMENTS:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        with suppress(ValueError, OSError):  # what is no JSON is told where it is read
            text = Path(found).read_text(encoding="utf-8") if found else "null"
            json.loads(text, object_pairs_hook=partial(_mapping, f"{path}: {name}"))


def _mapping(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise _refusal(where, f"{key} stands twice, with two values", "take out the wrong one")
        found[key] = value
    return found


def check_index(path: str) -> None:
    """Raises InputError where the index of sharded weights names anything but safetensors files beside it."""
    found = cached_file(path, INDEX, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return
    where = f"{path}: {INDEX}"
    try:
        names = set(json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(where, "is not an index of weights", "download or save the model again") from error
    for name in names:
        if not isinstance(name, str) or "\0" in name or "\\" in name or PurePosixPath(name).name != name:
            raise _refusal(where, f"{name!r} is not a file beside it", "download or save the model again")
        if not name.endswith(".safetensors"):
            fix = "save it with model.save_pretrained, which writes safetensors"
            raise _refusal(where, f"{name!r} is pickled, and a pickle can run code", fix)


def check_adapter(path: str) -> None:
    """Raises InputError where a model has an adapter beside its weights: transformers would add it without a word, to
    weights that have it in them already where they were merged, and from a pickle as well.
    """
    found = cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False)
    if found is not None:
        what = "holds a model and an adapter, which transformers adds to it, a second time where it is merged already"
        raise _refusal(path, what, "move the adapter_* files to a folder of their own")


@contextmanager
def without_kernels() -> Iterator[None]:
    """While it lasts, no package finds `kernels`: bitsandbytes, which peft imports as well, would fetch code from the
    Hub with it and run that. That it warns of what it has not found is not shown.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    modules: dict[str, Any] = sys.modules
    missing = object()
    before = modules.get("kernels", missing)
    modules["kernels"] = None
    try:
        yield
    finally:
        log.setLevel(level)
        del modules["kernels"]
        if before is not missing:
            modules["kernels"] = before


def _entries(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of nested mappings and lists, with its value.

    >>> list(_entries({"a": [{"b": 1}]}))
    [(('a',), [{'b': 1}]), (('a', 'b'), 1)]
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield (*key, str(name)), inner
            yield from _entries(inner, (*key, str(name)))
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, key)


def _refusal(where: str, what: str, fix: str) -> InputError:
    return InputError(str(Problem(where, what, fix)))
