"""Faster blocks under laws 6, 7 and 11: the same loss and gradients as the layers that they stand in for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    VOCABULARY,
    Document,
    as_batch,
    build,
    gradients,
    hugging_face,
    largest_error,
    learner_of,
    padded_inputs,
    random_documents,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from deft.loss import nll
from deft.model import attention, causal, faster, selftest
from deft.model.blocks import llama
from deft.model.checkpointing import Checkpointing
from deft.model.learner import Learner
from deft.training import step
from deft.types import Batch, Head

WITH_BLOCKS = ["llama", "llama_tied", "qwen2", "qwen3", "mistral"]


class ProductSizes(TorchDispatchMode):
    """The sizes and layouts of the matrix products that are made: kind, left, right, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            left, right = [each for each in args if isinstance(each, Tensor)][-2:]
            layouts = (each.stride()[-1] == 1 for each in (left, right))
            kind = ("batched" if "bmm" in name else "gemm", left.dtype)
            self.sizes.add((kind[0], kind[1], left.shape, right.shape, *layouts, "add" in name))
        return function(*args, **(kwargs or {}))


def fast(name: str, model: PreTrainedModel | None = None) -> Learner:
    learner = learner_of(name, "packed")
    if model is not None:
        model.set_attn_implementation(attention.NAME)
        learner = replace(learner, model=model)
    assert faster.install(learner.model) > 0
    return learner


def sums(learner: Learner, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = nll.loss(*learner.hidden_and_head(batch), batch.targets, batch.weights)
    return loss.detach(), gradients(learner.model, loss)


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
    monkeypatch.setattr(causal, "KEPT_LENGTH", kept)
    batch = as_batch(long_documents())
    learner = learner_of(name, "packed")
    if name == "gpt2":
        learner = replace(learner, model=_with_positions(learner.model, 300))
    alone_model = copy.deepcopy(learner.model)
    alone_model.set_attn_implementation("sdpa")
    faster.install(learner.model)
    loss, ours = sums(learner, batch)
    expected, theirs = sums(Learner(alone_model, "alone", learner.scale, learner.softcap), batch)
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
    learner, batch = learner_of(name, "packed"), as_batch(random_documents())
    assert bool(faster.install(learner.model)) == (name in WITH_BLOCKS)
    loss, expected = sums(learner, batch)
    thrifty = replace(learner, checkpointing=mode)
    again, ours = sums(thrifty, batch)
    assert torch.equal(loss, again)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert kept_bytes(thrifty, batch) < 0.9 * kept_bytes(learner, batch)
    assert torch.equal(sums(learner, batch)[0], loss)


def kept_bytes(learner: Learner, batch: Batch) -> int:
    """Of what autograd saves, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in learner.model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _ = learner.hidden_and_head(batch)
    assert hidden.requires_grad
    return sum(size for where, size in found.items() if where not in own)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_unmoved(name: str) -> None:
    batch = as_batch(random_documents())
    _, expected = sums(fast(name), batch)
    for index in range(len(expected)):
        learner = fast(name)
        frozen, parameter = list(learner.model.named_parameters())[index]
        parameter.requires_grad_(False)
        _, ours = sums(learner, batch)
        assert ours.keys() == expected.keys() - {frozen}
        assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_nothing_is_kept_without_gradients() -> None:
    batch = as_batch(random_documents())
    learner = fast("llama")
    with torch.no_grad():
        hidden, _ = learner.hidden_and_head(batch)
    assert hidden.grad_fn is None
    assert torch.equal(hidden, learner.hidden_and_head(batch)[0])


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_all_other_calls_go_to_the_layers_themselves(name: str) -> None:
    model, inputs = build(name), padded_inputs(random_documents())
    expected = model(**inputs).logits
    prompts = torch.tensor([[5, 6, 7], [11, 12, 13]])
    generated = model.generate(prompts, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert faster.install(model) == model.config.num_hidden_layers
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.generate(prompts, max_new_tokens=8, do_sample=False, pad_token_id=0), generated)


def test_who_listens_to_a_part_of_a_layer_hears_it() -> None:
    learner, heard = fast("llama"), []
    batch = as_batch(random_documents())
    expected, _ = sums(learner, batch)
    learner.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *x: heard.append(x[0]))
    loss, _ = sums(learner, batch)
    assert heard == [learner.model.model.layers[1].mlp.up_proj]
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_behind_its_attention_the_last_layer_computes_targets_only(name: str) -> None:
    learner, batch, seen = fast(name), as_batch(random_documents()), []
    learner.model.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    trimmed, _ = learner.hidden_and_head(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster, "trims", lambda model: False)
        whole, _ = learner.hidden_and_head(batch)
    assert seen == [len(batch.rows), len(batch.tokens)]
    assert len(batch.rows) < len(batch.tokens)
    assert torch.allclose(trimmed, whole, rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_model_has_blocks_of_its_own() -> None:
    learner, batch = fast("llama"), as_batch(random_documents())
    expected, _ = sums(learner, batch)
    twin = replace(learner, model=copy.deepcopy(learner.model))
    for parameter in learner.model.parameters():
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
        assert faster.install(model) == 1


def test_a_block_that_computes_something_else_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = llama._rotate
    monkeypatch.setattr(llama, "_rotate", lambda heads, cos, sin: rotate(heads, cos, -sin * 0.5))
    model = build("llama")
    learner, note = selftest.choose(model)
    assert (learner.mode, note) == ("packed", "")
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


@pytest.mark.parametrize("name", WITH_BLOCKS)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_micro_batch_needs_no_product_that_was_not_tried_before(name: str, checkpointing: Checkpointing) -> None:
    for each in (llama._try_products, llama._try_attention, nll._try_products):
        each.cache_clear()
    learner = replace(fast(name), checkpointing=checkpointing)
    learner.model.to(torch.bfloat16)
    batch = as_batch(long_documents())
    with ProductSizes() as tried:
        step.make_kernels(learner, batch, nll)
    with ProductSizes() as again:
        step.make_kernels(learner, batch, nll)
    with ProductSizes() as needed:
        step.nll_sum(learner, batch, nll).backward()
    assert len(needed.sizes) > 20
    assert needed.sizes <= tried.sizes
    assert not again.sizes
    rows = {left[0] for kind, _, left, *_ in needed.sizes if kind == "gemm"}
    assert len(batch.tokens) + learner.padding(batch) == 640
    assert 640 in rows
    assert rows.isdisjoint({len(batch.tokens), len(batch.rows)})


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("targets", [300, 5000])
def test_the_loss_needs_no_product_that_was_not_tried_before(
    targets: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few blocks are summed in bf16, many in fp32."""
    monkeypatch.setattr(nll, "CPU_BLOCK", 2**16)
    nll._try_products.cache_clear()
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, generator=rng).bfloat16().requires_grad_() for size in ((targets, 16), (1_000, 16), (1_000,))
    )
    head = Head(weight, bias if has_bias else None, 1.0, None)
    with ProductSizes() as tried:
        nll.make_kernels(head, targets)
    with ProductSizes() as needed:
        nll.loss(hidden, head, torch.arange(targets) % 1_000, torch.ones(targets)).backward()
    assert len(needed.sizes) >= 3
    assert needed.sizes <= tried.sizes
