"""The versions of what results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("deft-sft", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def installed() -> dict[str, str]:
    """Python's and the packages' versions.

    >>> sorted(installed())[0]
    'deft-sft'
    """
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
