"""Which text a prompt becomes for a model: what rows became in its training, as deft.json in its folder keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from deft.core.errors import InputError
from deft.core.redact import redacted_json
from deft.encoding.tokenizer import Tokenizer

FILE = "deft.json"


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How a model is asked.

    is_chat          a text is the user's message in the chat template; else it is shown as it is
    template_kwargs  variables that the chat template gets
    """

    is_chat: bool
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.is_chat:
            return "prompts are raw text"
        given = f" with {json.dumps(dict(self.template_kwargs))}" if self.template_kwargs else ""
        return f"each prompt is the user's message in the chat template{given}"

    def shown(self, prompt: Any) -> Any:
        """What the model is shown: messages are messages in either form.

        >>> PromptForm(True).shown("Hi"), PromptForm(False).shown("Hi")
        ([{'role': 'user', 'content': 'Hi'}], 'Hi')
        """
        return [{"role": "user", "content": prompt}] if self.is_chat and isinstance(prompt, str) else prompt

    def as_json(self) -> str:
        """The content of FILE, without secrets."""
        given = redacted_json(dict(self.template_kwargs))
        found = {"render": "chat" if self.is_chat else "raw", "template_kwargs": given}
        return json.dumps(found, indent=2) + "\n"


RAW = PromptForm(False)


def recorded(path: str | Path) -> PromptForm | None:
    """The form in which a model of deft's was trained; None for a folder or Hub id that does not say.

    Raises InputError where the file is not as deft writes it.
    """
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else str(path), FILE, **lenient)
    if file is None:
        return None
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        return PromptForm({"chat": True, "raw": False}[found["render"]], dict(found["template_kwargs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not as deft writes it; remove it, and say --raw or --chat") from error


def chosen(path: str | Path, tokenizer: Tokenizer, is_chat: bool | None) -> tuple[PromptForm, str]:
    """The form in which a model is asked, and a line on it.

    It is what the user wants, else what the model was trained in, else its chat template where it has one.

    is_chat  what the user wants, None where they do not say
    """
    trained, has_template = recorded(path), tokenizer.chat_template is not None
    if is_chat and not has_template:
        raise InputError(f"--chat: {path} has no chat template; leave it out")
    form = trained or PromptForm(has_template)
    if is_chat is not None and is_chat != form.is_chat:
        form = PromptForm(is_chat, form.template_kwargs)
    if trained is None:
        why = "" if has_template else ", as there is no chat template"
    else:
        why = ", as in its training" if form.is_chat == trained.is_chat else f"; in its training {trained}"
    other = "" if is_chat is not None or not has_template else f" ({'--raw' if form.is_chat else '--chat'}: otherwise)"
    return form, f"{form}{why}{other}"
