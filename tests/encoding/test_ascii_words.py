"""ASCII text has the same ids word by word as the tokenizer itself gives it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SPECIALS, byte_level, sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from deft.encoding import ascii_words
from deft.encoding import tokenizer as edge
from deft.encoding.ascii_words import AsciiWords, translated

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "qwen": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama 3": CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + CONTRACTIONS
    + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + CONTRACTIONS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "categories": r"\p{Lu}\p{Ll}+|\p{L}+|\p{N}+|[\p{P}]+|[\p{S}]+|\s+|[^\s\p{L}\p{N}\p{P}\p{S}]+",
}
OFTEN = st.sampled_from([*" \n\r\t'.,!<>|aAsStTdDlLrReEvVmM019", "the ", "'ll", "\n\n", "   "])
ASCII = st.lists(OFTEN | st.characters(max_codepoint=127), max_size=30).map("".join)


def backend(name: str) -> Tokenizer:
    """The tiny byte-level BPE with the words of a known family."""
    tokenizer = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    if name in PATTERNS:
        split = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return tokenizer


def own(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", [*PATTERNS, "gpt-2"])
def test_ascii_text_has_the_tokenizer_s_own_ids(name: str) -> None:
    tokenizer = backend(name)
    words = AsciiWords.of(tokenizer)
    assert words

    @given(text=ASCII)
    @settings(max_examples=300, deadline=None)
    def check(text: str) -> None:
        found = words.ids(text)
        assert (found is None) == any(special in text for special in SPECIALS)
        assert found is None or np.frombuffer(found, np.int32).tolist() == own(tokenizer, text)

    check()


def test_other_text_is_left_to_the_tokenizer() -> None:
    tokenizer = backend("qwen")
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    words = AsciiWords.of(tokenizer)
    assert words
    assert all(words.ids(text) is None for text in ("né", "a </s> b", "a <tool> b", "你"))
    assert words.ids("a < tool > b") is not None


OTHERS = [
    pre_tokenizers.Whitespace(),
    pre_tokenizers.ByteLevel(add_prefix_space=True),
    pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s"), "removed"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s"), "isolated", invert=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
]


@pytest.mark.parametrize("other", OTHERS)
def test_other_tokenizers_have_no_words(other: pre_tokenizers.PreTokenizer) -> None:
    tokenizer = backend("gpt-2")
    tokenizer.pre_tokenizer = other
    assert AsciiWords.of(tokenizer) is None
    assert AsciiWords.of(sentencepiece().backend_tokenizer) is None


@pytest.mark.parametrize(
    "pattern", [r"\w+", r"a{1,3}+", r".", r"^a", r"(a)", r"[a&&b]", r"[[a]b]", r"\p{Greek}", r"\h", r"a$", r"\p{Lt}["]
)
def test_what_may_mean_something_else_is_not_translated(pattern: str) -> None:
    assert translated(pattern) is None


def test_words_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ascii_words._CLASSES, "N", "0-8")
    assert AsciiWords.of(backend("qwen")) is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascii_words, "_REMEMBERED_WORDS", 3)
    words = AsciiWords.of(backend("qwen"))
    assert words
    text = "one two three four " + "x" * 100
    assert np.frombuffer(words.ids(text) or b"", np.int32).tolist() == own(backend("qwen"), text)
    assert len(words._known) == 3


@pytest.mark.parametrize("name", ["qwen2.5", "gpt2", "minimind"])
def test_corpus_text_has_the_tokenizer_s_own_ids(corpus: Path, name: str) -> None:
    tokenizer = edge.load(str(corpus / "tokenizers" / name))
    words = AsciiWords.of(tokenizer._backend)
    assert words
    lines = (corpus / "data" / "v1_sft_demo.jsonl").read_text(encoding="utf-8").splitlines()[:150]
    texts = [*lines, *(json.dumps(json.loads(line), indent=2) for line in lines)]
    quick = [words.ids(text) for text in texts]
    assert sum(ids is not None for ids in quick) > 100
    for text, ids in zip(texts, quick, strict=True):
        assert ids is None or np.frombuffer(ids, np.int32).tolist() == own(tokenizer._backend, text)
