"""Before the first step: which way of computing hidden states is sound for this very model, found by trying it.

Nothing is assumed of an architecture. Three short documents of random tokens go through the real model in the dtype
that it computes in, without gradients: packed and alone, through our head and through its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from deft.core.errors import InputError, Problem
from deft.core.types import MicroBatch
from deft.distributed.sharding import own_type
from deft.model import attention, fused_layers
from deft.model.causal_lm import CausalLM, alone_hidden, evaluating, packed_hidden, whole_logits
from deft.model.load import can_take_attention, expected_windows, own_attention, unpackable
from deft.model.multimodal import text_body

TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.15}
"""Relative error of a typical token's hidden state that is taken for rounding. Angles, norms and softmax of a model in
fp64 are in fp32 all the same. In bf16 two sound attentions differ by 0.01 (Llama) to 0.05 (gpt-oss, whose own softmax
is in bf16) after 32 random layers."""
LEAK_SHARE = 0.25
"""Beside that, packing must err by less than this share of the error that ignoring the documents makes."""
HEAD_SHARE = 0.125
"""The head is one layer: of the tolerance it may use this share."""
LOGIT_SIZE = 30.0
"""Root mean square of the logits a head is tried at: a soft-cap cannot be seen on the small logits of a fresh model."""


def choose(model: PreTrainedModel) -> CausalLM:
    """The fastest way through this model that is proven right, with a note for the user where that is a fallback.

    Sets the attention that it needs on the model; leaves weights, train() and eval() as they were.
    Raises InputError where the model sees later tokens, so that no causal loss is right for it, or where its forward
    pass changes its weights (RWKV's rescale_every), so that nobody could say what was trained.
    """
    before = _glimpses(model)
    causal_lm = _choose(model)
    if changed := [name for name, values in _glimpses(model).items() if not torch.equal(values, before[name])]:
        what = f"its forward pass changes its weights ({changed[0]} and {len(changed) - 1} more)"
        raise InputError(str(Problem(str(model.config.model_type), what, "choose another architecture")))
    return causal_lm


def _glimpses(model: PreTrainedModel) -> dict[str, Tensor]:
    """The first values of each parameter, of a sharded one of those that are here."""
    named = ((name, each.to_local() if isinstance(each, DTensor) else each) for name, each in model.named_parameters())
    return {name: each.detach().flatten()[:64].clone() for name, each in named}


def _choose(model: PreTrainedModel) -> CausalLM:
    batch = _probe(model)
    fused_layers.remove(model)
    with evaluating(model), torch.no_grad():
        _use_attention(model, own_attention(model))
        _check_causal(model, batch)
        if fault := _body_fault(model):
            return _whole(model, fault)
        alone_MH = alone_hidden(model, batch)
        heads = [CausalLM(model, "alone", *constants) for constants in _head_constants(model)]
        reasons = [_head_fault(head, batch, alone_MH) for head in heads]
        if all(reasons):
            return _whole(model, reasons[0])
        alone = heads[reasons.index("")]
        if fault := _packing_fault(model, batch, alone_MH):
            _use_attention(model, own_attention(model))
            alone.note = _note(model, f"{fault}; documents run one at a time")
            return alone
        _use_fused_layers(model, batch)
    return CausalLM(model, "packed", alone.scale, alone.softcap)


def _whole(model: PreTrainedModel, reason: str) -> CausalLM:
    return CausalLM(model, "whole", note=_note(model, f"{reason}; its own forward computes whole logits"))


def _probe(model: PreTrainedModel) -> MicroBatch:
    """Documents of 11, 17 and 6 tokens, the last one a prefix of the first."""
    embedding: Any = model.get_input_embeddings().weight
    size = min(model.config.get_text_config().vocab_size, len(embedding))
    tokens = torch.randint(size, (28,), generator=torch.Generator().manual_seed(0))
    documents = [tokens[:11], tokens[11:], tokens[:6]]
    tokens = torch.cat(documents).to(embedding.device)
    return MicroBatch(
        tokens=tokens,
        positions=torch.cat([torch.arange(len(document)) for document in documents]).to(tokens.device),
        documents=tuple(len(document) for document in documents),
        rows=torch.arange(len(tokens), device=tokens.device),
        targets=tokens,
        weights=torch.ones(len(tokens), device=tokens.device),
    )


def _check_causal(model: PreTrainedModel, batch: MicroBatch) -> None:
    first, _, prefix = whole_logits(model, batch).split(list(batch.documents))
    if _error(prefix, first[: len(prefix)]) > _tolerance(model):
        where, fix = str(model.config.model_type), "choose a causal language model"
        raise InputError(str(Problem(where, "its attention sees later tokens, which it would have to predict", fix)))


def _head_constants(model: PreTrainedModel) -> list[tuple[float, float | None]]:
    """What scale and softcap may be, likeliest first; `_head_fault` tells."""
    config = model.config.get_text_config().to_dict()
    scale = config.get("logit_scale") or config.get("lm_head_multiplier") or 1.0 / (config.get("logits_scaling") or 1.0)
    return list(dict.fromkeys([(scale, config.get("final_logit_softcapping")), (1.0, None)]))


def _body_fault(model: PreTrainedModel) -> str:
    """Why the model is not a body with a linear head, or nothing."""
    if text_body(model) is model:
        return "its body cannot be told from its head"
    return "" if own_type(model.get_output_embeddings()) is nn.Linear else "its head is not one linear layer"


def _head_fault(causal_lm: CausalLM, batch: MicroBatch, hidden_MH: Tensor) -> str:
    """Why our head is not the model's own, or nothing: hidden states of a telling size go through both."""
    model, head = causal_lm.model, causal_lm.head
    factor = float(LOGIT_SIZE / (head.scale * functional.linear(hidden_MH, head.weight)).float().square().mean().sqrt())
    hidden_MH = hidden_MH * factor
    ours_MV = head.scale * functional.linear(hidden_MH, head.weight, head.bias).float()
    if head.softcap is not None:
        ours_MV = head.softcap * torch.tanh(ours_MV / head.softcap)
    with _amplified(model.get_output_embeddings(), factor):
        own_MV = whole_logits(model, batch)
    if not _error(ours_MV, own_MV) <= HEAD_SHARE * _tolerance(model):
        return "its head scales or caps logits in a way of its own"
    return ""


def _packing_fault(model: PreTrainedModel, batch: MicroBatch, alone_MH: Tensor) -> str:
    """Why packed documents cannot be trusted in this model, or nothing."""
    if fault := unpackable(model):
        return fault
    expected = expected_windows(model)
    _use_attention(model, attention.NAME)
    windows_seen: list[int | None] = []
    try:
        packed_MH = packed_hidden(model, batch, windows_seen=windows_seen)
        leaking_MH = packed_hidden(model, replace(batch, documents=(len(batch.tokens),)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Any error of any architecture means the same here, and it is shown.
        return f"packed documents fail ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    if len(windows_seen) != len(expected):
        return f"the documents' lengths reach {len(windows_seen)} of {len(expected)} attention layers"
    if [window is not None for window in windows_seen] != expected:
        return "its sliding window does not reach the attention"
    lengths = batch.documents
    errors, leaks = _errors(packed_MH, alone_MH, lengths), _errors(leaking_MH, alone_MH, lengths)
    if not max(errors) <= min(_tolerance(model), LEAK_SHARE * max(leaks)):
        return f"packed documents are not the same as alone (relative error {max(errors):.1e})"
    return ""


def _use_fused_layers(model: PreTrainedModel, batch: MicroBatch) -> None:
    """Puts fused layers in place of the model's own where there are any, if they compute the same."""
    own_MH = packed_hidden(model, batch)
    if not fused_layers.install(model):
        return
    if not max(_errors(packed_hidden(model, batch), own_MH, batch.documents)) <= _tolerance(model):
        fused_layers.remove(model)


def _use_attention(model: PreTrainedModel, name: str) -> None:
    if can_take_attention(model) and model.config._attn_implementation != name:
        model.set_attn_implementation(name)


@contextmanager
def _amplified(output: nn.Module, factor: float) -> Iterator[None]:
    """The model's output layer with its input multiplied; whatever the model does to its output comes after."""
    handle = output.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def _errors(ours_MX: Tensor, own_MX: Tensor, documents: tuple[int, ...]) -> list[float]:
    parts = zip(ours_MX.split(list(documents)), own_MX.split(list(documents)), strict=True)
    return [_error(ours, own) for ours, own in parts]


def _error(ours_TX: Tensor, own_TX: Tensor) -> float:
    """Relative error of the median token: one whose expert changes by rounding does not count, a document does."""
    own_TX = own_TX.float()
    size_T = own_TX.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((ours_TX.float() - own_TX).norm(dim=1) / size_T).median())


def _tolerance(model: PreTrainedModel) -> float:
    return TOLERANCES[model.dtype]


def _note(model: PreTrainedModel, reason: str) -> str:
    return f"{model.config.model_type}: {reason}"
