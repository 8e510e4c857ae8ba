"""What training changes, around a model made by a test."""

from __future__ import annotations

from typing import Any

import torch

from deft.model.causal_lm import CausalLM
from deft.training.masters import Masters
from deft.training.optim.adamw import AdamW
from deft.training.state import TrainState


def state_around(causal_lm: CausalLM, dtype: torch.dtype = torch.float32, **settings: Any) -> TrainState:
    masters = Masters(causal_lm.model.named_parameters(), dtype)
    return TrainState(causal_lm, masters, AdamW(masters, **settings))
