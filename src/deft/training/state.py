"""What training changes. It has one owner: the loop."""

from __future__ import annotations

from dataclasses import dataclass

from deft.model.learner import Learner
from deft.optim.adamw import AdamW


@dataclass
class TrainState:
    """step counts the optimizer steps that are done, skipped those among them that changed nothing."""

    learner: Learner
    optimizer: AdamW
    step: int = 0
    skipped: int = 0

    def skip(self) -> None:
        """Goes past a step that cannot be done."""
        self.step += 1
        self.skipped += 1
