"""A causal language model as body and head: the one door from a micro-batch to a loss.

Shape suffixes: M tokens of a micro-batch, K targets, N documents of equal length T, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from deft.core.hardware import round_up_rows, to_device
from deft.core.types import Head, MicroBatch, Objective, Tally
from deft.distributed.sharding import own_type
from deft.model import fused_layers, neftune, virtual_tokens
from deft.model.attention import compiled_arguments, packing_arguments
from deft.model.checkpointing import Checkpointing, checkpointed
from deft.model.compiled_layers import CompiledLayers, pad
from deft.model.fused_layers import embed, is_plain_embedding
from deft.model.multimodal import text_body
from deft.model.neftune import Noise

Made = TypeVar("Made")
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
    noise          alpha of NEFTune's noise, which documents with a seed get; 0 for none
    start          the model as the run began with it, for objectives that use it (`keep_start`)
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
        self.noise = 0.0
        self.start: CausalLM | None = None

    def forward(self, micro_batch: MicroBatch, objective: Objective) -> Tally:
        """What the objective says of the micro-batch's targets; their hidden states or logits never leave this call."""
        batch = on_device(micro_batch, self.device)
        start = self._at_the_start(batch) if objective.uses_start else None
        if self.mode == "whole":
            return objective.from_logits(self.logits(batch), batch.targets, batch.weights, start)
        return self._lent(
            *self.hidden_and_head(batch),
            lambda hidden, head: objective(hidden, head, batch.targets, batch.weights, start),
        )

    def _lent(self, hidden: Tensor, head: Head, loss: Callable[[Tensor, Head], Tally]) -> Tally:
        """The loss; where the model is sharded, an untied head is gathered for it alone."""
        output: Any = self.model.get_output_embeddings()
        if not isinstance(output, FSDPModule):
            return loss(hidden, head)
        return cast(Any, output).lend(hidden, lambda hidden: loss(hidden, self.head))

    def inside(self, body: Callable[[], Made]) -> Made:
        """What `body` gives, which calls the model inside directly: where weights are sharded they are gathered for it
        as they are for `forward`."""
        return body()

    def become(self, chosen: CausalLM) -> None:
        """Takes the way through the model that the self-test has chosen for it."""
        self.mode, self.scale, self.softcap, self.note = chosen.mode, chosen.scale, chosen.softcap, chosen.note

    def layers(self) -> list[nn.Module]:
        """The layers of the body, each of which is gathered by itself where the model is sharded."""
        return [each for each in text_body(self.model).modules() if isinstance(each, GradientCheckpointingLayer)]

    def lent(self) -> nn.Linear | None:
        """The head, where it is a linear layer whose weights are its own: read once a micro-batch, for the loss."""
        ends: Any = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        is_plain = own_type(ends[1]) is nn.Linear and ends[1].weight is not ends[0].weight
        return ends[1] if is_plain and self.mode != "whole" else None

    def keep_start(self) -> None:
        """Keeps the model as it is now, in evaluation mode: what is trained is copied, all else shared."""
        trained = [each for each in self.model.parameters() if each.requires_grad]
        stays = {id(each): each for each in (*self.model.parameters(), *self.model.buffers())}
        copied = {id(each): nn.Parameter(each.detach().clone(), requires_grad=False) for each in trained}
        model = deepcopy(self.model, stays | copied).eval()
        self.start = CausalLM(model, self.mode, self.scale, self.softcap)

    @torch.no_grad()
    def _at_the_start(self, batch: MicroBatch) -> Any:
        """Hidden states and head, or logits, of the model that the run began with."""
        assert self.start is not None, "keep_start has not been called"
        return self.start.logits(batch) if self.mode == "whole" else self.start.hidden_and_head(batch)

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
        batch = virtual_tokens.prepended(self.model, batch)
        if self.mode == "alone":
            with checkpointed(self.model, self._kept):
                return alone_hidden(self.model, batch, self._noise(batch))[batch.rows], self.head
        bucket, noise = self._bucket(len(batch.tokens)), self._noise(batch)
        if self.compiled is not None and bucket is not None and torch.is_grad_enabled():
            with self.compiled.in_place(), checkpointed(self.model, self.checkpointing):
                return compiled_hidden(self.model, pad(batch, bucket), noise)[batch.rows], self.head
        is_trimmed = fused_layers.trims(self.model)
        with checkpointed(self.model, self.checkpointing):
            if is_trimmed:
                return self._trimmed(batch, noise)
            return packed_hidden(self.model, batch, noise=noise)[batch.rows], self.head

    def _noise(self, batch: MicroBatch) -> Noise | None:
        documents = tuple(zip(batch.documents, batch.seeds, strict=True)) if self.noise and batch.seeds else ()
        return Noise(self.noise, documents) if documents else None

    def _trimmed(self, batch: MicroBatch, noise: Noise | None) -> tuple[Tensor, Head]:
        """The same where the last layer is fused, and so the body one that takes embeddings for their tokens."""
        batch = pad(batch, round_up_rows(len(batch.tokens)))
        head, embedding = self.head, self.model.get_input_embeddings()
        arguments: dict[str, Any] = {"target_rows": batch.rows, "noise": noise}
        if is_plain_embedding(embedding):
            embedded_MH, matrix_VH = embed(embedding, batch.tokens)
            arguments |= {"embedded": (noise.added(embedded_MH) if noise else embedded_MH)[None], "noise": None}
            head = replace(head, weight=matrix_VH) if head.weight is embedding.weight else head
        hidden = packed_hidden(self.model, batch, **arguments)
        # The last layer gives all rows where its own forward was called, as with hooks on its parts.
        return hidden if len(hidden) == len(batch.rows) else hidden[batch.rows], head

    def padding(self, batch: MicroBatch) -> int:
        """The tokens that are added to a micro-batch for its gradient, virtual ones among them."""
        tokens = len(batch.tokens) + virtual_tokens.count(self.model) * len(batch.documents)
        padded = self._bucket(tokens)
        if padded is None:
            is_rounded = self.mode == "packed" and fused_layers.trims(self.model)
            padded = round_up_rows(tokens) if is_rounded else tokens
        return padded - len(batch.tokens)

    def _bucket(self, tokens: int) -> int | None:
        return None if self.compiled is None else self.compiled.bucket(tokens)

    @property
    def _kept(self) -> Checkpointing:
        """A layer that is computed twice would write into the cache of a prefix twice."""
        return "none" if isinstance(virtual_tokens.of(self.model), virtual_tokens.Prefix) else self.checkpointing

    def logits(self, batch: MicroBatch) -> Tensor:
        """float [K, V]: the model's own logits at batch.rows. For the mode whole."""
        assert self.mode == "whole", "where the head is understood, logits are never whole"
        batch = virtual_tokens.prepended(self.model, batch)
        with checkpointed(self.model, self._kept):
            return whole_logits(self.model, batch, self._noise(batch))


def on_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on a device."""
    names = ("tokens", "positions", "rows", "targets", "weights")
    moved: dict[str, Any] = {name: to_device(getattr(micro_batch, name), device) for name in names}
    return replace(micro_batch, **moved)


def packed_hidden(model: PreTrainedModel, batch: MicroBatch, **arguments: Any) -> Tensor:
    """float [M, H]: the body once over all documents, under the attention of `attention.py`."""
    packing = packing_arguments(batch.documents, batch.tokens.device)
    return _body(model, batch.tokens[None], position_ids=batch.positions[None], **packing, **arguments)[0]


def compiled_hidden(model: PreTrainedModel, batch: MicroBatch, noise: Noise | None = None) -> Tensor:
    """float [M, H]: the same for layers that are compiled for M tokens, whichever documents these belong to."""
    packing = compiled_arguments(batch.documents, batch.tokens.device)
    return _body(model, batch.tokens[None], noise=noise, position_ids=batch.positions[None], **packing)[0]


def alone_hidden(model: PreTrainedModel, batch: MicroBatch, noise: Noise | None = None) -> Tensor:
    """float [M, H]: the body on each document; those of equal length together, so none is padded or needs a mask."""
    documents = batch.tokens.split(list(batch.documents))
    order = sorted(range(len(documents)), key=lambda index: len(documents[index]))
    hidden_TH: dict[int, Tensor] = {}
    for _, run in groupby(order, key=lambda index: len(documents[index])):
        indices = list(run)
        tokens_NT = torch.stack([documents[index] for index in indices])
        hidden_NTH = _body(model, tokens_NT, noise=noise and noise.of(indices))
        hidden_TH |= zip(indices, hidden_NTH.unbind(), strict=True)
    return torch.cat([hidden_TH[index] for index in range(len(documents))])


def whole_logits(model: PreTrainedModel, batch: MicroBatch, noise: Noise | None = None) -> Tensor:
    """float [K, V]: logits of the model's own forward at batch.rows, one document at a time."""
    rows_K = batch.rows.cpu()
    parts, start = [], 0
    for index, tokens_T in enumerate(batch.tokens.split(list(batch.documents))):
        end = start + len(tokens_T)
        own = rows_K[(rows_K >= start) & (rows_K < end)] - start
        with neftune.on(model.get_input_embeddings(), noise and noise.of([index])):
            logits_TV = model(input_ids=tokens_T[None], **virtual_tokens.past(model, 1)).logits[0]
        parts.append(logits_TV[own.to(logits_TV.device)])
        start = end
    return torch.cat(parts)


def _body(
    model: PreTrainedModel,
    tokens_NT: Tensor,
    embedded: Tensor | None = None,
    noise: Noise | None = None,
    **arguments: Any,
) -> Tensor:
    """`embedded` [N, T, H]: the tokens' embeddings, if they have been looked up; `noise` is what they lack."""
    inputs = {"input_ids": tokens_NT} if embedded is None else {"inputs_embeds": embedded}
    with neftune.on(model.get_input_embeddings(), noise):
        return text_body(model)(**inputs, **virtual_tokens.past(model, len(tokens_NT)), **arguments).last_hidden_state


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
