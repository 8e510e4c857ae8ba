"""Law 6: the sums of a pack equal the sums of its members run alone; and the self-test that proves it for a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference_loss as reference
import torch
import transformers
from architectures import (
    ARCHITECTURES,
    EXPERTS,
    VOCABULARY,
    WINDOW,
    as_batch,
    build,
    causal_lm_of,
    gpt_like,
    gradients,
    largest_error,
    llama_like,
    padded_inputs,
    random_documents,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deft.core.errors import InputError
from deft.core.types import MicroBatch
from deft.model import attention, selftest
from deft.model.causal_lm import CausalLM
from deft.model.cpu import document_attention

PACKED = [name for name, kind in ARCHITECTURES.items() if kind.mode == "packed"]
WITHOUT_SDPA = ["gemma2", "gpt_oss"]


def sums(causal_lm: CausalLM, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = reference.loss(*causal_lm.hidden_and_head(batch), batch.targets, batch.weights)
    return loss.detach(), gradients(causal_lm.model, loss)


def weighted_batch(lengths: tuple[int, ...] = (9, 9, 31, 5, 9, 1, 17, 17)) -> MicroBatch:
    rng = torch.Generator().manual_seed(0)
    documents = []
    for length in lengths:
        tokens = torch.randint(3, VOCABULARY, (length,), generator=rng).tolist()
        documents.append((tokens, [max(0.0, w) for w in torch.randn(length, generator=rng).tolist()]))
    return as_batch(documents)


# The pack and its members.


@pytest.mark.parametrize("name", PACKED)
def test_a_pack_sums_to_its_members(name: str) -> None:
    batch = weighted_batch()
    loss, our_gradients = sums(causal_lm_of(name, "packed"), batch)
    expected, their_gradients = sums(causal_lm_of(name, "alone"), batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert largest_error(our_gradients, their_gradients) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_the_order_of_documents_does_not_matter(name: str) -> None:
    documents = random_documents()
    causal_lm = causal_lm_of(name, "packed")
    loss, our_gradients = sums(causal_lm, as_batch(documents))
    other_loss, other_gradients = sums(causal_lm, as_batch(documents[::-1]))
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-6)
    assert largest_error(our_gradients, other_gradients) < 1e-5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2", "qwen3_moe"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    batch = weighted_batch()
    causal_lm = causal_lm_of(name, "packed")
    causal_lm.model.train()
    loss, expected = sums(causal_lm, batch)
    causal_lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, our_gradients = sums(causal_lm, batch)
    assert torch.equal(loss, again)
    assert largest_error(our_gradients, expected) < 1e-6


# The attention itself, against its definition.


def by_definition(query: Tensor, key: Tensor, value: Tensor, documents: tuple[int, ...], **rules: Any) -> Tensor:
    """[1, M, Q, D], one score at a time in one big matrix."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = rules["scaling"] * query @ key.transpose(-1, -2)
    if rules.get("softcap") is not None:
        scores = rules["softcap"] * torch.tanh(scores / rules["softcap"])
    document = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))
    index = torch.arange(len(document))
    distance = index[:, None] - index[None, :]
    visible = (document[:, None] == document[None, :]) & (distance >= 0)
    if rules.get("sliding_window") is not None:
        visible &= distance < rules["sliding_window"]
    weights = torch.where(visible, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    if rules.get("s_aux") is not None:
        total = total + rules["s_aux"].exp().view(1, -1, 1, 1)
    return (weights / total @ value).transpose(1, 2)


def make_qkv(tokens: int, dtype: torch.dtype = torch.float64, key_heads: int = 2, value_size: int = 8) -> list[Tensor]:
    rng = torch.Generator().manual_seed(tokens)
    shapes = [(4, 8), (key_heads, 8), (key_heads, value_size)]
    # Heads second and tokens third on strided memory, as models pass them.
    rows = [torch.randn(1, tokens, h, d, generator=rng, dtype=torch.float64).to(dtype) for h, d in shapes]
    return [row.transpose(1, 2).requires_grad_() for row in rows]


RULES = {
    "causal": {},
    "window": {"sliding_window": 4},
    "wide window": {"sliding_window": 100},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 0.7},
    "sinks": {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)},
    "all": {"sliding_window": 4, "softcap": 0.7, "s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)},
}
DOCUMENTS = (3, 3, 1, 9, 4, 4, 5, 12)
"""One shorter than a window of 4, as long, one longer; some neighbours are equal."""


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("value_size", [8, 6])
def test_attention_equals_its_definition(rules: str, key_heads: int, value_size: int) -> None:
    qkv = make_qkv(sum(DOCUMENTS), key_heads=key_heads, value_size=value_size)
    settings = {"scaling": 0.6, **RULES[rules]}
    ours, no_weights = attention.attend(nn.Module(), *qkv, None, documents=DOCUMENTS, **settings)
    expected = by_definition(*qkv, DOCUMENTS, **settings)
    assert no_weights is None
    assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12)
    pull = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(ours, qkv, pull), torch.autograd.grad(expected, qkv, pull), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_sinks_get_their_gradient() -> None:
    qkv = make_qkv(sum(DOCUMENTS))
    settings = {"scaling": 0.6, "s_aux": RULES["sinks"]["s_aux"].clone().requires_grad_()}
    ours, _ = attention.attend(nn.Module(), *qkv, None, documents=DOCUMENTS, **settings)
    expected = by_definition(*qkv, DOCUMENTS, **settings)
    pairs = [torch.autograd.grad(out.square().sum(), [settings["s_aux"]])[0] for out in (ours, expected)]
    assert torch.allclose(*pairs, rtol=1e-12)


@pytest.mark.parametrize("lengths", [(5, 5, 40), (300,)], ids=["short", "long"])
@pytest.mark.parametrize("rules", ["causal", "window"])
def test_half_precision_is_as_exact_by_products_as_by_sdpa(lengths: tuple[int, ...], rules: str) -> None:
    qkv = make_qkv(sum(lengths), torch.bfloat16)
    settings = {"scaling": 0.6, **RULES[rules]}
    ours, _ = attention.attend(nn.Module(), *qkv, None, documents=lengths, **settings)
    exact = by_definition(*(x.double() for x in qkv), lengths, **settings)
    assert ours.dtype == torch.bfloat16
    assert (
        float((ours.double() - exact).detach().norm() / exact.detach().norm()) < 1.5 * torch.finfo(torch.bfloat16).eps
    )


@pytest.mark.parametrize("takes_gqa", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_for_gpus_is_asked_for_the_same(
    takes_gqa: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """varlen_attn itself runs on CUDA only: here stands its contract, as its docstring has it."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert query.shape[1] == key.shape[1] or (enable_gqa and takes_gqa)
        assert cu_seq_q is cu_seq_k
        assert cu_seq_q.dtype == torch.int32
        lengths = cu_seq_q.diff().tolist()
        assert max_q == max_k == max(lengths)
        left, right = window_size
        assert right == 0
        reach = None if left == -1 else left + 1
        heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
        return by_definition(*heads_first, tuple(lengths), scaling=scale, sliding_window=reach)[0]

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_VARLEN_TAKES_GQA", takes_gqa)
    monkeypatch.setattr(attention, "_fits_varlen", lambda *_: True)
    qkv = make_qkv(sum(DOCUMENTS))
    edges = attention.packing_arguments(DOCUMENTS, torch.device("cpu"))["cu_seq_lens_q"]
    settings = {"scaling": 0.6, "sliding_window": window}
    ours, _ = attention.attend(nn.Module(), *qkv, None, documents=DOCUMENTS, cu_seq_lens_q=edges, **settings)
    assert torch.allclose(ours, by_definition(*qkv, DOCUMENTS, **settings), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_attention_equals_its_definition(rules: str, dtype: torch.dtype) -> None:
    qkv = make_qkv(sum(DOCUMENTS), dtype)
    packing = attention.packing_arguments(DOCUMENTS, torch.device("cuda"))
    packing.pop("attention_mask")
    settings = {"scaling": 0.6, **RULES[rules]}
    on_gpu = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in settings.items()}
    ours, _ = attention.attend(nn.Module(), *(x.cuda() for x in qkv), None, **packing, **on_gpu)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = by_definition(*exact, DOCUMENTS, **settings)
    eps = 3 * torch.finfo(dtype).eps
    assert float((ours.cpu().double() - expected).norm() / expected.norm()) < eps
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad(expected, exact, pull.double())
    for a, b in zip(torch.autograd.grad(ours, qkv, pull.to(ours)), theirs, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 2 * eps


def test_documents_that_do_not_cover_the_micro_batch_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="do not cover"):
        attention.attend(nn.Module(), *make_qkv(10), None, documents=(4, 5))


# Without documents it is ordinary attention: the model can generate and be evaluated by others as it stands.


@pytest.mark.parametrize("name", PACKED)
def test_without_documents_the_model_is_its_ordinary_self(name: str) -> None:
    model = build(name)
    inputs = padded_inputs(random_documents())
    inputs.pop("labels")
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation(attention.NAME)
        ours = model(**inputs).logits
    is_real = inputs["attention_mask"].bool()
    assert torch.allclose(ours[is_real], expected[is_real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", *WITHOUT_SDPA])
def test_without_documents_it_generates_as_before(name: str) -> None:
    model = build(name)
    prompts = torch.tensor([[0, 0, 0, 5, 6, 7], [11, 12, 13, 14, 15, 16]])
    generate = partial(
        model.generate, prompts, attention_mask=(prompts > 0).long(), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    expected = generate()
    model.set_attn_implementation(attention.NAME)
    assert torch.equal(generate(), expected)


# The self-test.


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_mode_is_chosen(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    causal_lm = selftest.choose(model)
    assert causal_lm.mode == ARCHITECTURES[name].mode
    assert bool(causal_lm.note) == (causal_lm.mode != "packed")
    assert causal_lm.model is model
    assert (model.config._attn_implementation == attention.NAME) == (causal_lm.mode == "packed")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_fallback_has_a_reason() -> None:
    causal_lm = selftest.choose(build("bloom"))
    assert causal_lm.note == (
        "bloom: attention does not go through transformers' AttentionInterface; documents run one at a time"
    )


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_left_as_it_was(training: bool) -> None:
    model = build("llama").train(training)
    model.model.layers[1].train(not training)
    before = [module.training for module in model.modules()]
    selftest.choose(model)
    assert [module.training for module in model.modules()] == before


def test_dropout_does_not_disturb_the_choice() -> None:
    torch.manual_seed(0)
    config = gpt_like("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64)()
    causal_lm = selftest.choose(AutoModelForCausalLM.from_config(config).train())
    assert causal_lm.mode == "packed"


class DropsDocuments(transformers.LlamaModel):
    def forward(self, *args: Any, documents: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class RefusesKeywords(transformers.LlamaModel):
    """Takes what Llama's own forward names, whatever a release of transformers names it, and nothing else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = inspect.signature(transformers.LlamaModel.forward).parameters
        if refused := sorted(kwargs.keys() - named):
            raise TypeError(f"forward() got an unexpected keyword argument {refused[0]!r}")
        return super().forward(*args, **kwargs)


class IgnoresPositions(transformers.GPT2Model):
    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class HidesItsWindow(transformers.MistralModel):
    def forward(self, *args: Any, windows_seen: Any = None, **kwargs: Any) -> Any:
        seen: list[int | None] | None = None if windows_seen is None else []
        output = super().forward(*args, windows_seen=seen, **kwargs)
        if seen is not None:
            windows_seen += [None] * len(seen)
        return output


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("llama", DropsDocuments, "llama: the documents' lengths reach 0 of 2 attention layers"),
        ("llama", RefusesKeywords, "llama: packed documents fail (TypeError: "),
        ("gpt2", IgnoresPositions, "gpt2: packed documents are not the same as alone"),
        ("mistral", HidesItsWindow, "mistral: its sliding window does not reach the attention"),
    ],
)
def test_a_body_that_breaks_packing_runs_alone(name: str, body: Callable[..., nn.Module], reason: str) -> None:
    model = build(name)
    broken = body(model.config)
    broken.load_state_dict(model.base_model.state_dict())
    setattr(model, model.base_model_prefix, broken)
    causal_lm = selftest.choose(model.eval())
    assert causal_lm.mode == "alone"
    assert causal_lm.note.startswith(reason)
    assert causal_lm.note.endswith("; documents run one at a time")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("loudness", [1.0, 0.03])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_ignores_documents_is_found(
    dtype: torch.dtype, loudness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where attention adds so little that its error would pass for rounding."""
    model = build("llama", dtype)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= loudness
    layout = document_attention.document_order
    monkeypatch.setattr(document_attention, "document_order", lambda documents, *x: layout((sum(documents),), *x))
    causal_lm = selftest.choose(model)
    assert causal_lm.mode == "alone"
    assert "packed documents are not the same as alone" in causal_lm.note


OTHERS = {
    "chunked attention": (
        llama_like("Llama", layer_types=["full_attention", "chunked_attention"]),
        "llama: its layers of type chunked_attention need a mask of their own; documents run one at a time",
    ),
    "recurrent layers, which are not told of documents on CPUs": (
        llama_like(
            "Qwen3Next",
            num_hidden_layers=4,
            head_dim=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=24,
            **EXPERTS,
        ),
        "qwen3_next: packed documents fail (ValueError: ",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_layers_that_our_attention_cannot_stand_in_for_run_alone(case: str) -> None:
    config, reason = OTHERS[case]
    torch.manual_seed(0)
    causal_lm = selftest.choose(AutoModelForCausalLM.from_config(config()).eval())
    assert causal_lm.mode == "alone"
    assert causal_lm.note.startswith(reason)


def test_a_body_that_cannot_be_found_leaves_all_to_the_model() -> None:
    """Llama 4's text model names a base model that it does not have (transformers 5.23)."""
    config = llama_like("Llama4Text", attention_chunk_size=4, intermediate_size_mlp=48, head_dim=8, **EXPERTS)()
    causal_lm = selftest.choose(AutoModelForCausalLM.from_config(config).eval())
    assert causal_lm.mode == "whole"
    assert causal_lm.note.startswith("llama4_text: its body cannot be told from its head")


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = llama_like("Bert", is_decoder=False)()
    with pytest.raises(InputError, match=r"^bert: its attention sees later tokens"):
        selftest.choose(transformers.BertLMHeadModel(config).eval())


def test_windows_are_shorter_than_the_documents_tried() -> None:
    assert max(length for length in weighted_batch().documents) > 2 * WINDOW


def test_a_batch_is_shifted_inside_each_document() -> None:
    batch = as_batch([([5, 6, 7], [0, 1, 2]), ([8, 9], [1, 1])])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.rows.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.weights.tolist() == [1, 2, 1]
