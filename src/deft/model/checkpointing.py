"""What a layer keeps for its backward pass, and what it computes again: memory against time, never the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from deft.model.cpu import llama

Checkpointing = Literal["none", "selective", "full"]
"""none: all that the backward pass needs is kept.
selective: a fused layer computes its two MLP projections and the probabilities of its attention again; any other
layer everything but the products of its linear layers.
full: only the input of each layer is kept."""

_KEPT = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})


@contextmanager
def checkpointed(model: nn.Module, mode: Checkpointing) -> Iterator[None]:
    """While it lasts, a forward pass of the model keeps what `mode` says; its backward pass may come later."""
    if mode == "none" or not torch.is_grad_enabled():
        yield
        return
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    own = {layer: layer.__dict__["forward"] for layer in layers if "forward" in layer.__dict__}
    try:
        for layer in layers:
            layer.forward = _recompute(layer.forward, mode)
        yield
    finally:
        for layer in layers:
            del layer.forward
            if layer in own:
                layer.forward = own[layer]


def _recompute(forward: Callable[..., Any], mode: Checkpointing) -> Callable[..., Any]:
    if mode == "full":
        return partial(checkpoint, forward, use_reentrant=False)
    if isinstance(forward, partial) and forward.func is llama.forward:
        return partial(forward, recomputes=True)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
