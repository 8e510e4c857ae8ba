"""One error tree: every error says what, where and what to do, and carries the exit code of its kind."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any


class DeftError(Exception):
    """An error that a user can act on; the command line prints its text without a traceback."""

    exit_code = 70


class InputError(DeftError):
    """Wrong input or configuration."""

    exit_code = 2


class UserCodeError(InputError):
    """A function of the user's raised: which, what, and the traceback from its first line on.

    It has the exit code of wrong input, as it is mended in what the user gave: 70 would send them to look for a bug in
    deft, and 75 would have the run started again, to end in the same way.

    brief  one line: the error, and the line of code that raised it
    """

    def __init__(self, text: str, brief: str) -> None:
        super().__init__(text)
        self.brief = brief

    def __reduce__(self) -> tuple[Any, ...]:
        return UserCodeError, (str(self), self.brief)


_BETWEEN = ("importlib", os.path.join("torch", "autograd"))
"""What calls a user's code on our behalf; not shown in its traceback."""


@contextmanager
def user_code(name: str) -> Iterator[None]:
    """Whatever the body raises is an error of the user's function `name`: UserCodeError.

    The body is one call. `sys.exit` in it is an error like any other; Ctrl-C and signals pass.

    >>> try:
    ...     with user_code("metric_fn"):
    ...         int("one")
    ... except UserCodeError as error:
    ...     print(error)
    metric_fn raised ValueError: invalid literal for int() with base 10: 'one'
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        ours = 2  # frames: this one, and the one that calls the user's
        found = traceback.extract_tb(error.__traceback__)[ours:]
        frames = [each for each in found if not any(between in each.filename for between in _BETWEEN)]
        what = f"{name} raised {''.join(traceback.format_exception_only(error)).strip()}"
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        text = "\n".join([what, *traceback.format_list(frames)])
        raise UserCodeError(text.rstrip(), " ".join(what.split()) + place) from error


class DamagedError(DeftError):
    """A file that deft wrote is missing, or is not what it wrote."""

    exit_code = 3


class LostProcessError(DeftError):
    """A process of this run was killed, or is gone.

    rank     of several that compute the run, the one that failed first
    speaker  the one that says so
    """

    exit_code = 6
    rank: int | None = None
    speaker = 0


class DiskError(DeftError):
    """Something could not be written."""

    exit_code = 4


class NumbersError(DeftError):
    """A loss or gradient is not finite; no weight was changed."""

    exit_code = 5


class MemoryShort(DeftError):
    """The run does not fit into the memory of this machine."""

    exit_code = 7


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in the input: where it stands, what it is, what to do about it.

    others  how many places have it beside this one, of which `also` are the first

    >>> str(Problem("train.jsonl:4", "messages[1].role: 'asistant' is not a role", "did you mean 'assistant'?"))
    "train.jsonl:4: messages[1].role: 'asistant' is not a role; did you mean 'assistant'?"
    >>> str(Problem("a.jsonl:4", "no answer", "add one", others=3, also=("a.jsonl:7",)))
    'a.jsonl:4: no answer; add one (and 3 more: a.jsonl:7, ...)'
    """

    where: str
    what: str
    fix: str = ""
    others: int = 0
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        places = ", ".join(self.also + (("...",) if self.others > len(self.also) else ()))
        more = f" (and {self.others} more: {places})" if self.others else ""
        text = f"{self.where}: {self.what}" + (f"; {self.fix}" if self.fix else "") + more
        return text.replace("\n", "\\n")  # in a name, or in what a template says: a problem is one line


SHOWN_PROBLEMS, SHOWN_PLACES = 20, 4
_ROW = re.compile(r":\d+( \(row \d+\))?$")
_PARTICULAR = re.compile(r"\d+|'[^']*[^\w'][^']*'|\"[^\"]*[^\w\"][^\"]*\"")


def kind_of_problem(text: str) -> str:
    """What is said of many rows alike: numbers and quoted text, but for single words, are of each row alone.

    >>> kind_of_problem("messages[3]: 'Hi there' is dropped") == kind_of_problem("messages[1]: 'So, what' is dropped")
    True
    """
    return _PARTICULAR.sub("#", text)


def grouped(problems: Iterable[Problem]) -> list[Problem]:
    """Problems of rows that are of one kind as one: the first of them, with the places of the others.

    >>> [str(each) for each in grouped([Problem("a:1", "no"), Problem("a:2", "bad"), Problem("a:3", "no")])]
    ['a:1: no (and 1 more: a:3)', 'a:2: bad']
    """
    found: dict[str, Problem] = {}
    for each in problems:
        place = "" if _ROW.search(each.where) else each.where
        key = f"{place}: {kind_of_problem(f'{each.what}; {each.fix}')}"
        first = found.setdefault(key, each)
        if first is not each:
            also = (*first.also, each.where, *each.also)[: SHOWN_PLACES - 1]
            found[key] = replace(first, others=first.others + 1 + each.others, also=also)
    return [*found.values()]


class Problems(InputError):
    """Several problems at once: those of one kind in a line, the first twenty lines written out, the rest counted.

    more  how many there are beyond `problems`
    """

    def __init__(self, heading: str, problems: Sequence[Problem], more: int = 0) -> None:
        self.heading = heading
        self.problems = tuple(problems)
        self.more = more
        shown = grouped(problems)
        hidden = sum(1 + each.others for each in shown[SHOWN_PROBLEMS:]) + more
        lines = [heading, *(f"  {problem}" for problem in shown[:SHOWN_PROBLEMS])]
        super().__init__("\n".join(lines + ([f"  ... and {hidden} more"] if hidden > 0 else [])))

    def __reduce__(self) -> tuple[Any, ...]:
        return Problems, (self.heading, self.problems, self.more)


def collect(heading: str, checks: Iterable[Callable[[], Any]]) -> list[Any]:
    """The results of all checks in order; what they object to comes in one error.

    >>> collect("this cannot be:", [lambda: 1, lambda: 2])
    [1, 2]
    """
    results: list[Any] = []
    problems: list[Problem] = []
    more = 0
    for check in checks:
        try:
            results.append(check())
        except Problems as error:
            problems += error.problems
            more += error.more
        except InputError as error:
            where, _, what = str(error).partition(": ")
            problems.append(Problem(where, what))
    if problems:
        raise Problems(heading, problems, more)
    return results
