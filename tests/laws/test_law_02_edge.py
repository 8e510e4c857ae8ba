"""Law 2: no token straddles a span's edge; the tokens before a span are those of the prompt alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpus_tokenizers import loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, byte_level, sentencepiece

import deft
from deft.core.types import Rendered, Span
from deft.encoding.edges import Coder
from deft.encoding.tokenizer import Tokenizer

TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}
TEXT = st.text(st.sampled_from("ab \n.?tThecatso 'é你"), min_size=1, max_size=12)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXT, answer=TEXT)
@settings(max_examples=150, deadline=None)
def test_tokens_before_a_span_are_the_prompt_s_own(name: str, prompt: str, answer: str) -> None:
    tokenizer = Tokenizer(TOKENIZERS[name])
    text = prompt + answer
    coded = Coder(tokenizer).encode(Rendered(text, (Span(len(prompt), len(text)),), ()))
    alone = tokenizer.ids(prompt)
    assert coded.tokens[: len(alone)].tolist() == alone
    assert coded.weights.tolist() == [0.0] * len(alone) + [1.0] * (len(coded.tokens) - len(alone))
    assert tokenizer.hf.decode(coded.tokens).replace(" ", "") == tokenizer.hf.decode(tokenizer.ids(text)).replace(
        " ", ""
    )


def test_a_merge_over_the_edge_is_counted_and_undone() -> None:
    tokenizer = Tokenizer(byte_level())
    merged = Coder(tokenizer).encode(Rendered("the cat", (Span(4, 7),), ()))
    assert merged.split_at_edges
    assert merged.tokens.tolist() == tokenizer.ids("the ") + tokenizer.ids("cat")
    clean = Coder(tokenizer).encode(Rendered("the cat", (Span(3, 7),), ()))
    assert not clean.split_at_edges
    assert clean.tokens.tolist() == tokenizer.ids("the cat")


def test_the_space_that_sentencepiece_puts_opens_a_text_only() -> None:
    tokenizer = Tokenizer(sentencepiece())
    (pair,) = deft.encode([{"prompt": "the", "completion": "cat"}], tokenizer.hf)
    assert tokenizer.hf.decode(pair.tokens, skip_special_tokens=True) == "thecat"


def test_weights_belong_to_the_tokens_of_the_span(corpus: Path) -> None:
    from deft.data import sources

    rows = [row.value for row in sources.read(str(corpus / "data" / "fastchat_dummy_conversation.json"))]
    checked = 0
    for name in ("qwen2.5", "mistral-v1", "minimind"):
        tokenizer = loaded(corpus, name)
        batch = deft.encode(rows[:200], tokenizer, max_length=4096)
        for example in batch:
            answers = [m["value"] for m in rows[example.origin.line - 1]["conversations"] if m["from"] == "gpt"]
            learnt = np.flatnonzero(example.weights)
            spans = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1)
            texts = [tokenizer.decode(example.tokens[span], skip_special_tokens=True).strip() for span in spans]
            assert texts == [answer.strip() for answer in answers][-len(texts) :]
            checked += len(texts)
    assert checked > 1000


def test_clean_chats_are_encoded_as_apply_chat_template_does() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": " \n\nIt is 4. "}] * 2
    (example,) = deft.encode([{"messages": chat}], tokenizer)
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert example.tokens.tolist() == ids[: len(example.tokens)]
    assert tokenizer.decode(ids[len(example.tokens) :]) == "\n"
    tokenizer.chat_template = None
