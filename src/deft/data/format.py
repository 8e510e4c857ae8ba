"""What a format is, what a source chooses for it, and which format reads a row; the folder `formats` is the registry.

A format is a module with `KEYS`, the sets of fields that make a row its own, and `convert`, from a row to its
conversations. It may have `left_out`, for rows that others make needless, with `compared`, which gives what `left_out`
needs of a row; and `OPTIONS`, the choices of a source that it knows. A user's own format is a function named
`pkg.mod:fn`: from a row to a row in a shape deft reads, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, Literal

from deft.core import registry
from deft.core.errors import UserCodeError, user_code
from deft.core.types import Conversation, Row
from deft.data import formats
from deft.data.fields import LeftOut, RowError, described, shortened, weight_of

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

    columns         what a format calls a field -> what the rows call it; no other field is read then
    answers         of several answers to one prompt: the best one, or all good ones; None is the format's own default
    control         text before good and bad answers
    split           rows that name another split are left out; None reads all
    names_split     whether the user named the split: then the source must have splits
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    answers: Answers | None = None
    control: Control | None = None
    split: str | None = None
    names_split: bool = False

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


@dataclass(frozen=True, slots=True)
class Format:
    """One module of the folder `formats`, or a user's function.

    keys      fields that make a row this format's, any of these sets; strings and lists have names in angle brackets
    convert   a row -> its conversations; raises RowError and LeftOut
    left_out  which sound rows of a source are not learnt because of others, and why
    compared  what `left_out` needs of a row, as a row
    options   the choices of a source that have a meaning here
    """

    name: str
    keys: tuple[frozenset[str], ...]
    convert: Callable[[Row, Choices], Sequence[Conversation]]
    left_out: Callable[[Sequence[Row], Choices], Mapping[int, str]] | None = None
    compared: Callable[[Row], Row] | None = None
    options: frozenset[str] = frozenset()

    def claim(self, keys: frozenset[str]) -> frozenset[str]:
        """The fields of a row that this format reads it by; none where it does not."""
        return frozenset().union(*(known for known in self.keys if known <= keys))

    def read(self, row: Row, choices: Choices) -> tuple[Conversation, ...]:
        """The conversations of a row with the row's own weight; raises RowError and LeftOut."""
        if not _is_near(self, keys_of(row.value)):
            raise RowError("", f"has {described(row.value)}, not {self.name}", "mend or remove the row")
        found = tuple(self.convert(row, choices))
        if not isinstance(row.value, dict) or row.value.get("loss_weight") is None:
            return found
        weight = weight_of(row.value["loss_weight"], "loss_weight") or 0.0
        return tuple(replace(each, weight=weight) for each in found)


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
    return Format(name, keys, module.convert, options=options, **more)


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


def keys_of(value: Any) -> frozenset[str]:
    """The fields of a row by which its format is found; strings and lists have names of their own.

    >>> sorted(keys_of({"a": 1, "b": 2})), sorted(keys_of(["p", "o"]))
    (['a', 'b'], ['<list of text>'])
    """
    if isinstance(value, dict):
        return frozenset(value)
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, list | tuple):
        return _LISTS.get(type(value[0]), _OTHER_LIST) if value else _OTHER_LIST
    return frozenset()


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
    return Format(name, (), lambda row, choices: _by_user(row, choices, function, name))


def _by_user(row: Row, choices: Choices, function: Callable[[Any], Any], name: str) -> Sequence[Conversation]:
    try:
        with user_code(name):
            value = function(row.value)
    except UserCodeError as error:  # it refuses the row, by name
        raise RowError("", shortened(error.brief, 300), "mend it") from error
    if value is None:
        raise LeftOut(f"{name} gave None")
    found = reading(keys_of(value))
    if len(found) != 1:
        readings = " and as ".join(form.name for form in found) or "no shape that deft knows"
        raise RowError("", f"{name} gave {described(value)}, which reads as {readings}", "mend it")
    return found[0].convert(replace(row, value=value), choices)
