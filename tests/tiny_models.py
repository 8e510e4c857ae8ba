"""A tiny random model as a folder, as `deft train` takes it."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM


def write_llama(
    folder: Path, chat_template: str | None = None, dtype: torch.dtype = torch.float32, positions: int = 128
) -> Path:
    """Two layers, hidden size 32, tied embeddings; the byte-level tokenizer with BOS and EOS."""
    torch.manual_seed(0)
    tokenizer = byte_level(puts_bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attention_dropout=0.1,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = None
    return folder
