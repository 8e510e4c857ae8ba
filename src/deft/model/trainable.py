"""What of a model is trained: all of it, or what is not frozen; or adapters alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from deft.core.errors import InputError
from deft.core.registry import closest
from deft.model import adapters, quantized, virtual_tokens, vocabulary
from deft.model.config import AdapterConfig, FreezeConfig, Quantize
from deft.model.multimodal import text_body

NOTHING_FROZEN = FreezeConfig()


@dataclass(frozen=True, slots=True)
class Trainable:
    """What a configuration says of it; and the ids of new tokens, whose rows are trained even where others are not."""

    adapter: AdapterConfig | None = None
    freeze: FreezeConfig = NOTHING_FROZEN
    new_ids: range = range(0)
    quantize: Quantize = "off"

    @property
    def is_alike(self) -> bool:
        """Whether the same of every layer is trained, as far as this tells."""
        is_everywhere = self.adapter is None or (self.adapter.target == "all-linear" and not self.adapter.ranks)
        return is_everywhere and self.freeze == NOTHING_FROZEN

    def apply(self, model: PreTrainedModel, device: torch.device | str | None = None) -> dict[str, slice]:
        """Makes room for new tokens, quantises the model, puts adapters into it, and freezes what is not to be trained.

        device  where a model that is quantised goes to


        To be called before the self-test. Parameters of which only some rows are trained, and which; `Masters` is to
        be told. Raises InputError where that cannot be done, or nothing is left to train.
        """
        vocabulary.make_room(model, self.new_ids)
        if self.quantize != "off":
            quantized.quantize(model, self.quantize, device)
        if self.adapter is not None and self.adapter.is_virtual:
            if self.new_ids:
                fix = "use adapter=lora for both"
                raise InputError(f"data.add_tokens: has no place in a file of {self.adapter.name} tuning; {fix}")
            virtual_tokens.attach(model, self.adapter)
        elif self.adapter is not None:
            adapters.attach(model, self.adapter)
        for parameter in _frozen(model, self.freeze):
            parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError("freeze: no parameter is left to train; freeze less")
        return vocabulary.thaw(model, self.new_ids)


ALL = Trainable()
"""Full fine-tuning."""


def _frozen(model: PreTrainedModel, settings: FreezeConfig) -> Iterator[nn.Parameter]:
    named = dict(model.named_parameters())
    for pattern in settings.names:
        found = [name for name in named if re.search(pattern, name)]
        if not found:
            near = closest(pattern, {part for name in named for part in name.split(".")})
            raise InputError(f"freeze.names: {pattern!r} is in no parameter's name; {near or f'one is {[*named][-1]}'}")
        yield from (named[name] for name in found)
    if settings.unfrozen_layers is not None:
        yield from _below(model, settings.unfrozen_layers)


def _below(model: PreTrainedModel, unfrozen: int) -> Iterator[nn.Parameter]:
    """Embeddings, and all layers but this many from the top; the head where it is tied, or where no layer is trained.

    As freeze_bottom_causal_layers of CarperAI/trlx 3340c2f means it, which fails on tied embeddings.
    """
    body = text_body(model)
    layers = [each for each in body.modules() if isinstance(each, GradientCheckpointingLayer)]
    if unfrozen > len(layers):
        raise InputError(f"freeze.unfrozen_layers: {unfrozen} of {len(layers)} layers; leave it out to train all")
    parts: list[nn.Module] = [model.get_input_embeddings(), *layers[: len(layers) - unfrozen]]
    head = model.get_output_embeddings()
    if unfrozen == 0 and head is not None:
        parts.append(head)
    for part in parts:
        yield from part.parameters()
