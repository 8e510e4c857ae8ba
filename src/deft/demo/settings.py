"""The demo's settings: the size of its vocabulary, and the keys of its two `deft.train` calls."""

from collections.abc import Mapping
from types import MappingProxyType

VOCAB_SIZE = 1024
"""At most: the text has fewer pieces. Every name is one token, which this small a model needs to know people apart."""

BASE: Mapping[str, object] = MappingProxyType(
    {
        "epochs": 2,
        "batch__examples": 32,
        "optimizer__lr": 4e-3,
        "max_length": 256,
        "precision": "fp32",
    }
)
"""Random weights and `World.texts` -> a base model that knows everybody and cannot answer."""

CHAT: Mapping[str, object] = MappingProxyType(
    {
        "epochs": 4,
        "batch__examples": 16,
        "optimizer__lr": 5e-4,
        "max_length": 256,
        "precision": "fp32",
    }
)
"""That base and `World.dialogues` -> a model that answers. A higher rate learns the taught people by heart instead."""
