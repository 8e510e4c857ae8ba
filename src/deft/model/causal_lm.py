"""A causal language model as body and head: the one door from a micro-batch to a loss.

Shape suffixes: M tokens of a micro-batch, K targets, N documents of equal length T, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deft.core.hardware import round_up_rows, to_device
from deft.core.types import Head, MicroBatch, Objective, Tally
from deft.model import fused_layers
from deft.model.attention import compiled_arguments, packing_arguments
from deft.model.checkpointing import Checkpointing, checkpointed
from deft.model.compiled_layers import CompiledLayers, pad
from deft.model.fused_layers import embed, is_plain_embedding
from deft.model.multimodal import text_body

Mode = Literal["packed", "alone", "whole"]
"""packed: the body once over all documents of a micro-batch, with our attention.
alone: the body with the model's own attention, documents of equal length together.
whole: the model's own forward up to its logits, one document at a time, where its head is not understood."""


class CausalLM(nn.Module):
    """A Hugging Face model as body and head. Made by `selftest.choose`, which proves that `mode` is sound.

    Names in checkpoints and exports are those of `model`, the Hugging Face model inside. It never flips train() or
    eval(); the auxiliary losses of routers are left out. scale and softcap are those of Head.

    checkpointing  what layers keep for their backward pass
    compiled       layers that gradients are computed with; all else goes through the model's own
    note           for the user, where `mode` is a fallback: why
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mode: Mode,
        scale: float = 1.0,
        softcap: float | None = None,
        *,
        checkpointing: Checkpointing = "none",
        note: str = "",
    ) -> None:
        super().__init__()
        self.model, self.mode, self.scale, self.softcap, self.note = model, mode, scale, softcap, note
        self.checkpointing = checkpointing
        self.compiled: CompiledLayers | None = None

    def forward(self, micro_batch: MicroBatch, objective: Objective) -> Tally:
        """What the objective says of the micro-batch's targets; their hidden states or logits never leave this call."""
        batch = on_device(micro_batch, self.device)
        if self.mode == "whole":
            return objective.from_logits(self.logits(batch), batch.targets, batch.weights)
        return objective(*self.hidden_and_head(batch), batch.targets, batch.weights)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> Head:
        """The head around the parameters as they are now: they may have been cast, moved or replaced since."""
        output = self.model.get_output_embeddings()
        return Head(output.weight, output.bias, self.scale, self.softcap)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """While it lasts, gradients go through the layers themselves: hooks on parts of a layer see their outputs."""
        compiled, self.compiled = self.compiled, None
        try:
            yield
        finally:
            self.compiled = compiled

    def hidden_and_head(self, batch: MicroBatch) -> tuple[Tensor, Head]:
        """float [K, H] at batch.rows, and the head to apply to it. For the modes packed and alone.

        A loss through this head gives a tied matrix one gradient (fused_layers.py), through `head` the sum of two.
        """
        assert self.mode != "whole", "a head that is not understood has no hidden states to show"
        if self.mode == "alone":
            with checkpointed(self.model, self.checkpointing):
                return alone_hidden(self.model, batch)[batch.rows], self.head
        bucket = self._bucket(batch)
        if self.compiled is not None and bucket is not None and torch.is_grad_enabled():
            with self.compiled.in_place(), checkpointed(self.model, self.checkpointing):
                return compiled_hidden(self.model, pad(batch, bucket))[batch.rows], self.head
        is_trimmed = fused_layers.trims(self.model)
        with checkpointed(self.model, self.checkpointing):
            return self._trimmed(batch) if is_trimmed else (packed_hidden(self.model, batch)[batch.rows], self.head)

    def _trimmed(self, batch: MicroBatch) -> tuple[Tensor, Head]:
        """The same where the last layer is fused, and so the body one that takes embeddings for their tokens."""
        batch = pad(batch, round_up_rows(len(batch.tokens)))
        head, embedding = self.head, self.model.get_input_embeddings()
        arguments: dict[str, Any] = {"target_rows": batch.rows}
        if is_plain_embedding(embedding):
            embedded_MH, matrix_VH = embed(embedding, batch.tokens)
            arguments["embedded"] = embedded_MH[None]
            head = replace(head, weight=matrix_VH) if head.weight is embedding.weight else head
        hidden = packed_hidden(self.model, batch, **arguments)
        # The last layer gives all rows where its own forward was called, as with hooks on its parts.
        return hidden if len(hidden) == len(batch.rows) else hidden[batch.rows], head

    def padding(self, batch: MicroBatch) -> int:
        """The tokens that are added to a micro-batch for its gradient."""
        tokens, padded = len(batch.tokens), self._bucket(batch)
        if padded is None:
            is_rounded = self.mode == "packed" and fused_layers.trims(self.model)
            padded = round_up_rows(tokens) if is_rounded else tokens
        return padded - tokens

    def _bucket(self, batch: MicroBatch) -> int | None:
        return None if self.compiled is None else self.compiled.bucket(len(batch.tokens))

    def logits(self, batch: MicroBatch) -> Tensor:
        """float [K, V]: the model's own logits at batch.rows. For the mode whole."""
        assert self.mode == "whole", "where the head is understood, logits are never whole"
        with checkpointed(self.model, self.checkpointing):
            return whole_logits(self.model, batch)


def on_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on a device."""
    names = ("tokens", "positions", "rows", "targets", "weights")
    moved: dict[str, Any] = {name: to_device(getattr(micro_batch, name), device) for name in names}
    return replace(micro_batch, **moved)


def packed_hidden(model: PreTrainedModel, batch: MicroBatch, **arguments: Any) -> Tensor:
    """float [M, H]: the body once over all documents, under the attention of `attention.py`."""
    packing = packing_arguments(batch.documents, batch.tokens.device)
    return _body(model, batch.tokens[None], position_ids=batch.positions[None], **packing, **arguments)[0]


def compiled_hidden(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """float [M, H]: the same for layers that are compiled for M tokens, whichever documents these belong to."""
    packing = compiled_arguments(batch.documents, batch.tokens.device)
    return _body(model, batch.tokens[None], position_ids=batch.positions[None], **packing)[0]


def alone_hidden(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """float [M, H]: the body on each document; those of equal length together, so none is padded or needs a mask."""
    documents = batch.tokens.split(list(batch.documents))
    order = sorted(range(len(documents)), key=lambda index: len(documents[index]))
    hidden_TH: dict[int, Tensor] = {}
    for _, run in groupby(order, key=lambda index: len(documents[index])):
        indices = list(run)
        hidden_NTH = _body(model, torch.stack([documents[index] for index in indices]))
        hidden_TH |= zip(indices, hidden_NTH.unbind(), strict=True)
    return torch.cat([hidden_TH[index] for index in range(len(documents))])


def whole_logits(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """float [K, V]: logits of the model's own forward at batch.rows, one document at a time."""
    rows_K = batch.rows.cpu()
    parts, start = [], 0
    for tokens_T in batch.tokens.split(list(batch.documents)):
        end = start + len(tokens_T)
        own = rows_K[(rows_K >= start) & (rows_K < end)] - start
        logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0]
        parts.append(logits_TV[own.to(logits_TV.device)])
        start = end
    return torch.cat(parts)


def _body(model: PreTrainedModel, tokens_NT: Tensor, embedded: Tensor | None = None, **arguments: Any) -> Tensor:
    """`embedded` [N, T, H]: the tokens' embeddings, if they have been looked up."""
    inputs = {"input_ids": tokens_NT} if embedded is None else {"inputs_embeds": embedded}
    return text_body(model)(**inputs, use_cache=False, **arguments).last_hidden_state


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model and its modules are in evaluation mode.

    >>> model = nn.Dropout()
    >>> with evaluating(model):
    ...     print(model.training)
    False
    >>> model.training
    True
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
