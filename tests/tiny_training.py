"""A tiny model with dropout, and the state and steps of its training, without files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from states import state_around
from transformers import LlamaConfig, LlamaForCausalLM

from deft.core.types import Encoded, Origin
from deft.encoding.rows import Example
from deft.model import selftest
from deft.model.causal_lm import CausalLM
from deft.plan import loader
from deft.plan.loader import Loader
from deft.plan.order import Batching
from deft.training.state import TrainState

VOCABULARY = 64


def dropout_model() -> CausalLM:
    """Two layers, hidden size 16, with dropout in the attention; in training mode; always the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.3,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    causal_lm = selftest.choose(model)
    model.train()
    return causal_lm


def dropout_state() -> TrainState:
    """The model, and an optimizer that has done nothing yet."""
    return state_around(dropout_model())


def random_examples(lengths: tuple[int, ...]) -> list[Example]:
    """Random tokens; every token but the first is learnt, with weights of 1, 2, 3, 1, ..."""
    draw = np.random.default_rng(0)
    tokens = [draw.integers(3, VOCABULARY, length, np.int32) for length in lengths]
    return [
        (Encoded(Origin("a.jsonl", line), each, (1.0 + np.arange(len(each)) % 3).astype(np.float32)),)
        for line, each in enumerate(tokens, 1)
    ]


def planned(lengths: tuple[int, ...] = (40, 9, 30, 12, 25, 17, 33, 8), examples: int = 4) -> Loader:
    """Steps of several micro-batches."""
    return loader.make(random_examples(lengths), Batching(examples=examples), epochs=1, seed=0, microbatch_tokens=48)
