"""deft: supervised fine-tuning of language models.

deft.train     a model and data -> a trained Hugging Face folder
deft.encode    rows -> ids, labels and weights, for any trainer
deft.collator  encoded rows -> padded batches
deft.Run       what `train` gives
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deft.dataset.build import encode
    from deft.run.api import train
    from deft.run.train import Run
    from deft.training.collator import collator

    __version__: str

__all__ = ["Run", "__version__", "collator", "encode", "train"]

HOMES = {
    "Run": "deft.run.train",
    "collator": "deft.training.collator",
    "encode": "deft.dataset.build",
    "train": "deft.run.api",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for when it is asked for: `import deft` alone is quick."""
    if name == "__version__":
        return import_module("deft.core.versions").own()
    if name not in HOMES:
        raise AttributeError(f"module 'deft' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
