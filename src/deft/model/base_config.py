"""config.json of a model, read by transformers and made fit for training; what cannot be trained is refused here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from deft.core.errors import InputError, Problem, Problems
from deft.model import multimodal, security


def read(path: str) -> PreTrainedConfig:
    """The config of a model folder or hub id, without an attention of its own choice.

    Raises Problems where it asks for code to be run, or describes what deft cannot train; transformers' own exceptions
    where it is no config.
    """
    security.check_keys(path)
    security.check_config(path)
    security.check_index(path)
    raw, _ = PreTrainedConfig.get_config_dict(path)
    for key in ("dtype", "torch_dtype"):
        if isinstance(said := raw.get(key), str) and not isinstance(getattr(torch, said, None), torch.dtype):
            raise InputError(str(Problem(f"{path}: config.json", f"{key} {said!r} is none of torch's", "take it out")))
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if problems := [Problem(f"{path}: config.json", what, fix) for what, fix in _against(config)]:
        raise Problems("this model cannot be trained:", problems)
    for part in (config, config.get_text_config()):
        part._attn_implementation = None  # flash_attention_2 in a file would have transformers look for it
    return config


def folder(path: str) -> Path:
    """Where the files of a model folder or hub id lie on this machine."""
    found = cached_file(path, "config.json")
    assert found is not None, path
    return Path(found).parent


def _against(config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    """Why it is no model to train, and what to do."""
    text = config.get_text_config()
    if config.is_encoder_decoder:
        yield f"{config.model_type} is an encoder-decoder, not a causal language model", "name another model"
    elif multimodal.auto_class(config) is None:
        fix = "name a model that transformers lists under AutoModelForCausalLM"
        yield f"{config.model_type} is not a causal language model", fix
    if quantized := getattr(config, "quantization_config", None):
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        fix = "name the model that it was made from; quantize=nf4 beside an adapter does the same to it"
        yield f"its weights are quantized ({getattr(kind, 'value', kind)})", fix
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and not (isinstance(positions, int | float) and positions >= 1):
        yield f"max_position_embeddings is {positions!r}", "say how many tokens a text may have"
    size, pad = getattr(text, "vocab_size", None), getattr(text, "pad_token_id", None)
    if not isinstance(size, int):
        yield f"vocab_size is {size!r}", "download or save the model again"
    elif isinstance(pad, int) and pad >= size:
        yield f"pad_token_id {pad} is past the vocabulary of {size}", "take it out, or name one of its tokens"
