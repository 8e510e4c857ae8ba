"""Which chat template a run uses, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from deft.core.errors import InputError
from deft.encoding.render.template import CHATML_END, chatml, plain


@dataclass(frozen=True, slots=True)
class Chosen:
    """A template's source text; `where` says in words where it came from; `is_own` is true for the model's own."""

    source: str
    where: str
    is_own: bool


def choose(setting: str, own: str | None, puts_bos: bool, special: Collection[str] = ()) -> Chosen:
    """`auto`: the model's own template, deft's plain one where it has none. Else chatml, a .jinja file or a folder.

    special   the tokenizer's special tokens: chatml's marks are text where they are not among them

    >>> choose("auto", None, puts_bos=False).where
    "deft's plain template (role: content), as the model has none"
    """
    if setting == "chatml":
        return Chosen(chatml(puts_bos, CHATML_END in special), "deft's chatml", False)
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
    known = "name a .jinja file or a model folder, or say auto or chatml"
    raise InputError(f"template: {setting}: no chat template there; {known}")
