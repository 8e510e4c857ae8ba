"""Tiny random models of many architectures, and batches for them: shared by the tests of laws 6 and 11."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deft.core.types import IGNORED, MicroBatch
from deft.model import attention, selftest
from deft.model.causal_lm import CausalLM, Mode

VOCABULARY = 130
WINDOW = 8
"""Shorter than the longest documents of the tests."""

FLOOR = 1e-2
"""Where 1e-5 of a tensor's own norm is asked for, 1e-7 of the global norm will do: a key bias has only rounding."""

Document = tuple[Sequence[int], Sequence[float]]


@dataclass(frozen=True)
class Architecture:
    """mode is what the self-test must choose; reference the attention of transformers that it is compared with."""

    config: Callable[[], Any]
    mode: Mode = "packed"
    reference: str = "eager"


def llama_like(name: str, **settings: Any) -> Callable[[], Any]:
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return lambda: getattr(transformers, f"{name}Config")(**(shared | settings))


def gpt_like(name: str, **settings: Any) -> Callable[[], Any]:
    shared = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return lambda: getattr(transformers, f"{name}Config")(**(shared | settings))


NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
WINDOWED = {"sliding_window": WINDOW, "num_hidden_layers": 3}
MIXED = {**WINDOWED, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

ARCHITECTURES = {
    "llama": Architecture(llama_like("Llama"), reference="sdpa"),
    "llama_tied": Architecture(llama_like("Llama", tie_word_embeddings=True)),
    "qwen2": Architecture(llama_like("Qwen2"), reference="sdpa"),
    "qwen3": Architecture(llama_like("Qwen3", head_dim=16), reference="sdpa"),
    "mistral": Architecture(llama_like("Mistral", **WINDOWED), reference="sdpa"),
    "gemma2": Architecture(
        llama_like(
            "Gemma2",
            head_dim=16,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=0.5,
            final_logit_softcapping=2.0,
            **MIXED,
        )
    ),
    "gemma3": Architecture(llama_like("Gemma3Text", head_dim=16, query_pre_attn_scalar=24, **MIXED)),
    "gpt2": Architecture(
        gpt_like("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
    "gpt_neox": Architecture(
        gpt_like(
            "GPTNeoX",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            **NO_DROPOUT,
        )
    ),
    "opt": Architecture(
        gpt_like(
            "OPT",
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            dropout=0.0,
            attention_dropout=0.0,
        )
    ),
    "cohere": Architecture(llama_like("Cohere", logit_scale=0.25)),
    "cohere2": Architecture(llama_like("Cohere2", logit_scale=0.25, **MIXED)),
    "granite": Architecture(
        llama_like(
            "Granite", logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.1
        )
    ),
    "phi3": Architecture(llama_like("Phi3", **WINDOWED), reference="sdpa"),
    "olmo2": Architecture(llama_like("Olmo2")),
    "gpt_oss": Architecture(llama_like("GptOss", head_dim=16, **EXPERTS, **MIXED)),
    "mixtral": Architecture(llama_like("Mixtral", **EXPERTS)),
    "qwen3_moe": Architecture(llama_like("Qwen3Moe", head_dim=16, **EXPERTS)),
    "bloom": Architecture(gpt_like("Bloom", hidden_size=32, n_layer=2, n_head=4, **NO_DROPOUT), mode="alone"),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The architecture, random but with attention, biases and sinks far from zero, so that each of them counts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def causal_lm_of(name: str, mode: Mode) -> CausalLM:
    """The architecture in this mode, whatever the self-test would choose; constants of the head as it found them."""
    chosen = selftest.choose(build(name))
    model = build(name)
    if mode == "packed":
        model.set_attn_implementation(attention.NAME)
    return CausalLM(model, mode, chosen.scale, chosen.softcap)


def random_documents(seed: int = 0) -> list[Document]:
    """Lengths 5, 17, 17, 31 and 1, each a prompt that is not learnt, then targets, with a hole of weight 0."""
    rng = torch.Generator().manual_seed(seed)
    documents = []
    for length, prompt in ((5, 2), (17, 9), (17, 3), (31, 12), (1, 0)):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=rng).tolist()
        weights = [0.0] * prompt + [1.0] * (length - prompt)
        if length > 20:
            weights[20] = 0.0
        documents.append((tokens, weights))
    return documents


def as_batch(documents: Sequence[Document]) -> MicroBatch:
    """Documents end to end, shifted: row t predicts token t + 1 with the weight of token t + 1.

       tokens    [5 6 7   8 9]    weights  [0 1 2   1 1]
    -> rows      [0 1     3]      targets  [6 7     9]      weights [1 2     1]
    """
    tokens, positions, rows, targets, weights = [], [], [], [], []
    for document, learnt in documents:
        start = len(tokens)
        tokens += document
        positions += range(len(document))
        for t in range(1, len(document)):
            if learnt[t] > 0:
                rows.append(start + t - 1)
                targets.append(document[t])
                weights.append(learnt[t])
    return MicroBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        documents=tuple(len(document) for document, _ in documents),
        rows=torch.tensor(rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float32),
    )


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that the loss depends on; the model's own .grad is cleared."""
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def hugging_face(
    model: PreTrainedModel, documents: Sequence[Document], own_attention: str, padded: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token-summed loss and gradients of model(input_ids, labels) under its own attention.

    One document at a time, or all of them in one batch, padded on the right.
    """
    if model.config._attn_implementation != own_attention:
        model.set_attn_implementation(own_attention)
    learnt = [document for document in documents if any(weight > 0 for weight in document[1][1:])]
    total = torch.zeros((), dtype=torch.float64)
    sums: dict[str, Tensor] = {}
    for batch in [learnt] if padded else [[document] for document in learnt]:
        inputs = padded_inputs(batch)
        count = (inputs["labels"][:, 1:] != IGNORED).sum()
        loss = model(**inputs, use_cache=False).loss * count
        total += loss.detach().double()
        for name, gradient in gradients(model, loss).items():
            sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient
    return total, sums


def padded_inputs(documents: Sequence[Document]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels as Hugging Face wants them, padded on the right."""
    rows = []
    longest = max(len(tokens) for tokens, _ in documents)
    for tokens, learnt in documents:
        labels = [token if weight > 0 else IGNORED for token, weight in zip(tokens, learnt, strict=True)]
        gap = longest - len(tokens)
        rows.append([[*tokens, *[0] * gap], [1] * len(tokens) + [0] * gap, [*labels, *[IGNORED] * gap]])
    return dict(zip(("input_ids", "attention_mask", "labels"), torch.tensor(rows).unbind(1), strict=True))


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest over tensors of ||a - b|| / max(||b||, FLOOR * global norm); no gradient counts as zero."""
    norm = torch.stack([g.double().norm() for g in theirs.values()]).norm()
    assert norm > 0
    errors = []
    for name in ours.keys() | theirs.keys():
        like = ours.get(name, theirs.get(name))
        a, b = (side.get(name, torch.zeros_like(like)).double() for side in (ours, theirs))
        errors.append(float((a - b).norm() / b.norm().clamp_min(FLOOR * norm)))
    return max(errors)
