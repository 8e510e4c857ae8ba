"""Which chat template a run uses, and where it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from deft.errors import InputError
from deft.render.template import plain


@dataclass(frozen=True, slots=True)
class Chosen:
    """A template's source text; `where` says in words where it came from; `is_own` is true for the model's own."""

    source: str
    where: str
    is_own: bool


def choose(setting: str, own: str | None, puts_bos: bool) -> Chosen:
    """`auto`: the model's own template, deft's plain one where it has none. Else a .jinja file or a model folder.

    >>> choose("auto", None, puts_bos=False).where
    "deft's plain template (role: content), as the model has none"
    """
    if setting != "auto":
        return Chosen(_read(setting), setting, False)
    if own is not None:
        return Chosen(own, "the model's own chat template", True)
    return Chosen(plain(puts_bos), "deft's plain template (role: content), as the model has none", False)


def _read(setting: str) -> str:
    path = Path(setting)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        if path.joinpath("chat_template.jinja").is_file():
            return path.joinpath("chat_template.jinja").read_text(encoding="utf-8")
        if path.joinpath("tokenizer_config.json").is_file():
            found = json.loads(path.joinpath("tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, str):
                return found
    except (OSError, ValueError) as error:
        raise InputError(f"template: {setting}: {error}") from error
    raise InputError(f"template: {setting}: no chat template there; name a .jinja file or a model folder, or auto")
