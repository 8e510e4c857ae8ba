"""What training changes. It has one owner: the loop."""

from __future__ import annotations

from dataclasses import dataclass

from deft.model.learner import Learner
from deft.optim.adamw import AdamW


@dataclass
class TrainState:
    """step counts the optimizer steps that are done."""

    learner: Learner
    optimizer: AdamW
    step: int = 0
