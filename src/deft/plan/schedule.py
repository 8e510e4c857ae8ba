"""Step -> what the learning rate is multiplied by. Pure functions of the step and the run's length."""

from __future__ import annotations

import math
from typing import Literal

Name = Literal["cosine", "linear", "constant", "wsd"]


def warmup_steps(warmup: float, total: int) -> int:
    """A share of the run below 1, a number of steps from 1 on.

    >>> warmup_steps(0.03, 100), warmup_steps(10, 100)
    (3, 10)
    """
    return min(total, round(warmup * total) if warmup < 1 else int(warmup))


def lr_multiplier(name: Name, step: int, total: int, warmup: float = 0.0, decay: float = 0.2) -> float:
    """The factor of step `step` (from 0) in a run of `total` steps.

    Warm-up rises by equal parts and reaches 1 at the first step after it, so no step is lost at 0. Then `cosine` and
    `linear` fall towards 0, `wsd` (warm-up, stable, decay) stays at 1 and falls linearly over the last `decay` share.
    Without warm-up, cosine and linear are those of transformers' `get_cosine_schedule_with_warmup` and its linear one.

    >>> [round(lr_multiplier("linear", step, 6, warmup=2), 2) for step in range(6)]
    [0.33, 0.67, 1.0, 0.75, 0.5, 0.25]
    """
    rising = warmup_steps(warmup, total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if name == "constant":
        return 1.0
    if name == "wsd":
        falling = max(1, round(decay * total))
        return min(1.0, (total - step) / falling)
    progress = (step - rising) / max(1, total - rising)
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if name == "cosine" else 1.0 - progress
