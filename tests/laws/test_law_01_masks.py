"""Law 1 on real templates, seen by an independent judge (mask_oracle.py) that must also catch masks broken on purpose.

A sample of benchmarks/masks.py: every third template, with a tiny tokenizer that has its marks.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import mask_cases as cases
import pytest
from mask_oracle import Judge
from tiny_tokenizers import byte_level

from deft.core.types import (
    Conversation,
    Fate,
    Message,
    Origin,
    ToolCall,
)
from deft.encoding.rows import EncodedRow, RowEncoder

USER, ANSWER = Message("user", "What is 2 + 2?"), Message("assistant", "It is 4.")
CALL = ToolCall("search", {"words": ["a", "b's"], "limit": 3}, "abcdefghi")
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "It searches.",
        "parameters": {"type": "object", "properties": {"words": {"type": "array", "description": "What for."}}},
    },
}
PLAIN = (
    (USER, ANSWER),
    (USER, ANSWER, Message("user", "And\n3 + 3? "), Message("assistant", "6.\n\nYes, 6.")),
)
CALLS = (
    USER,
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "none", name="search", tool_call_id="abcdefghi"),
    ANSWER,
)


def chat(messages: tuple[Message, ...], tools: tuple[Any, ...] = ()) -> Conversation:
    return Conversation(Origin("rows", 1), "chat", messages, tools)


@cache
def settings(corpus: Path) -> list[tuple[dict[str, Any], RowEncoder, Judge]]:
    found = []
    for entry in cases.templates(corpus)[::3]:
        made = copy.deepcopy(byte_level())
        made.add_special_tokens({"additional_special_tokens": cases.marks(entry["template"])})
        found.append((entry, cases.row_encoder(entry["template"], made), Judge(entry["template"], made)))
    return found


CHATS = {"one": chat(PLAIN[0]), "two": chat(PLAIN[1]), "calls": chat(CALLS, (TOOL,))}


@cache
def encoded(corpus: Path, name: str) -> list[tuple[dict[str, Any], Judge, EncodedRow]]:
    return [(entry, judge, encoder.encode(CHATS[name])) for entry, encoder, judge in settings(corpus)]


@pytest.mark.parametrize("name", ["one", "two"])
def test_plain_chats_are_learnt_as_the_judge_says_under_93_of_100_templates(corpus: Path, name: str) -> None:
    verdicts: Counter[str] = Counter()
    for entry, judge, row in encoded(corpus, name):
        assert cases.judged(row, judge) == [], entry["name"]
        verdicts[cases.verdict(row)] += entry["renders_plain"]
    assert verdicts["proven"] + verdicts["split"] >= 0.93 * verdicts.total() > 40


def test_tool_calls_are_learnt_as_the_judge_says_or_refused(corpus: Path) -> None:
    verdicts: Counter[str] = Counter()
    for entry, judge, row in encoded(corpus, "calls"):
        assert cases.judged(row, judge) == [], entry["name"]
        verdicts[cases.verdict(row)] += 1
    assert verdicts["proven"] + verdicts["split"] > 20


@pytest.mark.parametrize("name", ["two", "calls"])
def test_the_judge_catches_every_broken_mask(corpus: Path, name: str) -> None:
    thrown: Counter[str] = Counter()
    for entry, judge, row in encoded(corpus, name):
        if row.fate != Fate.TRAINED:
            continue
        for kind, parts in cases.broken(cases.parts_of(row)):
            assert judge.wrong(cases.as_openai(row.conversation), parts, row.notes), (entry["name"], kind)
            thrown[kind] += 1
    assert len(thrown) == 10
    assert thrown.total() > 150


def test_the_judge_knows_which_words_a_template_hides() -> None:
    row = cases.as_openai(chat((Message("system", "Be brief."), USER, ANSWER)))
    reason = "the template shows nothing of messages[0] (system); choose another with template="
    shows = "{% for m in messages %}{{ m.content }}{% endfor %}"
    hides = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert Judge(hides, byte_level()).unjust(row, reason) == []
    assert Judge(shows, byte_level()).unjust(row, reason) == ["its words are shown"]


def test_a_refused_template_trains_by_a_named_choice(corpus: Path) -> None:
    reasons = []
    for entry, encoder, _ in settings(corpus):
        row = encoder.encode(CHATS["two"])
        if row.fate == Fate.TRAINED or not entry["renders_plain"]:
            continue
        reasons.append(row.reason)
        chosen = cases.trained_by(encoder, [CHATS["one"], CHATS["two"]])
        assert chosen is not None, entry["name"]
        assert chosen.wrong == []
    assert reasons
    assert all("opens a reasoning block" in reason or "contradicts itself" in reason for reason in reasons)
