"""What a format is, what a source chooses for it, and which format reads a row; the folder `formats` is the registry.

A format is a module with `KEYS`, the sets of fields that make a row its own, and `convert`, from a row to its
conversations. It may have `READS`, the fields of a row that `convert` reads where these are more than KEYS, and `reads`
where they depend on which a row has; `PARTS`, the fields of the objects in them, where these are not messages;
`left_out`, for rows that others make needless, with `compared`, which gives what `left_out` needs of a row; and
`OPTIONS`, the choices of a source that it knows. What belongs to rows of every format, `row_fields` reads. A user's own
format is a function named `pkg.mod:fn`: from a row to a row in a shape deft reads, or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, Literal

from deft.core import registry
from deft.core.errors import UserCodeError, user_code
from deft.core.types import Conversation, Row
from deft.data import formats, messages, row_fields
from deft.data import names as field_names
from deft.data.fields import LeftOut, RowError, described, is_absent, shortened

Answers = Literal["best", "all"]


@dataclass(frozen=True, slots=True)
class Control:
    """HALOs' control tokens: the text put before an answer, by whether it is a good one.

    Without `bad` only good answers are learnt; with it bad ones are learnt too, behind their own text.
    """

    good: str
    bad: str | None = None


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of one source that its format needs to know.

    columns         what a format calls a field -> what the rows call it
    answers         of several answers to one prompt: the best one, or all good ones; None is the format's own default
    control         text before good and bad answers
    split           rows that name another split are left out; None reads all
    names_split     whether the user named the split: then the source must have splits
    ignore          fields of rows and messages that are neither read nor told of
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    answers: Answers | None = None
    control: Control | None = None
    split: str | None = None
    names_split: bool = False
    ignore: tuple[str, ...] = ()

    def options(self) -> set[str]:
        """The choices that only some formats know, as far as they were made.

        >>> Choices(answers="best", split="train").options()
        {'answers'}
        """
        made = {"answers": self.answers is not None, "control": self.control is not None, "split": self.names_split}
        return {name for name, is_made in made.items() if is_made}

    @property
    def learns_bad(self) -> bool:
        """Whether bad answers are learnt too, behind their control text."""
        return self.control is not None and self.control.bad is not None


@dataclass(frozen=True, slots=True, eq=False)
class Format:
    """One module of the folder `formats`, or a user's function.

    keys      fields that make a row this format's, any of these sets; strings and lists have names in angle brackets
    convert   a row -> its conversations; raises RowError and LeftOut
    reads     which fields it reads of a row with some fields
    parts     the fields that it reads of the objects in them
    written   a row of a user's function -> the row that it gives
    left_out  which sound rows of a source are not learnt because of others, and why
    compared  what `left_out` needs of a row, as a row
    options   the choices of a source that have a meaning here
    """

    name: str
    keys: tuple[frozenset[str], ...]
    convert: Callable[[Row, Choices], Sequence[Conversation]]
    reads: Callable[[frozenset[str]], Iterable[str]]
    parts: frozenset[str] = messages.READS
    written: Callable[[Row, Choices], tuple[Format, Row]] | None = None
    left_out: Callable[[Sequence[Row], Choices], Mapping[int, str]] | None = None
    compared: Callable[[Row], Row] | None = None
    options: frozenset[str] = frozenset()

    def claim(self, keys: frozenset[str]) -> frozenset[str]:
        """The fields of a row that this format reads it by; none where it does not."""
        return frozenset().union(*(known for known in self.keys if known <= keys))

    def read(self, row: Row, choices: Choices) -> tuple[tuple[Conversation, ...], frozenset[str]]:
        """The conversations of a row with all that it says beside its format, and the names of what nothing reads.

        Raises RowError and LeftOut.
        """
        if self.written is not None:
            form, row = self.written(row, choices)
            return form.read(row, choices)
        value = row.value
        keys = keys_of(value)
        own = own_fields(self, keys)
        if not own and not _is_near(self, _fields(value)):
            raise RowError("", f"has {described(value)}, not {self.name}", "mend or remove the row")
        if isinstance(value, dict) and not row_fields.LEARNT.isdisjoint(value):
            row = replace(row, value=row_fields.spread(value, own))
        odd = row_fields.odd_ones(value, own, _usual(self.parts))
        found = row_fields.applied(self.convert(row, choices), row.value, own, odd)
        return found, row_fields.unread(value, keys, own, odd, self.parts)


@cache
def _usual(parts: frozenset[str]) -> frozenset[str]:
    """The fields of a format's objects of which there is nothing more to know than that they are read."""
    return parts.difference(row_fields.TOOLS)


@lru_cache(maxsize=10_000)
def own_fields(form: Format, keys: frozenset[str]) -> frozenset[str]:
    """The fields that a format itself reads of a row with `keys`.

    >>> sorted(own_fields(load("messages"), frozenset({"messages", "tools", "id"})))
    ['messages']
    """
    return keys.intersection(form.reads(keys))


def names() -> list[str]:
    """The formats there are.

    >>> "messages" in names()
    True
    """
    return registry.names(formats)


@cache
def load(name: str) -> Format:
    """The format; InputError lists what there is for an unknown name, or says why a user's own is not found."""
    if registry.is_own(name):
        return _own(name)
    module = registry.load(formats, name, "data.format")
    more = {key: getattr(module, key) for key in ("left_out", "compared") if hasattr(module, key)}
    keys, options = tuple(map(frozenset, module.KEYS)), frozenset(getattr(module, "OPTIONS", ()))
    table = frozenset(getattr(module, "READS", frozenset().union(*keys)))
    reads, parts = getattr(module, "reads", lambda keys: table), getattr(module, "PARTS", messages.READS)
    return Format(name, keys, module.convert, reads, parts, options=options, **more)


@lru_cache(maxsize=10_000)
def reading(keys: frozenset[str]) -> tuple[Format, ...]:
    """The formats that read rows with these fields. Of two, the one that reads more of them wins.

    >>> [form.name for form in reading(frozenset({"instruction", "input", "output"}))]
    ['alpaca']
    >>> [form.name for form in reading(frozenset({"messages", "text"}))]
    ['messages', 'text']
    """
    claims = {form: claim for form in map(load, names()) if (claim := form.claim(keys))}
    return tuple(form for form, claim in claims.items() if not any(claim < other for other in claims.values()))


def the_one(row: Row, forms: Sequence[Format], choices: Choices) -> Format:
    """Of formats that all read a row by its fields, the most structured, where the others read the same words.

    A format that cannot convert the row does not read it. RowError where two read different words.

    >>> from deft.core.types import Origin
    >>> text = "Below is an instruction. Name a fruit. ### Response: Apple."
    >>> row = Row(Origin("a", 1), {"instruction": "Name a fruit.", "output": "Apple.", "text": text})
    >>> the_one(row, reading(keys_of(row.value)), Choices()).name
    'alpaca'
    """
    if len(forms) == 1:
        return forms[0]
    found: dict[str, Sequence[Conversation]] = {}
    for form in forms:
        with suppress(RowError):
            found[form.name] = _converted(form, row, choices)
    order = sorted(found, key=lambda name: (_structure(found[name]), _is_listed(row, load(name))), reverse=True)
    if not order or found[order[0]][0].kind == "text":
        return next(form for form in forms if form.name != "text")
    best, *others = order
    for other in others if found[best][0].messages else ():
        if not _say_the_same(found[best], found[other]):
            fix = f"keep one of them, or say data.format: {best} (or {other})"
            raise RowError("", f"reads as {best} and as {other}, which say different things", fix)
    return load(best)


def _converted(form: Format, row: Row, choices: Choices) -> Sequence[Conversation]:
    try:
        return form.convert(row, choices)
    except LeftOut:
        return [Conversation(row.origin, "chat", ())]


def _structure(found: Sequence[Conversation]) -> tuple[int, int]:
    return ("text", "dialogue", "chat").index(found[0].kind), sum(len(each.messages) for each in found)


def _is_listed(row: Row, form: Format) -> bool:
    """Whether the format reads turns in a list, not fields."""
    return any(isinstance(row.value[key], list | tuple) for key in form.claim(keys_of(row.value)))


def _say_the_same(best: Sequence[Conversation], other: Sequence[Conversation]) -> bool:
    """Whether all words of `other` stand in `best`, or it is a rendering of `best`: one text that holds its words.

    Of a text without roles the answers are enough: it may tell the rest in other words, as Alpaca's does.
    """
    structured, loose = _words(best), _words(other)
    everything = f" {' '.join(structured)} "
    held = _words(best, "assistant", "output") if other[0].kind == "text" else structured
    return bool(held) and (
        all(f" {words} " in everything for words in loose)
        or any(all(words in text for words in held) for text in loose)
    )


def _words(conversations: Sequence[Conversation], *roles: str) -> list[str]:
    """What the messages of some roles say, of all but system prompts if none is named, whatever the white space."""
    every = (message for each in conversations for message in each.messages)
    messages = (each for each in every if (each.role in roles if roles else each.role != "system"))
    return [words for message in messages if (words := " ".join(message.content.split()))]


def plain(value: Any) -> tuple[Any, Mapping[str, str]]:
    """A row under the names that formats read, however it spells them, and its messages too; name -> the row's own.

    >>> plain({"Question": "2+2?", "Response": "4", "ID": 7})
    ({'question': '2+2?', 'response': '4', 'ID': 7}, {'question': 'Question', 'response': 'Response'})
    >>> plain([{"Role": "user", "Content": "Hi"}])[0]
    [{'role': 'user', 'content': 'Hi'}]
    """
    if not isinstance(value, dict):
        return _plain_items(value), {}
    own = _renaming(frozenset(value), known_fields())
    value = {own.get(key, key): each for key, each in value.items()} if own else value
    changed = {}
    for key, each in value.items():
        if isinstance(each, str | list | tuple) and each and key not in row_fields.TOOLS:
            items = _plain_items(each)
            if items is not each:
                changed[key] = items
    return {**value, **changed} if changed else value, {name: key for key, name in own.items()} if own else own


def _plain_items(value: Any) -> Any:
    """A list of objects under the names that formats read, from JSON text too; the same where nothing is renamed."""
    known = _message_fields()
    if isinstance(value, str):
        first = _FIRST_NAME.match(value)
        items = row_fields.as_list(value) if first and first[1] not in known else ()
    else:
        items = value if isinstance(value, list | tuple) else ()
    for each in items:
        if isinstance(each, dict) and not known.issuperset(each) and _renaming(frozenset(each), known):
            break
    else:
        return value
    found = [(each, _renaming(frozenset(each), known) if isinstance(each, dict) else {}) for each in items]
    return [{own.get(key, key): one for key, one in each.items()} if own else each for each, own in found]


@lru_cache(maxsize=10_000)
def _renaming(keys: frozenset[Any], known: frozenset[str]) -> Mapping[str, str]:
    """The fields that are other spellings of known ones, which are not there: their own names -> the known ones."""
    others = sorted((key for key in keys - known if isinstance(key, str)), reverse=True)
    meant = {name: key for key in others if (name := _spelt(known).get(field_names.folded(key))) and name not in keys}
    return {key: name for name, key in sorted(meant.items())}


@cache
def _spelt(known: frozenset[str]) -> Mapping[str, str]:
    return {field_names.folded(name): name for name in known}


_FIRST_NAME = re.compile(r'\s*\[\s*\{\s*"([^"\\]*)"')


@cache
def _message_fields() -> frozenset[str]:
    """The names of fields that formats read of the objects in a row."""
    return frozenset().union(*(form.parts for form in map(load, names())))


@cache
def known_fields() -> frozenset[str]:
    """The names of fields that formats read, but for those of lists and strings."""
    read_by = (known for form in map(load, names()) for known in form.keys if min(known)[0] != "<")
    return row_fields.COMMON.union(field_names.BESIDE, field_names.UNDER_INSTRUCTION, *read_by)


def keys_of(value: Any) -> frozenset[str]:
    """The fields of a row by which its format is found; strings and lists have names of their own.

    >>> sorted(keys_of({"a": 1, "b": 2, "c": None})), sorted(keys_of(["p", "o"]))
    (['a', 'b'], ['<list of text>'])
    """
    if not isinstance(value, dict):
        return _fields(value)
    # How tables write that a row has no such field.
    nulls = [key for key, each in value.items() if each is None or (each.__class__ is float and each != each)]
    return frozenset(value).difference(nulls)


def _fields(value: Any) -> frozenset[str]:
    """The fields of a row, empty or not."""
    if isinstance(value, dict):
        return frozenset(value)
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, list | tuple):
        return _LISTS.get(type(value[0]), _OTHER_LIST) if value else _OTHER_LIST
    return frozenset()


def fitting(value: Any, columns: Iterable[str] = ()) -> tuple[tuple[Format, ...], bool]:
    """The formats that read a row, and whether another one would, if its null fields said something.

    Of several formats, those that read all `columns`, else those that read what is not empty.

    >>> formats, _ = fitting({"instruction": "a", "output": "b", "conversations": ""})
    >>> [form.name for form in formats], fitting({"messages": [], "label": None})[1]
    (['alpaca'], True)
    """
    keys = keys_of(value)
    found = reading(keys)
    if len(found) > 1 and columns:
        mapped = frozenset(columns)
        found = tuple(form for form in found if mapped <= form.claim(keys)) or found
    if len(found) > 1 and isinstance(value, dict):
        found = reading(frozenset(key for key in keys if not is_absent(value[key]))) or found
    if len(found) != 1 or not isinstance(value, dict) or len(keys) == len(value):
        return found, False
    others = reading(_fields(value))
    return found, len(others) == 1 and others != found


_TEXT, _OTHER_LIST = frozenset({"<text>"}), frozenset({"<list>"})
_LISTS: dict[type, frozenset[str]] = {str: frozenset({"<list of text>"}), dict: frozenset({"<list of objects>"})}
_ANY_LIST = _OTHER_LIST.union(*_LISTS.values())


@lru_cache(maxsize=10_000)
def _is_near(form: Format, keys: frozenset[str]) -> bool:
    """Whether an error of the format would help: the row has a field of it, or is a list as its rows are."""
    known: frozenset[str] = frozenset().union(*form.keys)
    return not known or bool(known & keys) or bool(known & _ANY_LIST and keys & _ANY_LIST)


def _own(name: str) -> Format:
    """A user's function as a format."""
    function = registry.own(name, "data.format")

    def written(row: Row, choices: Choices) -> tuple[Format, Row]:
        return _by_user(row, choices, function, name)

    def convert(row: Row, choices: Choices) -> Sequence[Conversation]:
        form, row = written(row, choices)
        return form.convert(row, choices)

    return Format(name, (), convert, lambda keys: (), written=written)


def _by_user(row: Row, choices: Choices, function: Callable[[Any], Any], name: str) -> tuple[Format, Row]:
    """The row that a user's function makes of one, and its format."""
    try:
        with user_code(name):
            value = function(row.value)
    except UserCodeError as error:  # it refuses the row, by name
        raise RowError("", shortened(error.brief, 300), "mend it") from error
    if value is None:
        raise LeftOut(f"{name} gave None")
    value, _ = plain(row_fields.ignoring(value, choices.ignore) if choices.ignore else value)
    found, _ = fitting(value)
    if not found:
        raise RowError("", f"{name} gave {described(value)}, no shape that deft knows", "mend it")
    row = replace(row, value=value)
    return the_one(row, found, choices), row
