"""Prompts that are answered while training, from a file or from memory, each with its metadata for `metric_fn`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deft.core.errors import InputError, Problem, Problems
from deft.core.types import Message, Origin, Row
from deft.data import messages, sources
from deft.data.fields import RowError, described, kind_of, shortened, text_of
from deft.data.formats import sharegpt
from deft.encoding.render.template_inputs import TemplateInputs

RESERVED = ("samples", "prompts", "outputs")
"""What `metric_fn` is given beside the metadata."""
KEYS = ("prompt", "messages", "conversations")
"""The fields that an object may hold its prompt in; the first that it has is taken."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, text or messages as a chat template takes them, and what `metric_fn` is told about it."""

    prompt: str | Sequence[Mapping[str, Any]]
    metadata: Mapping[str, Any]


def load(prompts: str | Sequence[Any], where: str = "eval_prompts") -> tuple[Prompt, ...]:
    """The prompts of a file or of a list; `parse` says what a prompt may be.

    prompts  the list, or the name of a file of any kind that data may have; in a text file each line is a prompt,
             blank lines apart
    where    what the list is called in errors

    Raises Problems that name every bad prompt, by file and line or by its index, and InputError for a file that cannot
    be read.

    >>> load(["Hi", {"prompt": "2+2=", "answer": 4}])
    (Prompt(prompt='Hi', metadata={}), Prompt(prompt='2+2=', metadata={'answer': 4}))
    """
    if isinstance(prompts, Mapping) or not isinstance(prompts, Sequence):
        raise InputError(f"{where}: {type(prompts).__name__} is not a list of prompts; put it in a list")
    found = list(_of_file(prompts, where) if isinstance(prompts, str) else _of_list(prompts, where))
    problems = [each for each in found if isinstance(each, Problem)]
    if problems:
        raise Problems(f"{where}: {len(problems)} cannot be used", problems)
    return tuple(each for each in found if isinstance(each, Prompt))


def parse(value: Any) -> Prompt:
    """A prompt: text, a list of messages, or an object with either. RowError for anything else.

    An object has `prompt`, text or messages, or a chat under `messages` or ShareGPT's `conversations`; its other fields
    are metadata. Messages may be written as in training data; the last is the user's, or a tool's.

    >>> parse({"messages": [{"role": "user", "content": "2+2?"}], "answer": 4})
    Prompt(prompt=[{'role': 'user', 'content': '2+2?'}], metadata={'answer': 4})
    """
    if not isinstance(value, Mapping):
        return Prompt(_prompt(value, ""), {})
    key = next((key for key in KEYS if key in value), None)
    if key is None:
        fix = "put the messages of one prompt in a list" if "role" in value else 'give {"prompt": ..., metadata}'
        raise RowError("", f"has {described(dict(value))}, not 'prompt' or 'messages'", fix)
    metadata = {name: item for name, item in value.items() if name != key}
    for name in metadata:
        if not isinstance(name, str):
            raise RowError("", f"the key {name!r} is not text", "name it")
        if name in RESERVED:
            raise RowError(name, "metric_fn is given its own argument of this name", "rename it")
    if key != "prompt" and value.get("tools"):
        raise RowError("tools", "a prompt cannot offer tools to the model", "leave them out")
    return Prompt(_prompt(value[key], key), metadata)


def _of_list(prompts: Sequence[Any], where: str) -> Iterator[Prompt | Problem]:
    for index, value in enumerate(prompts):
        try:
            yield parse(value)
        except RowError as error:
            dot = "." if error.field and error.field[0] != "[" else ""
            yield Problem(f"{where}[{index}]{dot}{error.field}", error.what, error.fix)


def _of_file(path: str, where: str) -> Iterator[Prompt | Problem]:
    try:
        rows = list(sources.read(path))
    except InputError as error:
        raise InputError(f"{where}: {error}; a prompt itself: put it in a list") from error
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        for each in _lines(row):
            try:
                yield parse(each.value)
            except RowError as error:
                yield Problem(str(each.origin), str(error), error.fix)


def _lines(row: Row) -> list[Row]:
    """The prompts of a row: of a text file, which is read as one row, each line; else the row itself."""
    source = row.origin.source
    if sources.kind(source) != ".txt":
        return [row]
    return [Row(Origin(source, number), line) for number, line in enumerate(row.value.split("\n"), 1) if line.strip()]


def _prompt(value: Any, field: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str) and field in ("", "prompt"):
        return text_of(value, field)
    if not isinstance(value, list | tuple | str):
        raise RowError(field, f"{kind_of(value)}, not a prompt", "give text or a list of messages")
    read = sharegpt.read_all if field == "conversations" else messages.read_all
    found: list[Message] = read(value, field)
    if found[-1].role not in ("user", "tool"):
        what = f"the last message is the {found[-1].role}'s ({shortened(found[-1].content)!r}): nothing to answer"
        raise RowError(field, what, "end with the user's message")
    return TemplateInputs().messages(found)
