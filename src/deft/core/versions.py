"""The versions of what results depend on, and the oldest that deft runs on."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version

from deft.core.errors import InputError

PACKAGES = ("deft-sft", "torch", "transformers", "tokenizers", "safetensors", "numpy")

MIN_VERSIONS = {"torch": "2.11", "transformers": "5.12", "jinja2": "3.1.6"}
"""As in pyproject.toml: older ones have known holes, or lack what is needed. A package can be downgraded later."""


def installed() -> dict[str, str]:
    """Python's and the packages' versions.

    >>> sorted(installed())[0]
    'deft-sft'
    """
    return {"python": platform.python_version(), **{name: _found(name) or "not installed" for name in PACKAGES}}


def own() -> str:
    """deft's own version."""
    return _found("deft-sft") or "unknown: not installed"


def check_min_versions() -> None:
    """Raises InputError, in one line, where a package is missing or too old. Imports none of them."""
    wrong = [
        f"{name} {found or 'missing'} (at least {least})"
        for name, least in MIN_VERSIONS.items()
        if (found := _found(name)) is None or _numbers(found) < _numbers(least)
    ]
    if wrong:
        fix = " ".join(f"'{name}>={least}'" for name, least in MIN_VERSIONS.items())
        raise InputError(f"this Python: {', '.join(wrong)}; pip install {fix}")


def _found(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(release: str) -> tuple[int, ...]:
    """
    >>> _numbers("2.13.0+cpu"), _numbers("5.12.0rc1") < _numbers("5.13")
    ((2, 13, 0), True)
    """
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[+a-z]", release)[0]))
