"""`adapter` and `freeze` in the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from deft.core.config import Pattern, Section
from deft.core.errors import InputError


class AdapterConfig(Section):
    """Narrow products beside frozen linear layers: y = W x + scale * B A x; A [r, in] and B [out, r] are learnt.

    name     lora (scale = alpha / r, arXiv 2106.09685), rslora (alpha / sqrt(r), arXiv 2312.03732), dora (W + B A with
             lengths of its rows that are learnt, arXiv 2402.09353)
    dropout  of what A is given
    target   all-linear: every linear layer but the head; or names of modules, or one regular expression for whole names
    init     of A, as peft names it; B begins at zero
    ranks    pattern of a module's name -> its r, and alphas -> its alpha, in place of the common ones
    start    the folder of an adapter in peft's form to go on from; model=FOLDER says the same with all of its settings
    """

    name: Literal["lora", "rslora", "dora"] = "lora"
    r: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target: Literal["all-linear"] | str | tuple[str, ...] = "all-linear"
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    ranks: dict[Pattern, int] = Field({})
    alphas: dict[Pattern, float] = Field({})
    start: str | None = None


def of_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """The base model that an adapter in peft's form names, and the settings of `AdapterConfig` to go on from it.

    Raises InputError where it is no adapter of a kind that deft trains.
    """
    path = folder / "adapter_config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        rank, base = int(described["r"]), str(described["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not the description of a LoRA adapter; save it with peft again") from error
    odd = [key for key, usual in _USUAL.items() if described.get(key, usual) not in (usual, None)]
    if odd:
        fix = "merge it with peft (merge_and_unload) and name the merged folder"
        raise InputError(f"{path}: {odd[0]}: {described[odd[0]]!r} is not trained by deft; {fix}")
    name = "dora" if described.get("use_dora") else "rslora" if described.get("use_rslora") else "lora"
    target = described.get("target_modules")
    return base, {
        "name": name,
        "r": rank,
        "alpha": float(described.get("lora_alpha", 8)),
        "dropout": float(described.get("lora_dropout") or 0.0),
        "target": target if isinstance(target, str) else tuple(target or ()),
        "ranks": described.get("rank_pattern") or {},
        "alphas": described.get("alpha_pattern") or {},
        "start": str(folder),
    }


_USUAL = {
    "peft_type": "LORA",
    "bias": "none",
    "modules_to_save": None,
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": None,
}
"""What is not as usual in an adapter's description is of a kind that is not trained here."""


class FreezeConfig(Section):
    """What stays as it is in the base model.

    names            regular expressions: parameters in whose names one is found
    unfrozen_layers  trlx's num_layers_unfrozen: this many layers from the top are trained, and the head unless it is
                     tied to the embeddings, which are frozen; with 0 the head is frozen as well
    """

    names: tuple[Pattern, ...] = ()
    unfrozen_layers: int | None = Field(None, ge=0)
