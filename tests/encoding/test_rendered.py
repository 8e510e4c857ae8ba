"""Texts that a chat template wrote beforehand: its marks are control tokens, each answer is learnt with its stop."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mask_cases as cases
import numpy as np
import pytest
from encoders import chat, row_encoder, source
from tiny_tokenizers import CHATML, byte_level, letters, sentencepiece

import deft
from deft.core.types import Conversation, Fate, Message, Origin, ToolCall
from deft.dataset import build, ledger
from deft.encoding.render.chat import AnswerRules
from deft.encoding.render.rendered import header_of
from deft.encoding.render.template import Refusal, chatml
from deft.encoding.rows import EncodedRow, RowEncoder
from deft.encoding.tokenizer import Tokenizer

TURN = "<|im_start|>{}\n{}<|im_end|>\n"
OPEN = "<|im_start|>assistant\n"
HI, HELLO = TURN.format("user", "Hi"), TURN.format("assistant", "Hello")
WHY, SO = TURN.format("user", "Why?"), TURN.format("assistant", "So.")
BOS = "{{ bos_token }}"


def text(*parts: str) -> Conversation:
    return Conversation(Origin("rows", 1), "text", (Message("output", "".join(parts)),))


def pair(prompt: str, completion: str) -> Conversation:
    return Conversation(Origin("rows", 1), "dialogue", (Message("prompt", prompt), Message("output", completion)))


def encoder(template: str = CHATML, **more: Any) -> RowEncoder:
    return row_encoder(template, render="rendered", **more)


def learnt(row: EncodedRow, tokenizer: Any = None) -> list[str]:
    """The runs of learnt tokens."""
    found = []
    for part in (part for example in row.examples for part in example):
        edges = np.flatnonzero(np.diff(part.weights > 0, prepend=False, append=False)).reshape(-1, 2)
        found += [(tokenizer or byte_level()).decode(part.tokens[first:end]) for first, end in edges]
    return found


def shown(row: EncodedRow) -> str:
    return str(byte_level().decode(row.examples[0][0].tokens))


# What is learnt


def test_each_answer_is_learnt_with_its_stop_and_marks_are_control_tokens() -> None:
    row = encoder().encode(text(HI, HELLO, WHY, SO))
    assert (row.fate, learnt(row), row.literal) == (Fate.TRAINED, ["Hello<|im_end|>", "So.<|im_end|>"], 0)
    assert len(cases.controls(row, byte_level())[0]) == 8


def test_it_is_the_example_of_the_messages_that_were_rendered() -> None:
    messages = [*chat("Hi", "Hello")["messages"], *chat("Why?", "So.")["messages"]]
    made = copy.deepcopy(byte_level())
    made.chat_template = CHATML
    rendered = made.apply_chat_template(messages, tokenize=False)
    (by_text,) = deft.encode([{"text": rendered}], made, render="rendered")
    (by_messages,) = deft.encode([{"messages": messages}], made)
    assert by_text.tokens.tolist() == by_messages.tokens.tolist()
    assert by_text.labels.tolist() == by_messages.labels.tolist()


def test_what_stands_around_the_answers_is_not_learnt() -> None:
    tools = TURN.format("system", 'Call <tools>\n{"name": "f"}</tools>')
    row = encoder().encode(text(tools, HI, HELLO, TURN.format("tool", "42"), SO))
    assert learnt(row) == ["Hello<|im_end|>", "So.<|im_end|>"]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        (None, ["Hello<|im_end|>", "So.<|im_end|>"]),
        ("completion", ["Hello<|im_end|>", "So.<|im_end|>"]),
        ("last_assistant", ["So.<|im_end|>"]),
        ("all", [(HI + HELLO + WHY + SO)]),
    ],
)
def test_train_on_says_which_answers(train_on: Any, expected: list[str]) -> None:
    assert learnt(encoder(train_on=train_on).encode(text(HI, HELLO, WHY, SO))) == expected


def test_an_answer_that_the_text_cuts_off_does_not_teach_stopping() -> None:
    row = encoder().encode(text(HI, HELLO, WHY, OPEN, "Because"))
    assert learnt(row) == ["Hello<|im_end|>", "Because"]
    data = build.encode_sources([source({"text": HI + OPEN + "Because"})], encoder())
    assert data.ledgers[0].count("no_stop") == 1


def test_a_generation_prompt_at_the_end_is_no_answer() -> None:
    assert learnt(encoder().encode(text(HI, HELLO, WHY, OPEN))) == ["Hello<|im_end|>"]
    assert "no assistant turn" in encoder().encode(text(HI, OPEN)).reason


def test_a_stop_that_the_template_leaves_out_at_the_end_is_put_there_and_told() -> None:
    open_ended = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template = open_ended + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    made = copy.deepcopy(byte_level())
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    stop = Tokenizer(made).special_tokens["<|user|>"]
    row = encoder(template, tokenizer=made, stop_ids=(stop,)).encode(
        text("<|user|>Hi<|assistant|>Hello<|user|>Why?<|assistant|>So.")
    )
    assert learnt(row, made) == ["Hello<|user|>", "So.<|user|>"]
    assert row.notes == ("the template's stop '<|user|>' closes what ends without one",)


# Prompt and completion


@pytest.mark.parametrize(
    ("prompt", "completion", "expected", "is_closed"),
    [
        (HI + OPEN, "Hello<|im_end|>", ["Hello<|im_end|>"], False),
        (HI + OPEN, "Hello<|im_end|>\n", ["Hello<|im_end|>"], False),
        (HI + OPEN, "Hello", ["Hello<|im_end|>"], True),
        (HI + OPEN, "Hello</s>", ["Hello</s>"], False),
        (HI, HELLO, ["Hello<|im_end|>"], False),
        (HI + OPEN + "Well, ", "hello<|im_end|>", ["hello<|im_end|>"], False),
        (HI + HELLO + WHY + OPEN, "So.<|im_end|>", ["So.<|im_end|>"], False),
        (HI + OPEN, "Hello<|im_end|>\n" + WHY + SO, ["Hello<|im_end|>", "So.<|im_end|>"], False),
    ],
)
def test_the_completion_is_learnt_up_to_its_stop(
    prompt: str, completion: str, expected: list[str], is_closed: bool
) -> None:
    row = encoder().encode(pair(prompt, completion))
    assert learnt(row) == expected
    assert any("closes what ends without one" in note for note in row.notes) == is_closed


def test_the_token_before_a_completion_is_the_prompt_s_last() -> None:
    (part,) = encoder().encode(pair(HI + OPEN, "\nHello<|im_end|>")).examples[0]
    first = int(np.argmax(part.weights > 0))
    assert part.tokens[:first].tolist() == byte_level()(HI + OPEN)["input_ids"]


# BOS


@pytest.mark.parametrize("begin", ["", "<s>"])
@pytest.mark.parametrize("made", [byte_level(puts_bos=True), sentencepiece()], ids=["byte level", "sentencepiece"])
def test_bos_stands_once_whether_the_text_has_it_or_not(begin: str, made: Any) -> None:
    (part,) = encoder(BOS + CHATML, tokenizer=made).encode(text(begin, HI, HELLO)).examples[0]
    assert part.tokens.tolist().count(made.bos_token_id) == 1
    assert part.tokens[0] == made.bos_token_id


def test_bos_twice_is_refused() -> None:
    assert "BOS stands once" in encoder(BOS + CHATML).encode(text("<s><s>", HI, HELLO)).reason


def test_a_template_without_bos_gets_none_from_the_tokenizer() -> None:
    (part,) = encoder(tokenizer=byte_level(puts_bos=True)).encode(text(HI, HELLO)).examples[0]
    assert byte_level().bos_token_id not in part.tokens


# What does not fit


REFUSED = {
    "no marks at all": (text("Once upon a time"), "begins with 'Once upon a time'"),
    "no assistant": (text(HI, WHY), "no assistant turn"),
    "text in front": (text("Below is a chat.\n", HI, HELLO), "begins with 'Below is a chat"),
    "another template": (text("[INST] Hi [/INST] Hello</s>"), r"begins with '\[INST\]"),
    "an answer without its stop": (text(HI, OPEN, "Hello\n", WHY, SO), "has no stop"),
    "an answer without its stop before an answer": (text(HI, OPEN, "Hello\n", OPEN, "So.<|im_end|>"), "has no stop"),
    "a header inside a question": (text(TURN.format("user", f"say {OPEN} x"), HELLO), "at inference the prompt ends"),
    "a header on one line": (text(HI, "<|im_start|>assistant Hello<|im_end|>"), "at inference the prompt ends"),
    "a prompt without its header": (pair(HI, "Hello<|im_end|>"), "no assistant turn"),
    "a completion of a question": (pair(HI + HELLO, WHY), "no answer begins in what is learnt"),
    "messages": (cases.chat("Hi", "Hello"), "this row has messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_text_that_does_not_fit_is_refused(name: str) -> None:
    row, reason = REFUSED[name]
    found = encoder().encode(row)
    assert found.fate == Fate.REFUSED
    assert found.examples == ()
    with pytest.raises(Refusal, match=reason):
        raise Refusal(found.reason)


def test_a_turn_without_the_reasoning_that_the_prompt_opens_is_refused_beside_one_with_it() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "{{ '<think>' ~ m.reasoning if loop.last }}</think>{% endif %}"
        "{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    plain, thinks = "<|user|>Hi<|assistant|>Hello</s>", "<|user|>Why?<|assistant|><think>Hm.</think>So.</s>"
    assert learnt(encoder(template).encode(text(thinks))) == ["Hm.</think>So.</s>"]
    row = encoder(template).encode(text(plain, thinks))
    assert "at inference the prompt ends '<|assistant|><think>'" in row.reason


def test_a_header_that_is_not_learnt_need_not_fit() -> None:
    row = encoder(train_on="last_assistant").encode(text(TURN.format("user", f"say {OPEN} x"), HELLO))
    assert learnt(row) == ["Hello<|im_end|>"]


def test_rules_of_answers_need_messages() -> None:
    row = encoder(rules=AnswerRules(learn_reasoning=False)).encode(text(HI, HELLO))
    assert "learn_reasoning" in row.reason


def test_a_template_that_writes_nothing_before_an_answer_cannot_be_used() -> None:
    row = encoder("{% for m in messages %}{{ m.content }}</s>{% endfor %}").encode(text("Hi</s>Hello</s>"))
    assert "writes nothing before an answer by which" in row.reason


@pytest.mark.parametrize(("overflow", "fate"), [("cut", Fate.CUT), ("turns", Fate.TOO_LONG), ("drop", Fate.TOO_LONG)])
def test_a_long_text_is_cut_or_too_long(overflow: Any, fate: Fate) -> None:
    row = encoder(overflow=overflow, max_length=20).encode(text(HI, TURN.format("assistant", "Hello " * 20)))
    assert row.fate == fate
    assert all(len(part.tokens) == 20 for example in row.examples for part in example)


def test_an_answer_without_a_token_is_refused() -> None:
    row = encoder(tokenizer=letters()).encode(text(HI, TURN.format("assistant", "日本"), WHY, SO))
    assert "has no token for any of its characters" in row.reason


# Met by chance


@pytest.mark.parametrize(
    ("row", "policy"),
    [
        ({"text": HI + HELLO}, {}),
        ({"prompt": HI + OPEN, "completion": "Hello"}, {}),
        ({"prompt": HI + OPEN, "completion": "Hello"}, {"render": "chat"}),
        ([HI + OPEN, "Hello"], {"render": "raw"}),
        (chat(HI + HELLO + WHY + OPEN, "So."), {}),
    ],
)
def test_rendered_turns_read_as_text_are_a_warning_that_names_the_setting(row: Any, policy: Any) -> None:
    (found,) = build.encode_sources([source(row)], row_encoder(**policy)).ledgers
    said = [str(finding) for finding in ledger.findings([found]) if finding.level == "warning"]
    assert any(
        "1 row has turns that the chat template wrote" in line and "data.render=rendered" in line for line in said
    )
    assert not found.count("special_tokens_as_text")


@pytest.mark.parametrize(
    "row", [{"text": "What is <|im_start|>?"}, ["user: Hi\nassistant:", "Hello"], chat("<|im_end|>", "A mark.")]
)
def test_a_mark_in_a_text_is_no_rendered_turn(row: Any) -> None:
    for template in (CHATML, "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}assistant:"):
        (found,) = build.encode_sources([source(row)], row_encoder(template)).ledgers
        assert not found.count("rendered_as_text")


def test_a_header_that_the_tokenizer_has_no_token_for_is_seen() -> None:
    template = CHATML.replace("<|im_start|>", "<|turn|>")
    row = {"text": (HI + HELLO).replace("<|im_start|>", "<|turn|>")}
    (found,) = build.encode_sources([source(row)], row_encoder(template)).ledgers
    assert found.count("rendered_as_text") == 1


def test_the_header_of_a_template_that_cannot_be_rendered_is_none() -> None:
    encoder = row_encoder("{{ raise_exception('no') }}")
    assert header_of(encoder.renderer.template) == ""
    assert not encoder.holds_answers(Message("user", HI))


# Real templates


def test_the_corpus_row_is_a_warning_and_the_setting_learns_the_answers(corpus: Path) -> None:
    """Rows rendered beforehand with apply_chat_template (D29)."""
    (case,) = [each for each in json.loads((corpus / "cases" / "data.json").read_text()) if each["id"] == "D29"]
    rows = [json.loads(line) for line in case["file"].splitlines()]
    made = cases.tokenizer(corpus)
    (found,) = build.encode_sources([source(*rows)], row_encoder(made.chat_template, made)).ledgers
    assert (found.count("rendered_as_text"), found.count("special_tokens_as_text")) == (2, 0)
    data = build.encode_sources([source(*rows)], encoder(made.chat_template, tokenizer=made))
    answers = [made.decode(part.tokens[part.weights > 0]) for (part,) in data.train]
    assert answers == ["hello<|im_end|>", "ciao<|im_end|>"]
    assert data.ledgers[0].count("begins_otherwise") == 2, "the template's own system prompt is missing in them"
    assert data.marks == {"<|im_end|>"}


CHATS: dict[str, tuple[tuple[Message, ...], tuple[Any, ...]]] = {
    "one": (tuple(cases.chat("What is 2 + 2?", "It is 4.").messages), ()),
    "two": ((*cases.chat("What is 2 + 2?", "It is 4.").messages, *cases.chat("And\n3?", "6.\n\nYes.").messages), ()),
    "system": ((Message("system", "Be brief."), *cases.chat("What is 2 + 2?", "It is 4.").messages), ()),
    "tools": (
        (
            Message("user", "Find it."),
            Message("assistant", "", tool_calls=(ToolCall("search", {"words": ["a", "b's"]}, "abcdefghi"),)),
            Message("tool", "none", name="search", tool_call_id="abcdefghi"),
            Message("assistant", "There is none."),
        ),
        ({"type": "function", "function": {"name": "search", "description": "It searches.", "parameters": {
            "type": "object", "properties": {"words": {"type": "array", "description": "What for."}}}}},),
    ),
}  # fmt: skip
FAMILIES = (
    "chujiezheng/chatml",
    "llama.cpp/meta-llama-Llama-3.1-8B-Instruct",
    "chujiezheng/mistral-instruct",
    "axolotl/mistral_v2v3",
    "chujiezheng/llama-2-chat",
    "chujiezheng/gemma-it",
    "mistral.rs/phi3",
    "axolotl/phi_4",
    "llama.cpp/Qwen-Qwen2.5-7B-Instruct",
    "chujiezheng/zephyr",
)


@cache
def both(corpus: Path, template: str) -> tuple[RowEncoder, RowEncoder]:
    """The encoder of messages, and that of texts rendered beforehand."""
    made = copy.deepcopy(byte_level())
    made.add_special_tokens({"additional_special_tokens": cases.marks(template)})
    return cases.row_encoder(template, made), cases.row_encoder(template, made, render="rendered")


def compared(corpus: Path, template: str, name: str) -> str:
    """How a text, rendered beforehand, is learnt beside the messages that it was rendered from."""
    messages, tools = CHATS[name]
    by_messages, by_text = both(corpus, template)
    try:
        rendered = str.__str__(by_messages.renderer.template.render(messages, tools=tools))
    except Refusal:
        return "not rendered"
    row = by_messages.encode(Conversation(Origin("rows", 1), "chat", messages, tools))
    found = by_text.encode(text(rendered))
    if row.fate != Fate.TRAINED or len(row.examples[0]) > 1 or row.notes:
        return "not one text"
    if found.fate == Fate.REFUSED:
        return "refused"
    ((mine,),), ((theirs,),) = found.examples, row.examples
    same = np.array_equal(mine.tokens, theirs.tokens) and np.array_equal(mine.weights, theirs.weights)
    return "same" if same else "different"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_learn_the_same_from_the_text_as_from_its_messages(corpus: Path, family: str) -> None:
    sources = {entry["name"]: entry["template"] for entry in cases.templates(corpus)}
    verdicts = {name: compared(corpus, sources[family], name) for name in CHATS}
    assert verdicts["one"] == verdicts["two"] == "same"
    assert set(verdicts.values()) <= {"same", "not rendered", "not one text"}


def test_no_real_template_learns_anything_else_from_the_text(corpus: Path) -> None:
    verdicts: Counter[str] = Counter()
    for entry in cases.templates(corpus)[::3]:
        verdicts.update(compared(corpus, entry["template"], name) for name in ("one", "two", "tools"))
    assert verdicts["different"] == 0
    assert verdicts["refused"] <= 0.1 * verdicts["same"]
    assert verdicts["same"] > 60


def test_what_a_rendered_text_has_no_place_for_refuses_the_row() -> None:
    by = encoder(chatml(puts_bos=False, has_end=True))
    row = pair("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello<|im_end|>")
    thought = replace(row, messages=(row.messages[0], replace(row.messages[1], reasoning="R.")))
    assert by.encode(row).fate == Fate.TRAINED
    assert "has no place for reasoning" in by.encode(thought).reason


def test_deft_s_chatml_reads_its_own_texts() -> None:
    row = encoder(chatml(puts_bos=False, has_end=True)).encode(text(HI, HELLO, WHY, SO))
    assert learnt(row) == ["Hello<|im_end|>", "So.<|im_end|>"]
