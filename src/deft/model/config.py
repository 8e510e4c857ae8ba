"""`adapter` and `freeze` in the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deft.core.config import Pattern, Section


class AdapterConfig(Section):
    """Narrow products beside frozen linear layers: y = W x + scale * B A x; A [r, in] and B [out, r] are learnt.

    name     lora (scale = alpha / r, arXiv 2106.09685), rslora (alpha / sqrt(r), arXiv 2312.03732), dora (W + B A with
             lengths of its rows that are learnt, arXiv 2402.09353)
    dropout  of what A is given
    target   all-linear: every linear layer but the head; or names of modules, or one regular expression for whole names
    init     of A, as peft names it; B begins at zero
    ranks    pattern of a module's name -> its r, and alphas -> its alpha, in place of the common ones
    """

    name: Literal["lora", "rslora", "dora"] = "lora"
    r: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target: Literal["all-linear"] | str | tuple[str, ...] = "all-linear"
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    ranks: dict[Pattern, int] = Field({})
    alphas: dict[Pattern, float] = Field({})


class FreezeConfig(Section):
    """What stays as it is in the base model.

    names            regular expressions: parameters in whose names one is found
    unfrozen_layers  trlx's num_layers_unfrozen: this many layers from the top are trained, and the head unless it is
                     tied to the embeddings, which are frozen; with 0 the head is frozen as well
    """

    names: tuple[Pattern, ...] = ()
    unfrozen_layers: int | None = Field(None, ge=0)
