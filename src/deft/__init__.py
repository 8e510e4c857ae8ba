"""deft: supervised fine-tuning of language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deft.api import train
    from deft.dataset.build import encode

__all__ = ["encode", "train"]


def __getattr__(name: str) -> Any:
    """Loads what is asked for when it is asked for: `import deft` alone is quick."""
    if name == "train":
        from deft.api import train

        return train
    if name == "encode":
        from deft.dataset.build import encode

        return encode
    raise AttributeError(f"module 'deft' has no attribute {name!r}")
