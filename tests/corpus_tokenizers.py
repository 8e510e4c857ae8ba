"""Tokenizers of the corpus, each loaded once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast


@cache
def loaded(corpus: Path, name: str) -> PreTrainedTokenizerFast:
    """It is everybody's: whoever changes one loads their own."""
    made: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(corpus / "tokenizers" / name)
    return made
