"""Faster blocks under laws 6, 7 and 11: the same loss and gradients as the layers that they stand in for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    VOCABULARY,
    Document,
    as_batch,
    build,
    causal_lm_of,
    gradients,
    hugging_face,
    largest_error,
    padded_inputs,
    random_documents,
)
from torch import Tensor
from transformers import PreTrainedModel

from deft.core.types import MicroBatch
from deft.model import attention, fused_layers, selftest
from deft.model.causal_lm import CausalLM
from deft.model.checkpointing import Checkpointing
from deft.model.cpu import document_attention, llama
from deft.training import chunked

WITH_BLOCKS = ["llama", "llama_tied", "qwen2", "qwen3", "mistral"]


def fast(name: str, model: PreTrainedModel | None = None) -> CausalLM:
    causal_lm = causal_lm_of(name, "packed")
    if model is not None:
        model.set_attn_implementation(attention.NAME)
        causal_lm = around(model, causal_lm)
    assert fused_layers.install(causal_lm.model) > 0
    return causal_lm


def around(model: PreTrainedModel, like: CausalLM) -> CausalLM:
    return CausalLM(model, like.mode, like.scale, like.softcap)


def sums(causal_lm: CausalLM, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = chunked.loss(*causal_lm.hidden_and_head(batch), batch.targets, batch.weights)
    return loss.detach(), gradients(causal_lm.model, loss)


def long_documents(lengths: Sequence[int] = (300, 33, 150, 140, 7)) -> list[Document]:
    """More tokens than a block of queries; a prompt of a third."""
    rng = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=rng).tolist() for length in lengths]
    return [(row, [0.0] * (len(row) // 3) + [1.0] * (len(row) - len(row) // 3)) for row in rows]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_self_test_puts_blocks_where_there_are_some(name: str) -> None:
    model = build(name)
    names = list(model.state_dict())
    selftest.choose(model)
    replaced = sum("forward" in layer.__dict__ for layer in model.modules())
    assert replaced == (model.config.num_hidden_layers if name in WITH_BLOCKS else 0)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("piece", [llama.PIECE, 100])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_loss_and_every_gradient_equal_hugging_faces(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "PIECE", piece)
    documents = random_documents()
    theirs, their_gradients = hugging_face(build(name), documents, ARCHITECTURES[name].reference)
    loss, ours = sums(fast(name), as_batch(documents))
    assert their_gradients.keys() == ours.keys()
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)
    assert largest_error(ours, their_gradients) <= 1e-5


@pytest.mark.parametrize("kept", [0, 1024])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "cohere2"])
def test_long_documents_are_computed_in_blocks(name: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without kept probabilities, with and without a window, by blocks and by the attention alone."""
    monkeypatch.setattr(document_attention, "KEPT_LENGTH", kept)
    batch = as_batch(long_documents())
    causal_lm = causal_lm_of(name, "packed")
    if name == "gpt2":
        causal_lm = around(_with_positions(causal_lm.model, 300), causal_lm)
    alone_model = copy.deepcopy(causal_lm.model)
    alone_model.set_attn_implementation("sdpa")
    fused_layers.install(causal_lm.model)
    loss, ours = sums(causal_lm, batch)
    expected, theirs = sums(CausalLM(alone_model, "alone", causal_lm.scale, causal_lm.softcap), batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert largest_error(ours, theirs) <= 1e-5


def _with_positions(model: PreTrainedModel, count: int) -> PreTrainedModel:
    torch.manual_seed(1)
    model.transformer.wpe = torch.nn.Embedding(count, model.config.n_embd)
    return model.eval()


@pytest.mark.parametrize("window", [None, 1, 3, 100, 129, 200])
@pytest.mark.parametrize("lengths", [(1,), (128,), (129, 128, 129), (300, 5, 290)])
def test_blocked_attention_equals_its_definition(lengths: tuple[int, ...], window: int | None) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), heads, size) for heads, size in ((4, 8), (2, 8), (2, 6))]
    qkv = [torch.randn(shape, generator=rng, dtype=torch.float64).transpose(1, 2) for shape in shapes]
    qkv = [x.requires_grad_() for x in qkv]
    ours, _ = attention.attend(torch.nn.Module(), *qkv, None, scaling=0.6, sliding_window=window, documents=lengths)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = torch.arange(len(document))[:, None] - torch.arange(len(document))
    visible = (document[:, None] == document) & (distance >= 0) & (distance < (window or 10**6))
    key, value = (x.repeat_interleave(2, 1) for x in qkv[1:])
    scores = (0.6 * qkv[0] @ key.transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-12)
    pull = torch.randn(expected.shape, generator=rng, dtype=torch.float64)
    pairs = zip(torch.autograd.grad(ours, qkv, pull), torch.autograd.grad(expected, qkv, pull), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_in_bf16_they_err_no_more_than_hugging_face(name: str) -> None:
    """Against the same rounded weights in fp64, over all gradients together, and in the loss."""
    documents = long_documents((61, 50, 40, 64))
    rounded = build(name, torch.bfloat16)
    exact_loss, exact = hugging_face(copy.deepcopy(rounded).double(), documents, "eager")
    their_loss, theirs = hugging_face(copy.deepcopy(rounded), documents, ARCHITECTURES[name].reference, padded=True)
    loss, ours = sums(fast(name, rounded), as_batch(documents))
    assert error(ours, exact) <= error(theirs, exact)
    assert abs(loss.double() - exact_loss) <= abs(their_loss - exact_loss) + 1e-4 * exact_loss


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    squares = [(found[name].double() - exact[name]).square().sum() for name in exact]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("name", [*WITH_BLOCKS, "gemma2", "gpt_oss", "gpt2", "qwen3_moe"])
def test_checkpointing_keeps_less_and_changes_no_bit(name: str, mode: Checkpointing) -> None:
    causal_lm, batch = causal_lm_of(name, "packed"), as_batch(random_documents())
    assert bool(fused_layers.install(causal_lm.model)) == (name in WITH_BLOCKS)
    loss, expected = sums(causal_lm, batch)
    recomputing = around(causal_lm.model, causal_lm)
    recomputing.checkpointing = mode
    again, ours = sums(recomputing, batch)
    assert torch.equal(loss, again)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert kept_bytes(recomputing, batch) < 0.9 * kept_bytes(causal_lm, batch)
    assert torch.equal(sums(causal_lm, batch)[0], loss)


def kept_bytes(causal_lm: CausalLM, batch: MicroBatch) -> int:
    """Of what autograd saves, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in causal_lm.model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _ = causal_lm.hidden_and_head(batch)
    assert hidden.requires_grad
    return sum(size for where, size in found.items() if where not in own)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_unmoved(name: str) -> None:
    batch = as_batch(random_documents())
    _, expected = sums(fast(name), batch)
    for index in range(len(expected)):
        causal_lm = fast(name)
        frozen, parameter = list(causal_lm.model.named_parameters())[index]
        parameter.requires_grad_(False)
        _, ours = sums(causal_lm, batch)
        assert ours.keys() == expected.keys() - {frozen}
        assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_nothing_is_kept_without_gradients() -> None:
    batch = as_batch(random_documents())
    causal_lm = fast("llama")
    with torch.no_grad():
        hidden, _ = causal_lm.hidden_and_head(batch)
    assert hidden.grad_fn is None
    assert torch.equal(hidden, causal_lm.hidden_and_head(batch)[0])


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_all_other_calls_go_to_the_layers_themselves(name: str) -> None:
    model, inputs = build(name), padded_inputs(random_documents())
    expected = model(**inputs).logits
    prompts = torch.tensor([[5, 6, 7], [11, 12, 13]])
    generated = model.generate(prompts, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert fused_layers.install(model) == model.config.num_hidden_layers
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.generate(prompts, max_new_tokens=8, do_sample=False, pad_token_id=0), generated)


def test_who_listens_to_a_part_of_a_layer_hears_it() -> None:
    causal_lm, heard = fast("llama"), []
    batch = as_batch(random_documents())
    expected, _ = sums(causal_lm, batch)
    causal_lm.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *x: heard.append(x[0]))
    loss, _ = sums(causal_lm, batch)
    assert heard == [causal_lm.model.model.layers[1].mlp.up_proj]
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_behind_its_attention_the_last_layer_computes_targets_only(name: str) -> None:
    causal_lm, batch, seen = fast(name), as_batch(random_documents()), []
    causal_lm.model.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    trimmed, _ = causal_lm.hidden_and_head(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_layers, "trims", lambda model: False)
        whole, _ = causal_lm.hidden_and_head(batch)
    assert seen == [len(batch.rows), len(batch.tokens)]
    assert len(batch.rows) < len(batch.tokens)
    assert torch.allclose(trimmed, whole, rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_model_has_blocks_of_its_own() -> None:
    causal_lm, batch = fast("llama"), as_batch(random_documents())
    expected, _ = sums(causal_lm, batch)
    twin = around(copy.deepcopy(causal_lm.model), causal_lm)
    for parameter in causal_lm.model.parameters():
        parameter.data.zero_()
    assert torch.equal(sums(twin, batch)[0], expected)


def test_a_layer_that_somebody_changed_is_left_alone() -> None:
    changes: list[Any] = [
        lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()),
        lambda layer: setattr(layer.mlp, "up_proj", type("Odd", (torch.nn.Linear,), {})(32, 48, bias=False)),
        lambda layer: setattr(layer.self_attn, "o_proj", torch.nn.Linear(32, 32, bias=True)),
    ]
    for change in changes:
        model = build("llama")
        change(model.model.layers[0])
        assert fused_layers.install(model) == 1


def test_a_block_that_computes_something_else_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = llama._rotate
    monkeypatch.setattr(llama, "_rotate", lambda heads, cos, sin: rotate(heads, cos, -sin * 0.5))
    model = build("llama")
    causal_lm = selftest.choose(model)
    assert (causal_lm.mode, causal_lm.note) == ("packed", "")
    assert not any("forward" in layer.__dict__ for layer in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_writes_to_nothing_that_others_hold(dtype: torch.dtype) -> None:
    """Least of all to the gradient that comes in, which is the residual stream's as well."""
    rng = torch.Generator().manual_seed(0)
    grad, given, residual = (torch.randn(7, 16, generator=rng).to(dtype) for _ in range(3))
    weight, inverse = torch.randn(16, generator=rng).to(dtype), llama._inverse_size(given, 1e-6)
    held = given, residual, weight, inverse
    before = [tensor.clone() for tensor in held]
    llama._norm(given, inverse, weight)
    llama._norm_backward(grad, given, inverse, weight, residual)
    assert all(torch.equal(now, then) for now, then in zip(held, before, strict=True))
