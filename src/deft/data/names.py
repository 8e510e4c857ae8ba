"""What data sets call a question and an answer: the names of fields, and the value of the one that a row has.

Names that mean a question to an assistant make a chat; names that say nothing of roles are a pair of strings. Case and
underscores do not matter: `format.plain` gives a row and its messages the names that stand here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from deft.data.fields import RowError, is_absent, shortened

QUESTION = ("question", "query", "problem")
SPEAKER = ("user", "human")
PROMPT = ("prompt", "input", "inputs", "input_text")
INSTRUCTION = ("instruction",)
UNDER_INSTRUCTION = ("input", "context")
ANSWER = (
    *("answer", "response", "output", "completion", "solution", "reply", "target", "targets"),
    *("output_text", "answers"),
)
_LISTED = ("answers", "targets")
REPLIER = ("assistant", "gpt", "bot")
CHAT = ("conversations", "conversation", "dialog", "dialogue", "data")
BESIDE = ("system", "tools", "history", "weight", "loss_weight", "label")
"""Names that formats read beside those that they are found by."""


def folded(name: str) -> str:
    """A name without what does not matter of its spelling.

    >>> folded("lossWeight") == folded("Loss_Weight") == folded("loss-weight")
    True
    """
    return name.lower().replace("_", "").replace("-", "")


def sets(*groups: Sequence[str]) -> tuple[set[str], ...]:
    """Every choice of one name of each group, as the KEYS of a format.

    >>> sets(("question", "query"), ("answer",)) == ({"question", "answer"}, {"query", "answer"})
    True
    """
    return tuple(set(choice) for choice in product(*groups))


def fields_of(value: Mapping[str, Any], **groups: Sequence[str]) -> dict[str, str]:
    """What the row calls each thing: the name of the first field of its group that says something.

    groups  what a format calls a thing -> the names that it may have

    RowError where a thing is missing, or where two fields of one thing say different things.

    >>> fields_of({"query": "2+2?", "response": "4"}, question=QUESTION, answer=ANSWER)
    {'question': 'query', 'answer': 'response'}
    """
    there = {thing: [name for name in names if name in value] for thing, names in groups.items()}
    speaking = {thing: [name for name in names if not is_absent(value[name])] for thing, names in there.items()}
    chosen = {thing: (speaking[thing] or names)[0] for thing, names in there.items() if names}
    for thing in groups:
        if thing not in chosen:
            raise _missing(value, thing, groups, chosen)
    for names in speaking.values():
        agree(value, names)
    return chosen


def _missing(
    value: Mapping[str, Any], thing: str, groups: Mapping[str, Sequence[str]], chosen: Mapping[str, str]
) -> RowError:
    fix = f"a row needs {' and '.join(groups)}"
    others = [name for name, each in value.items() if isinstance(each, str) and name not in chosen.values()]
    if others:
        line = mapped({each: shortened(others[0]) if each == thing else chosen.get(each, each) for each in groups})
        fix += f"; if {shortened(others[0])!r} is it, say {line}"
    return RowError(thing, "missing", fix)


def mapped(columns: Mapping[str, str]) -> str:
    """A mapping of fields as a line of configuration.

    >>> mapped({"prompt": "ask", "completion": "tell"})
    'columns: {prompt: ask, completion: tell}'
    """
    return f"columns: {{{', '.join(f'{name}: {own}' for name, own in columns.items())}}}"


def agree(value: Mapping[str, Any], names: Sequence[str]) -> None:
    """RowError where fields that mean one thing say different things."""
    for name in names[1:]:
        if said(value, name) != said(value, names[0]):
            fix = f"keep one of them, or say ignore: [{name}] of the source to read {names[0]}"
            raise RowError(names[0], f"says something else than {name}, and both are read as one thing", fix)


def said(value: Mapping[str, Any], name: str) -> Any:
    """What a field holds; of several answers that are one text, as SQuAD lists them under `text`, that text.

    >>> said({"answers": {"text": ["4", "4"], "answer_start": [0, 7]}}, "answers"), said({"answer": ["4"]}, "answer")
    ('4', ['4'])
    """
    held = value[name]
    is_squad = isinstance(held, Mapping) and "text" in held
    listed = held["text"] if is_squad else held if name in _LISTED else None
    if not isinstance(listed, list | tuple) or not listed or not isinstance(listed[0], str):
        return held
    return listed[0] if all(each == listed[0] for each in listed) else held


def mapping(value: Mapping[str, Any]) -> str:
    """A line of configuration that would map a row's own fields, or nothing where it has none that could be meant.

    >>> mapping({"id": "1", "ask": "2+2?", "tell": "4"})
    'columns: {prompt: ask, completion: tell}'
    """
    turns = [name for name, each in value.items() if isinstance(each, list | tuple) and each and _is_turn(each[0])]
    words = [name for name, each in value.items() if isinstance(each, str) and not is_absent(each)]
    texts = [name for name in words if name.lower() not in _NOTES]
    if turns:
        return mapped({"messages" if "role" in value[turns[0]][0] else "conversations": shortened(turns[0])})
    if len(texts) > 1:
        return mapped({"prompt": shortened(texts[0]), "completion": shortened(texts[1])})
    return mapped({"text": shortened(texts[0])}) if texts else ""


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and not {"role", "from"}.isdisjoint(value)


_NOTES = {
    *("id", "uuid", "idx", "index", "source", "category", "type", "split", "lang", "language", "url", "title", "name"),
    *("topic", "subject", "license", "dataset", "model", "date", "created", "timestamp", "level", "difficulty", "task"),
    *("role", "author", "system", "system_prompt"),
}
"""Fields that say something about a row."""
