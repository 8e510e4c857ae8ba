"""Puts the blocks of `blocks/` in place of a model's layers, instance by instance, and takes them away again."""

from __future__ import annotations

from functools import partial

from torch import nn

from deft.model.blocks import llama


def install(model: nn.Module) -> int:
    """Gives each layer that a block computes exactly that block's forward; the number of these layers.

    Modules, parameters and their names stay what they are. A call that is not about packed documents on a CPU goes to
    the layer's own forward.
    """
    count = 0
    for layer in model.modules():
        form = llama.form_of(layer)
        if form is not None:
            layer.forward = partial(llama.forward, layer, form, layer.forward)
            count += 1
    return count


def remove(model: nn.Module) -> None:
    """Each layer is its own again."""
    for layer in model.modules():
        layer.__dict__.pop("forward", None)
