"""What a model's config tells without its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig

from deft.model import multimodal
from deft.model.load import Base
from deft.model.selftest import unpackable


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """parameters, tied ones once; why documents will run one at a time, as far as the config tells, else nothing."""

    parameters: int
    against_packing: str

    def state_bytes(self, dtype: torch.dtype) -> int:
        """What full fine-tuning keeps per parameter: fp32 master, gradient, two moments, and a copy to compute with.

        Activations come on top.
        """
        copy = 0 if dtype == torch.float32 else dtype.itemsize
        return self.parameters * (4 * 4 + copy)


def summarise(base: Base) -> ModelSummary:
    """The model as its config describes it, made without memory for its weights."""
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    with torch.device("meta"):
        # The attention is named so that a config.json cannot choose one, as in `load`.
        model = multimodal.auto_class(config).from_config(config, attn_implementation="eager", trust_remote_code=False)
    return ModelSummary(sum(parameter.numel() for parameter in model.parameters()), unpackable(model))
