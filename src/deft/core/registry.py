"""The folder is the registry: `loss/dft.py` is `loss.name: dft`. Nothing is listed anywhere else.

A room is a package, given as the imported module: a folder that moves takes its name with it, or the import fails.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from deft.core.errors import InputError, UserCodeError, user_code


def names(room: ModuleType) -> list[str]:
    """The modules of a package, sorted; those that begin with an underscore are not for users.

    >>> from deft.training import loss
    >>> "nll" in names(loss)
    True
    """
    return sorted(each.name for each in pkgutil.iter_modules(room.__path__) if not each.name.startswith("_"))


def load(room: ModuleType, name: str, key: str) -> ModuleType:
    """The module `name` of a package. InputError names the closest, or all there are.

    key  the configuration's, for the error

    >>> from deft.training import optim
    >>> load(optim, "adam", "optimizer.name")
    Traceback (most recent call last):
    deft.core.errors.InputError: optimizer.name: 'adam' is not there; did you mean 'adamw'?
    """
    known = names(room)
    if name not in known:
        hint = closest(name, known) or f"there is {', '.join(known)}"
        raise InputError(f"{key}: {name!r} is not there; {hint}")
    return import_module(f"{room.__name__}.{name}")


def is_own(name: str) -> bool:
    """Whether a name is the import path of a user's own function.

    >>> is_own("my_pkg.my_mod:fn"), is_own("nll")
    (True, False)
    """
    return ":" in name


def own(name: str, key: str) -> Callable[..., Any]:
    """What `pkg.mod:fn` names. InputError where it cannot be imported or called, or where importing it raises.

    >>> own("math:sqrt", "data.format")(9.0)
    3.0
    >>> own("math:sqr", "data.format")
    Traceback (most recent call last):
    deft.core.errors.InputError: data.format: math has no function 'sqr'; did you mean 'sqrt'?
    """
    path, _, attribute = name.partition(":")
    try:
        with user_code(f"{key}: importing {path}"):
            module = import_module(path)
    except UserCodeError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{path}.".startswith(f"{missing.name}."):
            raise InputError(f"{key}: {name!r} cannot be imported ({missing}); is it on PYTHONPATH?") from missing
        raise
    found = getattr(module, attribute, None)
    if not callable(found):
        functions = [each for each in dir(module) if each[0] != "_" and callable(getattr(module, each))]
        fix = closest(attribute, functions) or f"it has {', '.join(functions) or 'none'}; name one as {path}:fn"
        raise InputError(f"{key}: {path} has no function {attribute!r}; {fix}")
    return found


def closest(name: str, known: Iterable[str], meant: Mapping[str, str] | None = None) -> str:
    """A question that names the one of `known` that is most like `name`, or "" where none is like it.

    meant  what to call it in the question, by the known name

    >>> closest("adamv", ["adamw", "sgd"]), closest("lion", ["adamw", "sgd"])
    ("did you mean 'adamw'?", '')
    """
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {meant[near[0]] if meant else near[0]!r}?" if near else ""
