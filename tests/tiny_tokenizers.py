"""Tokenizers made on the spot: a byte-level BPE, and a sentencepiece-like one that opens texts with a space."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "What is the capital of France? The capital of France is Paris.\n\n",
    "user: Hello there, assistant: Hi! How can I help you today?\n",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. It is 4. 2 + 2",
    "system\nYou are a helpful assistant.\nuser\nassistant\nthe cat sat on the mat and slept all day long",
]
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def byte_level(bos: bool = True, puts_bos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """EOS is </s>; with `puts_bos` the tokenizer itself opens a text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrapped(tokenizer, bos, puts_bos, pad)


@cache
def sentencepiece(puts_bos: bool = True) -> PreTrainedTokenizerFast:
    """BPE over text in which a space is "▁" and each text opens with one, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *SPECIALS, *byte_tokens], show_progress=False
    )
    words = [word for text in TEXT for word in text.replace("\n", " \n ").split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    return _wrapped(_without_added(tokenizer, byte_tokens), True, puts_bos, True)


def letters(normalizer: normalizers.Normalizer | None = None, unknown: str | None = None) -> PreTrainedTokenizerFast:
    """BPE over the words of TEXT that has tokens for their characters alone: others are dropped, or are `unknown`."""
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [*([unknown] if unknown else []), *SPECIALS]
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    if normalizer:
        tokenizer.normalizer = normalizer
    return _wrapped(tokenizer, True, False, True)


def _without_added(tokenizer: Tokenizer, texts: list[str]) -> Tokenizer:
    """The same vocabulary, with `texts` no longer special: the trainer makes all that it is given special."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in texts]
    return Tokenizer.from_str(json.dumps(state))


def _wrapped(tokenizer: Tokenizer, bos: bool, puts_bos: bool, pad: bool) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    if puts_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    names = {"eos_token": "</s>", **({"bos_token": "<s>"} if bos else {}), **({"pad_token": "<pad>"} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
