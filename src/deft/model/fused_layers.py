"""Replaces a model's layers by the hand-written ones of `cpu/`, instance by instance, and restores them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from deft.model.cpu import llama


def install(model: nn.Module) -> int:
    """Gives each layer on a CPU that `cpu/` computes exactly that forward; returns the number of these layers.

    Modules, parameters and their names stay what they are. A call that is not about packed documents goes to the
    layer's own forward.
    """
    remove(model)
    if next(model.parameters()).device.type != "cpu":
        return 0
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    forms = {layer: form for layer in layers if (form := llama.form_of(layer)) is not None}
    for layer, form in forms.items():
        exact = replace(form, is_last=layer is layers[-1])
        layer.forward = partial(llama.forward, layer, exact, layer.forward)
    return len(forms)


def trims(model: nn.Module) -> bool:
    """Whether the last layer is fused, and so can be told the rows that the head is applied to."""
    forwards = [layer.__dict__["forward"] for layer in model.modules() if "forward" in layer.__dict__]
    return bool(forwards) and forwards[-1].args[1].is_last


def remove(model: nn.Module) -> None:
    """Each layer is its own again."""
    for layer in model.modules():
        layer.__dict__.pop("forward", None)
