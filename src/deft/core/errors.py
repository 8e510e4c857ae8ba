"""One error tree: every error says what, where and what to do, and carries the exit code of its kind."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    """A process of this run was killed, or is gone."""

    exit_code = 6


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

    >>> str(Problem("train.jsonl:4", "messages[1].role: 'asistant' is not a role", "did you mean 'assistant'?"))
    "train.jsonl:4: messages[1].role: 'asistant' is not a role; did you mean 'assistant'?"
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.fix}" if self.fix else "")


SHOWN_PROBLEMS = 20


class Problems(InputError):
    """Several problems at once: the first twenty are written out, the rest counted.

    more  how many there are beyond `problems`
    """

    def __init__(self, heading: str, problems: Sequence[Problem], more: int = 0) -> None:
        self.heading = heading
        self.problems = tuple(problems)
        self.more = more
        hidden = len(self.problems) + more - SHOWN_PROBLEMS
        lines = [heading, *(f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS])]
        super().__init__("\n".join(lines + ([f"  ... and {hidden} more"] if hidden > 0 else [])))

    def __reduce__(self) -> tuple[Any, ...]:
        return Problems, (self.heading, self.problems, self.more)
