"""deft: supervised fine-tuning of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deft.dataset.build import encode
    from deft.run.api import train
    from deft.run.train import Run

__all__ = ["Run", "encode", "train"]

HOMES = {"Run": "deft.run.train", "encode": "deft.dataset.build", "train": "deft.run.api"}


def __getattr__(name: str) -> Any:
    """Loads what is asked for when it is asked for: `import deft` alone is quick."""
    if name not in HOMES:
        raise AttributeError(f"module 'deft' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
