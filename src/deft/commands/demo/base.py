"""The demo's base before any training: a small tokenizer and random weights in an ordinary Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deft.core import files

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CONTEXT = 256

_WORDS = r"\p{Lu}\p{L}*| ?\p{Ll}\p{L}*|[^\p{L}]"
"""A word takes the space before it along unless it starts with a capital: a name is one and the same token at the start
of a line, inside it, and at the start of an answer. A model this small hardly learns that two tokens are one name."""


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from texts: any text survives a round trip, BOS stands in front, no template.

    >>> tokenizer = build_tokenizer(["Mara keeps a pony."] * 2, vocab_size=300)
    >>> tokenizer.convert_ids_to_tokens(tokenizer("Mara keeps").input_ids)
    ['<|bos|>', 'Mara', 'Ġkeeps']
    >>> tokenizer.decode(tokenizer("Žofie née 7!\\n").input_ids, skip_special_tokens=True)
    'Žofie née 7!\\n'
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def write_base(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> None:
    """Write the tokenizer and an untrained Llama of about a million parameters as a Hugging Face folder.

    The same seed writes the same weights; torch's global random state stays as it was.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.07,  # about 1/sqrt(hidden_size): the usual 0.02 starts too flat at this width
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with files.staged(folder) as staging:
        model.save_pretrained(staging.path)
        tokenizer.save_pretrained(staging.path)
