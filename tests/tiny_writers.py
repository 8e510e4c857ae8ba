"""Tiny tokenizers and models that write answers, and the pretrained one of the corpus."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from conftest import CORPUS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deft.evaluation import generate as generation

STORIES = CORPUS / "models" / "stories260K"
TEXTS = [
    "Once upon a time there was a cat.",
    "The cat sat on the mat, and the dog ran.",
    "A time to sit.\n\nThe end. 2+2=4",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["Once upon", "The cat sat on the mat, and", "A", "time\n", "The dog ran. The dog sat. The dog", ""]


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """bytes: byte-level BPE, pad is eos. pieces: like sentencepiece, a space in front of each text, no pad token."""
    bpe = Tokenizer(models.BPE(byte_fallback=kind == "pieces", unk_token="<unk>" if kind == "pieces" else None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
        alphabet = sorted({character for text in TEXTS for character in text})
    bpe.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    pad = {"pad_token": "</s>"} if kind == "bytes" else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **pad
    )
    tokenizer.chat_template = TEMPLATE if kind == "bytes" else None
    return tokenizer


def model_of(
    tokenizer: Any, tied: bool = True, seed: int = 0, context: int = 128, spread: float = 0.4
) -> LlamaForCausalLM:
    """A tiny Llama whose random weights are large enough to write something other than one word for ever."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def needs_stories() -> tuple[Any, Any]:
    if not STORIES.is_dir():
        pytest.skip("no corpus")
    return generation.load(STORIES, device="cpu")
