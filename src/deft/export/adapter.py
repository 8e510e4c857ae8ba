"""A trained adapter leaves in two ways: as a folder of peft's own form, and added to the base weights for `final/`.

adapter/  adapter_config.json  adapter_model.safetensors (fp32)  manifest.json
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deft.core import files
from deft.core.files import Staging
from deft.distributed.owners import Owners
from deft.encoding.tokenizer import Tokenizer
from deft.evaluation import prompt_form
from deft.evaluation.prompt_form import PromptForm
from deft.export import carried
from deft.export.folder import EXPORT_ROWS, TOLERANCE, logits, relative
from deft.export.weights import ExportError, Shared
from deft.model import adapters, quantized, virtual_tokens
from deft.model.config import FILE, AdapterConfig
from deft.training.masters import Masters
from deft.training.pieces import serialised

DEQUANTIZED = {torch.float32: TOLERANCE, torch.bfloat16: 3e-2}
"""Largest ||a - b|| / ||b|| of a row's logits by codes and by the weights made of them, in the dtype of the run."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What adding the adapter to the base weights has changed, on the rows compared: ||a - b|| / ||b|| of their logits
    in fp32, the worst row's.

    effect  of the adapter: the adapted model against its base
    error   the merged model against the adapted one
    lost    the merged model, its weights rounded to `dtype`, against the adapted one
    """

    layers: int
    dtype: str
    effect: float
    error: float
    lost: float

    def __str__(self) -> str:
        """
        >>> str(Merge(168, "bfloat16", 0.4, 1e-7, 0.01))[49:]
        'it moves logits by 0.4; in bfloat16 2.5% of that is lost (export.dtype=fp32 keeps it)'
        """
        share = self.lost / self.effect if self.effect else 0.0
        moved = f"it moves logits by {self.effect:.2g}; in {self.dtype} {share:.1%} of that is lost"
        moved += "" if self.dtype == "float32" else " (export.dtype=fp32 keeps it)"
        return f"adapter merged into {self.layers} layers (within {self.error:.1e}): {moved}"


def write(
    folder: Path,
    model: Any,
    masters: Masters,
    settings: AdapterConfig,
    base: str,
    tokenizer: Tokenizer,
    about: Mapping[str, Any],
    owners: Owners,
) -> None:
    """The adapter as peft writes it, whole or not at all; one that an earlier end of the run has left is set aside.

    Of a model that ranks share out all of them have to call it, and rank 0 writes.

    base       the base model's hub id or folder, which adapter_config.json names
    tokenizer  is written beside it where it has new tokens
    about      what manifest.json says of it
    """
    tensors = {adapters.peft_name(name): owners.gather(name, masters[name]) for name in masters.parameters}
    if not owners.world.is_first:
        return
    described: Any = adapters.peft_config(model, settings)
    described.base_model_name_or_path, described.inference_mode = base, True
    described.trainable_token_indices = adapters.token_indices(masters.parameters)
    if settings.target == "all-linear":  # as names, which servers know how to read
        described.target_modules = {name.rpartition(".")[2] for name in adapters.layers(model)}
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in described.to_dict().items()}
    whole = {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}
    with _in_peft_form(folder, json.loads(json.dumps(values, default=str)), whole, about) as staging:
        if tokenizer.new_ids:
            carried.write_tokenizer(tokenizer.hf, staging.path)


def write_virtual(
    folder: Path,
    model: Any,
    masters: Masters,
    base: str,
    tokenizer: Tokenizer,
    card: str,
    form: PromptForm,
    about: Mapping[str, Any],
) -> None:
    """Virtual tokens as peft writes them, with the tokenizer: all that leaves a run, as nothing can be merged.

    base  the base model's hub id or folder, which adapter_config.json names
    form  how the model is asked, for deft.json; about: what manifest.json says
    """
    described = {**virtual_tokens.described(model), "base_model_name_or_path": base, "inference_mode": True}
    (tensor,) = (masters[name].cpu() for name in masters.parameters)
    with _in_peft_form(folder, described, {virtual_tokens.KEY: tensor}, about) as staging:
        carried.write_tokenizer(tokenizer.hf, staging.path)
        staging.write_text("README.md", card)
        staging.write_text(prompt_form.FILE, form.as_json())


@contextmanager
def _in_peft_form(
    folder: Path, described: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> Iterator[Staging]:
    """A new folder with the two files that peft reads, for the body to add to; an earlier one is set aside."""
    if os.path.lexists(folder):
        files.set_aside(folder)
    with files.staged(folder, about) as staging:
        staging.write_json(FILE, described)
        staging.write(adapters.WEIGHTS, serialised(tensors))
        yield staging


def dequantize(model: Any, masters: Masters, rows: Sequence[Sequence[int]]) -> str:
    """Gives the layers of a quantised base the weights they have computed with, on the CPU; says how exactly.

    Raises ExportError where the model gives other logits than before.
    """
    count, rows = len(quantized.layers(model)), rows[:EXPORT_ROWS]
    before = [logits(model, row).cpu() for row in rows]
    masters.adopt(quantized.undo(model), "cpu")
    error = _worst([logits(model, row) for row in rows], before)
    if not error <= DEQUANTIZED[model.dtype]:
        raise ExportError(f"the dequantised model's logits differ by {error:.2e} from the quantised one's")
    return f"base dequantised in {count} layers (logits within {error:.1e})"


def merge(model: Any, masters: Masters, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Merge:
    """Adds each adapter to the fp32 master of its base weight and takes it out: model and masters are then plain.

    rows   token ids, the first EXPORT_ROWS of which are run through the model before and after: it takes the room of
           the weights in fp32
    dtype  that of the weights when they are written

    Raises ExportError where the merged model gives other logits than the adapted one.
    """
    rows = rows[:EXPORT_ROWS]
    adapted = _outputs(model, masters, rows)
    with adapters.switched_off(model):
        base = _outputs(model, masters, rows)
    found = adapters.layers(model)
    for name, layer in found.items():
        parts = {key.removeprefix(f"{name}."): masters[key] for key in _names(name, layer)}
        masters.assign(f"{name}{adapters.BASE}.weight", _merged(layer, parts))
    masters.rename(adapters.take_out(model))
    error = _worst(_outputs(model, masters, rows), adapted)
    if not error <= TOLERANCE:
        raise ExportError(f"the merged model's logits differ by {error:.2e} from the adapted one's")
    lost = _worst(_outputs(model, masters, rows, dtype), adapted)
    return Merge(len(found), str(dtype).removeprefix("torch."), _worst(adapted, base), error, lost)


def _outputs(
    model: Any, masters: Masters, rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The logits of rows with the fp32 masters as weights, rounded to `dtype` before."""
    weights = {
        name: master.to(dtype).float() if master.is_floating_point() else master for name, master in masters.items()
    }
    return [logits(model, row, weights) for row in rows]


@torch.no_grad()
def _merged(layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
    """fp32: the base weight with its adapter, by peft's own rule for the variant, of whole parts by their names."""
    whole = {
        id(each): nn.Parameter(parts[key].to(torch.float32, copy=True), requires_grad=False)
        for key, each in layer.named_parameters()
    }
    alike = copy.deepcopy(layer, whole)
    alike.merge()
    merged: Tensor = alike.get_base_layer().weight.data
    return merged


def merge_shared(model: Any, masters: Masters, owners: Owners) -> tuple[Shared, str]:
    """`merge` for a model that ranks share out, on all of them: model and masters are then plain, and a base weight
    gets its adapter when it is written. What that does to logits is not measured.

    owners  of the adapted model's parameters
    """
    found = adapters.layers(model)
    bases = {name: f"{name}{adapters.BASE}.weight" for name in found}
    small = {key: masters[key] for name, layer in found.items() for key in _names(name, layer) if key != bases[name]}
    names = adapters.take_out(model)
    masters.rename(names)

    def make(name: str, layer: Any) -> Tensor | None:
        parts: dict[str, Tensor] = {}
        for key in _names(name, layer):
            own = masters[f"{name}.weight"] if key == bases[name] else small[key]
            if (part := owners.gather(key, own)) is not None:
                parts[key.removeprefix(f"{name}.")] = part
        return _merged(layer, parts) if parts else None

    made = {f"{name}.weight": partial(make, name, layer) for name, layer in found.items()}
    return Shared(owners.renamed(names), made), f"adapter merged into {len(found)} layers as they were written"


def _names(name: str, layer: Any) -> list[str]:
    """Those of an adapted layer's parameters in its model."""
    return [f"{name}.{key}" for key, _ in layer.named_parameters()]


def _worst(found: Sequence[Tensor], meant: Sequence[Tensor]) -> float:
    return max((relative(one, other) for one, other in zip(found, meant, strict=True)), default=0.0)
