"""A model, and how its hidden states are computed: what `training` holds of an architecture.

Shape suffixes: M tokens of a micro-batch, K targets, N documents of equal length T, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deft.hardware import few_sizes
from deft.model import faster, lookup
from deft.model.attention import packing_arguments, sealed_arguments
from deft.model.checkpointing import Checkpointing, checkpointed
from deft.model.static import Compiled, fill
from deft.model.towers import text_body
from deft.types import Batch, Head

Mode = Literal["packed", "alone", "whole"]
"""packed: the body once over all documents of a micro-batch, with our attention.
alone: the body with the model's own attention, documents of equal length together.
whole: the model's own forward up to its logits, one document at a time, where its head is not understood."""


@dataclass(frozen=True, slots=True)
class Learner:
    """A causal language model as body and head. Made by `selftest.choose`, which proves that `mode` is sound.

    It never flips train() or eval(); the auxiliary losses of routers are left out. scale and softcap are those of Head.

    compiled  what gradients are computed with, where layers are compiled; all else goes through the layers themselves
    """

    model: PreTrainedModel
    mode: Mode
    scale: float = 1.0
    softcap: float | None = None
    checkpointing: Checkpointing = "none"
    compiled: Compiled | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> Head:
        """The head around the parameters as they are now: they may have been cast, moved or replaced since."""
        output = self.model.get_output_embeddings()
        return Head(output.weight, output.bias, self.scale, self.softcap)

    def hidden_and_head(self, batch: Batch) -> tuple[Tensor, Head]:
        """float [K, H] at batch.rows, and the head to apply to it. For the modes packed and alone.

        A loss through this head gives a tied matrix one gradient (lookup.py), through `head` the sum of two.
        """
        assert self.mode != "whole", "a head that is not understood has no hidden states to show"
        if self.mode == "alone":
            with checkpointed(self.model, self.checkpointing):
                return alone_hidden(self.model, batch)[batch.rows], self.head
        room = self._room(batch)
        if self.compiled is not None and room is not None and torch.is_grad_enabled():
            with self.compiled.in_place(), checkpointed(self.model, self.checkpointing):
                return static_hidden(self.model, fill(batch, room))[batch.rows], self.head
        is_trimmed = faster.trims(self.model)
        with checkpointed(self.model, self.checkpointing):
            return self._trimmed(batch) if is_trimmed else (packed_hidden(self.model, batch)[batch.rows], self.head)

    def _trimmed(self, batch: Batch) -> tuple[Tensor, Head]:
        """The same where the last layer is a block, and so the body one that takes embeddings for their tokens."""
        batch = _filled(batch)
        head, embedding = self.head, self.model.get_input_embeddings()
        arguments: dict[str, Any] = {"target_rows": batch.rows}
        if lookup.fits(embedding):
            embedded_MH, matrix_VH = lookup.embed(embedding, batch.tokens)
            arguments["embedded"] = embedded_MH[None]
            head = replace(head, weight=matrix_VH) if head.weight is embedding.weight else head
        hidden = packed_hidden(self.model, batch, **arguments)
        # A last layer may have gone its own way and given all rows, as it does where somebody listens to its parts.
        return hidden if len(hidden) == len(batch.rows) else hidden[batch.rows], head

    def make_kernels(self, batch: Batch) -> None:
        """Tries the products that the body will need for this micro-batch's gradient, while memory is free
        (`hardware.few_sizes`)."""
        if self._has_blocks:
            filled = _filled(batch)
            faster.make_kernels(self.model, len(filled.tokens), few_sizes(len(batch.rows)), filled.documents)

    def padding(self, batch: Batch) -> int:
        """The tokens that a micro-batch is filled up with for its gradient."""
        tokens, room = len(batch.tokens), self._room(batch)
        if room is None:
            room = few_sizes(tokens) if self._has_blocks else tokens
        return room - tokens

    def _room(self, batch: Batch) -> int | None:
        return None if self.compiled is None else self.compiled.room(len(batch.tokens))

    @property
    def _has_blocks(self) -> bool:
        return self.mode == "packed" and faster.trims(self.model)

    def logits(self, batch: Batch) -> Tensor:
        """float [K, V]: the model's own logits at batch.rows. For the mode whole."""
        assert self.mode == "whole", "where the head is understood, logits are never whole"
        with checkpointed(self.model, self.checkpointing):
            return whole_logits(self.model, batch)


def _filled(batch: Batch) -> Batch:
    return fill(batch, few_sizes(len(batch.tokens)))


def packed_hidden(model: PreTrainedModel, batch: Batch, **arguments: Any) -> Tensor:
    """float [M, H]: the body once over all documents, under the attention of `attention.py`."""
    packing = packing_arguments(batch.documents, batch.tokens.device)
    return _body(model, batch.tokens[None], position_ids=batch.positions[None], **packing, **arguments)[0]


def static_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """float [M, H]: the same for layers that are compiled for M tokens, whichever documents these belong to."""
    packing = sealed_arguments(batch.documents, batch.tokens.device)
    return _body(model, batch.tokens[None], position_ids=batch.positions[None], **packing)[0]


def alone_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """float [M, H]: the body on each document; those of equal length together, so none is padded or needs a mask."""
    documents = batch.tokens.split(list(batch.documents))
    order = sorted(range(len(documents)), key=lambda index: len(documents[index]))
    hidden_TH: dict[int, Tensor] = {}
    for _, run in groupby(order, key=lambda index: len(documents[index])):
        indices = list(run)
        hidden_NTH = _body(model, torch.stack([documents[index] for index in indices]))
        hidden_TH |= zip(indices, hidden_NTH.unbind(), strict=True)
    return torch.cat([hidden_TH[index] for index in range(len(documents))])


def whole_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
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
