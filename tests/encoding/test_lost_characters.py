"""Characters that a tokenizer has no token for: rows that lose them are told, and nothing is learnt of no answer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from corpus_tokenizers import loaded
from encoders import chat, row_encoder, source
from tiny_tokenizers import TEXT, byte_level, letters, sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deft.core.types import Fate
from deft.dataset import build
from deft.dataset.ledger import SourceLedger
from deft.encoding.coverage import Coverage
from deft.encoding.tokenizer import wrap


def account(tokenizer: PreTrainedTokenizerFast, *rows: Any) -> SourceLedger:
    (found,) = build.encode_sources([source(*rows)], row_encoder(tokenizer=tokenizer)).ledgers
    return found


def unigram() -> PreTrainedTokenizerFast:
    vocabulary = [("<unk>", 0.0), ("▁", -2.0), ("日本", -3.0), ("</s>", -9.0), *((c, -4.0) for c in "abcdehilo")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def word_level() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<unk>", "</s>", "hi", "hello", "日本"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def half_of_the_bytes() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*TEXT, "à"], trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


LOSING = {
    "dropped": letters(),
    "unknown": letters(unknown="<unk>"),
    "unigram": unigram(),
    "word piece": word_piece(),
    "word level": word_level(),
    "bytes that are missing": half_of_the_bytes(),
    "deleted": letters(normalizers.Replace(Regex("[^a-z ]"), "")),
}


@pytest.mark.parametrize("name", LOSING)
def test_a_row_that_loses_characters_is_told_and_an_answer_of_none_is_refused(name: str) -> None:
    gone = "é" if name == "bytes that are missing" else "ж"
    rows = [["hi", "hello"], [f"hi {gone}", "hello"], ["hi", f"hello {gone}"], ["hi", f"{gone}{gone} {gone}"]]
    found = account(LOSING[name], *rows)
    told = next(seen for seen in found.warnings if seen.name == "lost_characters")
    assert told.first[:2] == ("rows.jsonl:2", "rows.jsonl:3")
    if name != "bytes that are missing":  # half a character is a token, though it says nothing
        assert told.rows == 2
        assert found.fates["refused"] == 1
        assert "messages[1], which is learnt: the tokenizer has no token" in found.lost[0][2]


@pytest.mark.parametrize("row", [chat("hi", "ж"), {"text": "ж ж"}, {"prompt": "hi", "completion": "ж"}])
def test_every_shape_is_refused(row: Any) -> None:
    assert account(letters(), row).fates["refused"] == 1


def test_reasoning_and_calls_and_tools_are_looked_at() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "ж"}}}
    tool = {"type": "function", "function": {"name": "f", "description": "ж", "parameters": {}}}
    template = (
        "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning }}{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = (
        chat("hi", "hello", reasoning="ж"),
        chat("hi", "hello", tool_calls=[call]),
        {**chat("hi", "hello"), "tools": [tool]},
    )
    for row in rows:
        data = build.encode_sources([source(row)], row_encoder(template, letters()))
        assert data.ledgers[0].count("lost_characters") == 1, row


def test_what_is_not_learnt_may_be_lost_whole() -> None:
    for row in (chat("ж", "hello"), ["ж", "hello"]):
        found = account(letters(), row)
        assert (found.fates["trained"], found.count("lost_characters")) == (1, 1)


@pytest.mark.parametrize(
    ("normalizer", "answer"),
    [
        (normalizers.Lowercase(), "Hello"),
        (normalizers.NFKC(), "hello ﬁ"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "hellö"),
        (normalizers.Replace("ll", "l"), "hello"),
    ],
)
def test_learnt_text_that_a_normalizer_changes_is_told(normalizer: Any, answer: str) -> None:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.backend_tokenizer.normalizer = normalizer
    found = account(tokenizer, ["hi", "the mat"], ["hi", answer], [answer, "the mat"])
    told = {seen.name: seen.first for seen in found.warnings}
    assert told == {"changed_characters": ("rows.jsonl:2",)}


def test_tokenizers_with_all_bytes_are_never_asked(corpus: Path) -> None:
    made = [loaded(corpus, folder.name) for folder in sorted((corpus / "tokenizers").iterdir())]
    assert len(made) == 5
    assert all(wrap(tokenizer).coverage is None for tokenizer in [*made, byte_level(), sentencepiece()])


def test_a_composed_character_is_the_same_text() -> None:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert account(tokenizer, ["hi", "cafe\u0301"]).warnings == ()


def test_a_character_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = wrap(letters()).coverage
    assert found is not None
    tried: list[str] = []
    alone = Coverage._alone
    monkeypatch.setattr(Coverage, "_alone", lambda self, each: (tried.append(each), alone(self, each))[1])
    texts = ("the ж", "the ж cat", "日", " \u3000\n", "the cat")
    assert [found.kept(text).name for text in texts] == ["LOST", "LOST", "LOST", "WHOLE", "WHOLE"]
    after_ascii = [each for each in tried if not each.isascii()]
    assert sorted(after_ascii) == sorted({*after_ascii})


def test_a_token_of_several_characters_covers_them() -> None:
    found = wrap(unigram()).coverage
    assert found is not None
    assert (found.kept("日本").name, found.kept("日").name, found.keeps_nothing("日本")) == ("WHOLE", "LOST", False)


def test_a_character_that_is_composed_of_two_that_have_tokens_is_lost() -> None:
    made = letters(normalizers.NFC())
    found = wrap(made).coverage
    assert found is not None
    assert [found.keeps_nothing(text) for text in ("e\u0301", "e", "ee\u0301")] == [True, False, False]
    assert account(made, ["hi", "hello"], ["hi", "he\u0301llo"]).count("lost_characters") == 1


def test_one_row_alone_is_refused_too() -> None:
    row = row_encoder(tokenizer=letters()).encode(source(["hi", "ж"])[1].first)  # type: ignore[arg-type]
    assert row.fate == Fate.REFUSED
