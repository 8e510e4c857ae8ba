"""Micro-batches of several lengths, and a tiny Llama that computes them packed."""

from __future__ import annotations

from typing import Any

import architectures
import numpy as np
import torch
from states import state_around

from deft.core.types import MicroBatch
from deft.model import attention
from deft.model.causal_lm import CausalLM
from deft.model.checkpointing import Checkpointing
from deft.plan.loader import build
from deft.training.state import TrainState

LENGTHS = [[40, 25], [33, 20, 9], [60, 5], [30, 10, 20, 5], [1 + 12, 50], [9, 8, 7, 6, 5, 4], [50], [2, 2, 2]]


def micro_batches() -> list[MicroBatch]:
    draw = np.random.default_rng(0)
    return [
        build([(draw.integers(3, 130, length), (np.arange(length) > 0).astype(np.float32)) for length in lengths])
        for lengths in LENGTHS
    ]


def model(name: str = "llama_tied") -> Any:
    own = architectures.build(name).eval()
    own.set_attn_implementation(attention.NAME)
    return own


def state_of(name: str = "llama_tied", checkpointing: Checkpointing = "none") -> TrainState:
    causal_lm = CausalLM(model(name), "packed", checkpointing=checkpointing)
    return state_around(causal_lm, torch.float32)
