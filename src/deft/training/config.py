"""`optimizer`, `loss` and `checkpoint` in the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from deft.core.config import Pattern, Section


class OptimizerConfig(Section):
    """The update rule: a name of training/optim/, or the import path of a torch optimizer, as torch.optim:NAdam.

    options  numbers that the rule of that name takes beside these, as {momentum: 0.9}
    rates  regular expression -> multiple of lr, for the parameters in whose names it is found; the first counts.
           {lora_B: 16} is LoRA+ (arXiv 2402.12354)
    """

    name: str = "adamw"
    lr: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip: float | None = Field(1.0, gt=0)
    options: dict[str, Any] = Field({})
    rates: dict[Pattern, Annotated[float, Field(gt=0)]] = Field({})


class LossConfig(Section):
    """What is minimised. options: numbers that the loss of that name takes, as {epsilon: 0.1}."""

    name: str = "nll"
    options: dict[str, float] = Field({})
    normalize: Literal["tokens", "examples"] = "tokens"


class CheckpointConfig(Section):
    """Every `every` steps and at the end, null for never. What stays: the last `keep`, the best `keep_best` by held-out
    loss, and each of every `keep_every` steps."""

    every: int | None = Field(500, ge=1)
    keep: int = Field(2, ge=1)
    keep_best: int = Field(0, ge=0)
    keep_every: int | None = Field(None, ge=1)
