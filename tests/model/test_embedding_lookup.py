"""Embedding lookups with one gradient for a tied matrix: torch's own gradient, only more exact."""

from __future__ import annotations

import pytest
import torch
from architectures import as_batch, causal_lm_of, random_documents
from torch import Tensor, nn
from torch.nn import functional

from deft.core.types import Head
from deft.model import fused_layers
from deft.training import chunked

VOCABULARY, SIZE, PADDING = 11, 8, 4


def lookup_and_head(*, is_tied: bool, padding: int | None) -> tuple[nn.Embedding, Tensor, Tensor, Tensor]:
    """An embedding in fp64, 40 tokens of 11 kinds, what multiplies their rows, and the head's own matrix."""
    rng = torch.Generator().manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, SIZE, padding_idx=padding, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (40,), generator=rng)
    factors = torch.randn(40, SIZE, generator=rng, dtype=torch.float64)
    other = torch.randn(VOCABULARY, SIZE, generator=rng, dtype=torch.float64)
    return embedding, tokens, factors, embedding.weight if is_tied else other


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_gradients_are_those_of_autograd(is_tied: bool, padding: int | None) -> None:
    embedding, tokens, factors, head = lookup_and_head(is_tied=is_tied, padding=padding)
    assert PADDING in tokens

    functional.cross_entropy((embedding(tokens) * factors) @ head.T, tokens).backward()
    assert embedding.weight.grad is not None
    expected, embedding.weight.grad = embedding.weight.grad, None
    rows, matrix = fused_layers.embed(embedding, tokens)
    functional.cross_entropy((rows * factors) @ (matrix if is_tied else head).T, tokens).backward()

    assert torch.equal(rows, embedding(tokens))
    assert embedding.weight.grad is not None
    assert torch.allclose(embedding.weight.grad, expected, rtol=1e-12, atol=1e-15)


def test_tokens_that_occur_often_are_summed_in_fp32() -> None:
    rng = torch.Generator().manual_seed(0)
    tokens, factors = torch.arange(3000) % 3, torch.rand(3000, SIZE, generator=rng).bfloat16()
    exact = torch.zeros(3, SIZE, dtype=torch.float64).index_add_(0, tokens, factors.double())
    embedding = nn.Embedding(3, SIZE, dtype=torch.bfloat16)

    def error(rows: Tensor) -> float:
        embedding.weight.grad = None
        (rows * factors).sum().backward()
        assert embedding.weight.grad is not None
        return float((embedding.weight.grad - exact).norm() / exact.norm())

    # On some processors torch's index_add_ sums widely by itself, on others it does not.
    assert fused_layers._sums(tokens, factors)[1].dtype == torch.float32
    assert error(embedding(tokens)) > 0.1
    assert error(fused_layers.embed(embedding, tokens)[0]) < 2**-8


def test_a_tied_matrix_gets_one_gradient_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    causal_lm, batch = causal_lm_of("llama_tied", "packed"), as_batch(random_documents())
    assert fused_layers.install(causal_lm.model)
    made: list[int] = []
    backward = fused_layers._Lookup.backward

    def watched(ctx: object, grad: Tensor, total: Tensor) -> tuple[Tensor, None, None]:
        made.append(total.data_ptr())
        return backward(ctx, grad, total)

    monkeypatch.setattr(fused_layers._Lookup, "backward", staticmethod(watched))
    chunked.loss(*causal_lm.hidden_and_head(batch), batch.targets, batch.weights).backward()
    gradient = causal_lm.model.get_input_embeddings().weight.grad
    assert made == [gradient.data_ptr()]


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_the_head_is_the_models_own(name: str) -> None:
    causal_lm, batch = causal_lm_of(name, "packed"), as_batch(random_documents())
    assert fused_layers.install(causal_lm.model)
    _, head = causal_lm.hidden_and_head(batch)
    assert isinstance(head, Head)
    assert torch.equal(head.weight, causal_lm.head.weight)
    assert (head.weight is causal_lm.head.weight) == (name == "llama")


def test_who_listens_to_the_embedding_hears_it() -> None:
    causal_lm, batch, heard = causal_lm_of("llama_tied", "packed"), as_batch(random_documents()), []
    assert fused_layers.install(causal_lm.model)
    embedding = causal_lm.model.get_input_embeddings()
    expected, _ = causal_lm.hidden_and_head(batch)
    embedding.register_forward_hook(lambda *x: heard.append(x[0]))
    hidden, head = causal_lm.hidden_and_head(batch)
    assert heard == [embedding]
    assert head.weight is embedding.weight
    assert torch.equal(hidden, expected)


class Scaled(nn.Embedding):
    """Whatever it does."""


@pytest.mark.parametrize(
    "odd",
    [
        Scaled(3, 2),
        nn.Embedding(3, 2, max_norm=1.0),
        nn.Embedding(3, 2, scale_grad_by_freq=True),
        nn.Embedding(3, 2, sparse=True),
        nn.Linear(2, 3),
    ],
)
def test_an_embedding_with_ways_of_its_own_is_left_alone(odd: nn.Module) -> None:
    assert fused_layers.is_plain_embedding(nn.Embedding(3, 2, padding_idx=0))
    assert not fused_layers.is_plain_embedding(odd)
