"""A trained adapter leaves in two ways: as a folder of peft's own form, and added to the base weights for `final/`.

adapter/  adapter_config.json  adapter_model.safetensors (fp32)  manifest.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deft.core import files
from deft.core.files import Staging
from deft.encoding.tokenizer import Tokenizer
from deft.evaluation import prompt_form
from deft.evaluation.prompt_form import PromptForm
from deft.export import carried
from deft.export.folder import EXPORT_ROWS, TOLERANCE, ExportError, logits
from deft.model import adapters, quantized, virtual_tokens
from deft.model.config import FILE, AdapterConfig
from deft.training.checkpoint import serialised
from deft.training.masters import Masters

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
) -> None:
    """The adapter as peft writes it, whole or not at all; one that an earlier end of the run has left is set aside.

    base       the base model's hub id or folder, which adapter_config.json names
    tokenizer  is written beside it where it has new tokens
    about      what manifest.json says of it
    """
    described: Any = adapters.peft_config(model, settings)
    described.base_model_name_or_path, described.inference_mode = base, True
    described.trainable_token_indices = adapters.token_indices(masters.parameters)
    if settings.target == "all-linear":  # as names, which servers know how to read
        described.target_modules = {name.rpartition(".")[2] for name in adapters.layers(model)}
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in described.to_dict().items()}
    tensors = {adapters.peft_name(name): masters[name].cpu() for name in masters.parameters}
    with _in_peft_form(folder, json.loads(json.dumps(values, default=str)), tensors, about) as staging:
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
        masters.assign(f"{name}{adapters.BASE}.weight", _merged(name, layer, masters))
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
def _merged(name: str, layer: Any, masters: Masters) -> Tensor:
    """fp32: the base weight with its adapter, by peft's own rule for the variant; the layer is left as it was."""
    live = {key: parameter.data for key, parameter in layer.named_parameters()}
    for key, parameter in layer.named_parameters():
        parameter.data = masters[f"{name}.{key}"].to(torch.float32, copy=True)
    layer.merge()
    merged: Tensor = layer.get_base_layer().weight.data
    layer.merged_adapters.clear()
    for key, parameter in layer.named_parameters():
        parameter.data = live[key]
    return merged


def _worst(found: Sequence[Tensor], meant: Sequence[Tensor]) -> float:
    pairs = zip(found, meant, strict=True)
    return max((float((one - other).norm() / other.norm()) for one, other in pairs), default=0.0)
