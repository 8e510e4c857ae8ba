"""`adapter`, `quantize` and `freeze` in the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from deft.core.config import Pattern, Section
from deft.core.errors import InputError

VIRTUAL = ("prompt", "prefix")
"""Adapters that are virtual tokens, which cannot be merged into the base."""


class AdapterConfig(Section):
    """Narrow products beside frozen linear layers: y = W x + scale * B A x; A [r, in] and B [out, r] are learnt.

    Or virtual tokens in front of every document: with prompt their embeddings are learnt (arXiv 2104.08691), with
    prefix their keys and values in each layer (arXiv 2101.00190). `tokens` is then their number, and all other
    settings but `start` are those of products.

    name     lora (scale = alpha / r, arXiv 2106.09685), rslora (alpha / sqrt(r), arXiv 2312.03732), dora (W + B A with
             lengths of its rows that are learnt, arXiv 2402.09353)
    dropout  of what A is given
    target   all-linear: every linear layer but the head; or names of modules, or one regular expression for whole names
    init     of A, as peft names it; B begins at zero
    ranks    pattern of a module's name -> its r, and alphas -> its alpha, in place of the common ones
    start    the folder of an adapter in peft's form to go on from, with its settings; model=FOLDER finds its base too
    """

    name: Literal["lora", "rslora", "dora", "prompt", "prefix"] = "lora"
    tokens: int = Field(10, ge=1)
    r: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target: Literal["all-linear"] | str | tuple[str, ...] = "all-linear"
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    ranks: dict[Pattern, int] = Field({})
    alphas: dict[Pattern, float] = Field({})
    start: str | None = None

    @property
    def is_virtual(self) -> bool:
        """Whether virtual tokens are learnt."""
        return self.name in VIRTUAL

    @model_validator(mode="after")
    def _has_an_effect(self) -> AdapterConfig:
        idle = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        idle = [name for name in idle if name not in ("name", "start") and (name == "tokens") != self.is_virtual]
        if idle:
            raise ValueError(f"{idle[0]} has no effect with name={self.name}; leave it out")
        return self


Quantize = Literal["off", "nf4", "int8"]
"""What linear layers of a frozen base are kept in."""

FILE = "adapter_config.json"
"""What describes an adapter in peft's form."""


def of_folder(folder: Path) -> dict[str, Any]:
    """The settings of `AdapterConfig` to go on from an adapter in peft's form.

    Raises InputError where it is no adapter of a kind that deft trains.
    """
    path, values = folder / FILE, described(folder)
    if is_virtual(folder):
        return {
            "name": _VIRTUAL[values["peft_type"]],
            "tokens": int(values["num_virtual_tokens"]),
            "start": str(folder),
        }
    if values.get("trainable_token_indices"):
        what = "has rows of new tokens, which need its own vocabulary"
        raise InputError(f"{path}: {what}; name the final/ of its run as model")
    odd = [key for key, usual in _USUAL.items() if values.get(key, usual) not in (usual, None)]
    if not odd and str(values.get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE):
        odd = ["init_lora_weights"]
    if odd:
        fix = "merge=true adds it to its base first, if peft can"
        raise InputError(f"{path}: {odd[0]}: {values[odd[0]]!r} is not trained by deft; {fix}")
    try:
        rank = int(values["r"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not the description of a LoRA adapter; save it with peft again") from error
    name = "dora" if values.get("use_dora") else "rslora" if values.get("use_rslora") else "lora"
    target = values.get("target_modules")
    return {
        "name": name,
        "r": rank,
        "alpha": float(values.get("lora_alpha", 8)),
        "dropout": float(values.get("lora_dropout") or 0.0),
        "target": target if isinstance(target, str) else tuple(target or ()),
        "ranks": values.get("rank_pattern") or {},
        "alphas": values.get("alpha_pattern") or {},
        "start": str(folder),
    }


_VIRTUAL = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
"""What peft calls the kinds of virtual tokens."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone, with no weights of a model."""
    own = ("model*.safetensors", "pytorch_model*.bin")
    return (folder / FILE).is_file() and not any(next(folder.glob(pattern), None) for pattern in own)


def is_virtual(folder: Path) -> bool:
    """Whether an adapter in peft's form is of virtual tokens of a kind that deft trains."""
    values = described(folder)
    is_whole = isinstance(values.get("num_virtual_tokens"), int) and not values.get("prefix_projection")
    return values.get("peft_type") in _VIRTUAL and is_whole


def described(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises InputError where it cannot be read."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {**values}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / FILE}: is not the description of an adapter; save it with peft again") from error


def base_of(folder: Path, key: str) -> str:
    """The hub id or folder of the base model that an adapter names. Raises InputError where that is not here.

    key  the one that names the adapter beside `model`
    """
    base = str(described(folder).get("base_model_name_or_path") or "")
    is_path = base.startswith((".", "/", "~")) or base.count("/") > 1
    if base and (not is_path or Path(base).expanduser().is_dir()):
        return base
    what = f"its base model, {base}, is not here" if base else "it does not say what its base model is"
    raise InputError(f"{folder / FILE}: {what}; name both: model=BASE {key}={folder}")


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

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of inits after which the base's weights are others than those in its folder."""


class FreezeConfig(Section):
    """What stays as it is in the base model.

    names            regular expressions: parameters in whose names one is found
    unfrozen_layers  trlx's num_layers_unfrozen: this many layers from the top are trained, and the head unless it is
                     tied to the embeddings, which are frozen; with 0 the head is frozen as well
    """

    names: tuple[Pattern, ...] = ()
    unfrozen_layers: int | None = Field(None, ge=0)
