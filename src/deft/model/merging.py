"""An adapter that somebody has trained, of any kind that peft can merge, becomes part of its base's weights."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deft.core.errors import InputError
from deft.model import adapters
from deft.model.config import described, is_adapter, is_virtual

DRAWN_ANEW = ("pissa_niter", "corda", "loftq", "lora_ga")
"""Beginnings of inits that change the base's weights by what no file holds; peft itself cannot load such an adapter."""


TOLERANCE = 1e-3
"""Largest ||a - b|| / ||b|| of the logits of an adapter that is merged and of one beside its base, both in fp32."""


def check(folder: Path) -> None:
    """Raises InputError where a folder holds no adapter that can be merged, as far as its files tell."""
    if not is_adapter(folder):
        raise InputError(f"merge: {folder} is no adapter in peft's form; name a folder that has an adapter_config.json")
    if not (folder / adapters.WEIGHTS).is_file():
        raise InputError(f"merge: {folder} has no {adapters.WEIGHTS}; save it with peft's save_pretrained")
    values = described(folder)
    if is_virtual(folder):
        raise InputError(
            f"merge: {folder} holds virtual tokens, which cannot be merged; model={folder} goes on with them"
        )
    if values.get("trainable_token_indices"):
        what = "has rows of new tokens, which need its own vocabulary"
        raise InputError(f"merge: {folder} {what}; name the final/ of its run as model")
    init = str(values.get("init_lora_weights"))
    if init.startswith(DRAWN_ANEW):
        what = f"init_lora_weights {init!r} changes base weights by what the folder does not hold"
        raise InputError(f"merge: {folder}: {what}; convert it with peft (path_initial_model_for_weight_conversion)")


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter of a folder added to its weights, in their dtype; what is frozen stays frozen.

    Raises InputError where peft is not installed or cannot merge the adapter, or it is not for this model.
    """
    check(folder)
    peft = adapters.imported_peft("merge")
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    is_tied = _is_tied(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys, which _stop_if_odd makes an error
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
        own = [peft.get_peft_model_state_dict(adapted, save_embedding_layers=each).keys() for each in (False, True)]
        _stop_if_odd(folder, *own)
        before = _glimpse(adapted.eval())
        merged: Any = adapted.merge_and_unload()
    except (
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
        RuntimeError,
        SafetensorError,
        OSError,
    ) as error:
        what = " ".join(str(error).split())[:300]
        raise InputError(f"merge: {folder} cannot be added to {model.name_or_path}: {what}") from error
    if _is_tied(merged) != is_tied:
        what = "it trained one of embeddings and head, which its base ties"
        raise InputError(f"merge: {folder}: {what}; merge it with peft and save the model untied")
    if not (off := float((_glimpse(merged) - before).norm() / before.norm())) <= TOLERANCE:
        what = f"merged it gives other logits than beside its base, by {off:.1e}: it changes a weight that has two uses"
        raise InputError(f"merge: {folder}: {what}; merge it with peft into a model that is saved untied")
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(name in trained)
    return merged


@torch.no_grad()
def _glimpse(model: Any) -> Tensor:
    """The logits of a few tokens, fp32."""
    size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(size, (1, 16), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.float()


def _stop_if_odd(folder: Path, least: Collection[str], most: Collection[str]) -> None:
    """peft only warns of weights that are missing in a file, and leaves out those that it does not know.

    least, most  names in a file without, and with, the base weights of embeddings that have an adapter
    """
    found = load_file(folder / adapters.WEIGHTS).keys()
    if odd := sorted((found - set(most)) | (set(least) - found)):
        raise ValueError(f"{odd[0]} is not what this base model and adapter_config.json ask for")


def _is_tied(model: PreTrainedModel) -> bool:
    ends: list[nn.Module | None] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return len({id(getattr(each, "weight", None)) for each in ends}) == 1
