"""Prompt and prefix tuning: some virtual tokens in front of every document are learnt, and nothing else.

prompt  their embeddings, arXiv 2104.08691; they are packed with the document's own
prefix  their keys and values in each layer, arXiv 2101.00190; documents run one at a time, after them

Both begin as tokens drawn from the vocabulary, and leave a run in peft's form, where they are `prompt_embeddings`.

Shape suffixes: N virtual tokens, H hidden size, P = 2 * layers * G * D, G key heads, D their size, M tokens of a batch.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from deft.core.errors import InputError
from deft.core.hardware import is_out_of_memory, to_device
from deft.core.types import MicroBatch
from deft.model import adapters, multimodal
from deft.model.config import AdapterConfig, base_of, is_adapter, is_virtual
from deft.model.config import of_folder as adapter_of_folder

KEY = "prompt_embeddings"
"""The only tensor in peft's file."""


class PromptEmbedding(nn.Module):
    """A model's input embedding; ids past its vocabulary are those of virtual tokens.

    >>> embedding = PromptEmbedding(nn.Embedding(4, 1), torch.tensor([[7.0], [8.0]]))
    >>> embedding(torch.tensor([4, 5, 4])).tolist(), embedding.ids.tolist()
    ([[7.0], [8.0], [7.0]], [4, 5])
    """

    def __init__(self, base: nn.Module, virtual_NH: Tensor) -> None:
        super().__init__()
        self.base = base
        self.virtual = nn.Parameter(virtual_NH.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The embedding's own [V, H], which other parts of a model look at."""
        found: Any = self.base.weight
        return found

    @property
    def ids(self) -> Tensor:
        """int64 [N]: those of the virtual tokens."""
        return len(self.weight) + torch.arange(len(self.virtual), device=self.virtual.device)

    def forward(self, ids: Tensor) -> Tensor:
        virtual = ids - len(self.weight)
        embedded = self.base(ids.clamp(max=len(self.weight) - 1))
        # fp32, in which the gradients of all documents are then summed.
        found = functional.embedding(virtual.clamp(min=0), self.virtual.float()).to(embedded.dtype)
        return torch.where(virtual[..., None] >= 0, found, embedded)


class Prefix(nn.Module):
    """Keys and values of virtual tokens, by token, layer, key or value, and head: [N, P]."""

    def __init__(self, virtual_NP: Tensor, layers: int, heads: int) -> None:
        super().__init__()
        self.virtual = nn.Parameter(virtual_NP.detach().clone())
        self.layers, self.heads = layers, heads

    def cache(self, model: PreTrainedModel, count: int) -> DynamicCache:
        """A new one for `count` documents, in which the virtual tokens stand."""
        parts = self.virtual.view(len(self.virtual), 2 * self.layers, self.heads, -1).permute(1, 2, 0, 3)
        cache = DynamicCache(config=model.config.get_text_config())
        for layer in range(self.layers):
            key, value = (parts[2 * layer + side][None].expand(count, -1, -1, -1) for side in (0, 1))
            cache.update(key, value, layer)
        return cache


def attach(model: PreTrainedModel, settings: AdapterConfig) -> None:
    """Gives a model virtual tokens and freezes all else. To be called before the self-test.

    Raises InputError where its layers do not all have keys and values of one shape, for prefix tuning.
    """
    model.requires_grad_(False)
    embedding: Any = model.get_input_embeddings()
    ids = torch.randint(len(embedding.weight), (settings.tokens,), device="cpu").to(embedding.weight.device)
    if settings.name == "prompt":
        model.set_input_embeddings(PromptEmbedding(embedding, embedding(ids)))
    else:
        model.add_module("virtual_tokens", _prefix(model, ids))


@torch.no_grad()
def _prefix(model: PreTrainedModel, ids_N: Tensor) -> Prefix:
    cache = DynamicCache(config=model.config.get_text_config())
    try:
        multimodal.text_body(model)(input_ids=ids_N[None], use_cache=True, **_past(model, cache))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        what = f"this model's layers cannot be asked for keys and values ({str(error)[:100]})"
        raise InputError(f"adapter.name: prefix: {what}; prompt, or lora, needs no such thing") from error
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    shapes = {None if each is None else tuple(each.shape[1:]) for pair in pairs for each in pair}
    shape = next(iter(shapes), None)
    if len(shapes) != 1 or shape is None or shape[1] != len(ids_N):
        what = "this model's layers do not all keep keys and values of one shape for each token"
        raise InputError(f"adapter.name: prefix: {what}; prompt, or lora, needs no such thing")
    rows = [each[0].transpose(0, 1).flatten(1) for pair in pairs for each in pair if each is not None]
    return Prefix(torch.cat(rows, 1), len(pairs), shape[0])


def of(model: PreTrainedModel) -> PromptEmbedding | Prefix | None:
    """A model's virtual tokens, if it has been given any."""
    embedding = model.get_input_embeddings()
    return embedding if isinstance(embedding, PromptEmbedding) else getattr(model, "virtual_tokens", None)


def count(model: PreTrainedModel) -> int:
    found = of(model)
    return 0 if found is None else len(found.virtual)


def past(model: PreTrainedModel, documents: int) -> dict[str, Any]:
    """What a model's forward is given beside the ids of documents of equal length: the prefix, if there is one."""
    found = of(model)
    if not isinstance(found, Prefix):
        return {"use_cache": False}
    return {"use_cache": True, **_past(model, found.cache(model, documents))}


@torch.no_grad()
def generated_from(model: PreTrainedModel, documents: int) -> dict[str, Any]:
    """What transformers' `generate` is given beside ids that have any `count` in front: their keys and values."""
    found = of(model)
    if found is None:
        return {}
    if isinstance(found, Prefix):
        return _past(model, found.cache(model, documents))
    filled = _past(model, DynamicCache(config=model.config.get_text_config()))
    multimodal.text_body(model)(input_ids=found.ids.expand(documents, -1), use_cache=True, **filled)
    return filled


def _past(model: PreTrainedModel, cache: DynamicCache) -> dict[str, Any]:
    """transformers 5.24 has renamed it."""
    names = inspect.signature(multimodal.text_body(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def prepended(model: PreTrainedModel, batch: MicroBatch) -> MicroBatch:
    """The micro-batch with the virtual tokens of prompt tuning in front of each document, which have no targets."""
    found = of(model)
    if not isinstance(found, PromptEmbedding):
        return batch
    return with_ids(batch, found.ids)


def with_ids(batch: MicroBatch, ids_N: Tensor) -> MicroBatch:
    """
    >>> rows, none = torch.tensor([0, 2]), torch.zeros(2)
    >>> batch = MicroBatch(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 0]), (2, 1), rows, none, none)
    >>> found = with_ids(batch, torch.tensor([90, 91]))
    >>> found.tokens.tolist(), found.positions.tolist(), found.documents, found.rows.tolist()
    ([90, 91, 5, 6, 90, 91, 7], [0, 1, 2, 3, 0, 1, 2], (4, 3), [2, 6])
    """
    more, lengths = len(ids_N), batch.documents
    ends = to_device(torch.tensor([*accumulate(lengths)]), batch.rows.device)
    documents_K = torch.searchsorted(ends, batch.rows, right=True)
    positions = [torch.arange(more + length) for length in lengths]
    return replace(
        batch,
        tokens=torch.cat([part for document in batch.tokens.split(list(lengths)) for part in (ids_N, document)]),
        positions=to_device(torch.cat(positions), batch.positions.device),
        documents=tuple(more + length for length in lengths),
        rows=batch.rows + more * (documents_K + 1),
    )


def of_folder(folder: Path) -> tuple[str, AdapterConfig] | None:
    """The base model's name and the settings of the virtual tokens in a folder of peft's form; None for other folders.

    Raises InputError where the folder's description is not whole.
    """
    if not is_adapter(folder) or not is_virtual(folder):
        return None
    return base_of(folder, "adapter.start"), AdapterConfig(**adapter_of_folder(folder))


def fill(model: PreTrainedModel, folder: Path) -> None:
    """Gives a model's virtual tokens the values in a folder of peft's form. Raises InputError where they do not fit."""
    found, stored = of(model), adapters.stored(folder).get(KEY)
    assert found is not None
    if stored is None or stored.shape != found.virtual.shape:
        what = "is not what this base model and adapter_config.json ask for"
        raise InputError(f"{folder / 'adapter_model.safetensors'}: {KEY} {what}")
    with torch.no_grad():
        found.virtual.copy_(stored)


def described(model: PreTrainedModel) -> dict[str, Any]:
    """What peft's adapter_config.json says of them."""
    found, text = of(model), model.config.get_text_config()
    assert found is not None
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": len(found.virtual), "num_transformer_submodules": 1}
    if isinstance(found, PromptEmbedding):
        sizes = {"num_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads}
        start = {"token_dim": found.virtual.shape[1], "prompt_tuning_init": "RANDOM"}
        return {"peft_type": "PROMPT_TUNING", **common, **sizes, **start}
    width = found.virtual.shape[1] // (2 * found.layers)
    sizes = {"num_layers": found.layers, "num_attention_heads": found.heads, "token_dim": width}
    return {"peft_type": "PREFIX_TUNING", **common, **sizes, "encoder_hidden_size": width, "prefix_projection": False}
