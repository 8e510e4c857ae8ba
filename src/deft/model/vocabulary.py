"""New tokens: their rows in the embedding and the head, which begin as the mean of the rows in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deft.core.errors import InputError

MULTIPLE = 64
"""A vocabulary that grows is padded to a multiple of this, which matrix products are fast with."""


def size_with(new_ids: range, rows: int) -> int:
    """The rows of a vocabulary of `rows` that is to have `new_ids`: as before where they are among its free ones.

    >>> size_with(range(32000, 32008), 32000), size_with(range(151669, 151677), 151936), size_with(range(0), 300)
    (32064, 151936, 300)
    """
    return rows if new_ids.stop <= rows else -(-new_ids.stop // MULTIPLE) * MULTIPLE


def described(new_ids: range, rows: int) -> str:
    """
    >>> described(range(32000, 32008), 32000), described(range(290, 291), 300), described(range(0), 300)
    ('8 new tokens: embeddings 32000 -> 32064', '1 new token: row 290 of the 300 embeddings, which was free', '')
    """
    if not new_ids:
        return ""
    tokens = f"{len(new_ids)} new token" + ("s" if len(new_ids) > 1 else "")
    if (size := size_with(new_ids, rows)) > rows:
        return f"{tokens}: embeddings {rows} -> {size}"
    if len(new_ids) == 1:
        return f"{tokens}: row {new_ids.start} of the {rows} embeddings, which was free"
    return f"{tokens}: rows {new_ids.start} to {new_ids[-1]} of the {rows} embeddings, which were free"


@torch.no_grad()
def make_room(model: PreTrainedModel, new_ids: range) -> None:
    """Gives a model rows for new tokens, each the fp32 mean of those in front; its config knows the new size.

    Rows that only pad the vocabulary get the mean too where they are new: zeros would be likely tokens.
    """
    if not new_ids:
        return
    embedding: Any = model.get_input_embeddings()
    before = len(embedding.weight)
    if (size := size_with(new_ids, before)) != before:
        model.resize_token_embeddings(size, mean_resizing=False)
    used, stop = min(new_ids.start, before), max(new_ids.stop, size if size != before else 0)
    for name, parameter in _matrices(model):
        _set_to_mean(parameter, used, stop)
        bias = getattr(model.get_submodule(name.rpartition(".")[0]), "bias", None)
        if bias is not None:
            _set_to_mean(bias, used, stop)


def thaw(model: PreTrainedModel, new_ids: range) -> dict[str, slice]:
    """Trains the new rows of embedding and head where these are frozen; the rows by the parameter's name.

    The whole matrix then has a gradient, of which `Masters` takes the rows. Raises InputError where one has an adapter.
    """
    found = {}
    for name, parameter in _matrices(model) if new_ids else ():
        if ".base_layer." in name:
            fix = "leave it out: new tokens have rows of their own in it"
            raise InputError(f"adapter.target: {name.partition('.base_layer')[0]} cannot have an adapter; {fix}")
        if not parameter.requires_grad:
            parameter.requires_grad_(True)
            found[name] = slice(new_ids.start, new_ids.stop)
    return found


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Embedding and head, once where they are tied."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    parts = [part for each in ends if each is not None for part in each.modules()]
    ours = {id(each.weight) for each in parts if hasattr(each, "weight")}
    yield from ((name, each) for name, each in model.named_parameters() if id(each) in ours)


def _set_to_mean(rows: Tensor, used: int, stop: int) -> None:
    """Those from `used` to `stop` become the mean of those before: of a matrix, or of a bias."""
    rows[used:stop] = rows[:used].float().mean(0).to(rows.dtype)
