"""`optimizer`, `loss` and `checkpoint` in the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deft.core.config import OrOff, Pattern, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """The update rule: a name of training/optim/, or the import path of a torch optimizer, as torch.optim:NAdam.

    options  numbers that the rule of that name takes beside these, as {momentum: 0.9}
    rates  regular expression -> multiple of lr, for the parameters in whose names it is found; the first counts.
           {lora_B: 16} is LoRA+ (arXiv 2402.12354)
    """

    name: str = "adamw"
    lr: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip: Annotated[float | None, Field(gt=0), OrOff] = 1.0
    options: dict[str, Any] = Field({})
    rates: dict[Pattern, Annotated[float, Field(gt=0)]] = Field({})


class LossConfig(Section):
    """What is minimised. options: numbers that the loss of that name takes, as {epsilon: 0.1}."""

    name: str = "nll"
    options: dict[str, float] = Field({})
    normalize: Literal["tokens", "examples"] = "tokens"


class CheckpointConfig(Section):
    """Every `every` steps and at the end, null for never. What stays: the last `keep`, the best `keep_best` by held-out
    loss, the first of which becomes the model, and each of every `keep_every` steps."""

    every: Annotated[int | None, Field(ge=1), OrOff] = 500
    keep: int = Field(2, ge=1)
    keep_best: int = Field(0, ge=0)
    keep_every: Annotated[int | None, Field(ge=1), OrOff] = None

    @field_validator("keep_best", mode="before")
    @classmethod
    def _the_best(cls, value: Any) -> Any:
        return 1 if value is True else value

    @model_validator(mode="after")
    def _has_checkpoints(self) -> CheckpointConfig:
        if self.keep_best and self.every is None:
            raise ValueError("keep_best: the best is one of the checkpoints, and every: null saves none")
        return self
