"""Chats rendered by the pattern of their shape are those that the whole proof gives."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from corpus_tokenizers import loaded
from encoders import row_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import understand
from tiny_tokenizers import CHATML, byte_level, sentencepiece

from deft.core.types import (
    Conversation,
    Message,
    Origin,
    Rendered,
)
from deft.data import sources
from deft.dataset import examples
from deft.encoding import tokenizer as edge
from deft.encoding.edges import Coder
from deft.encoding.render import chat as chats
from deft.encoding.render.chat import ChatRenderer
from deft.encoding.render.patterns import Pattern
from deft.encoding.render.stop import Marks
from deft.encoding.render.template import Refusal, Template, choose
from deft.encoding.rows import EncodedRow, Policy, RowEncoder
from deft.encoding.tokenizer import Tokenizer

LOOP = (
    "{%% for m in messages %%}<|{{ m.role }}|>{%% set c = m.content %%}%s{{ eos_token if m.role == 'assistant' }}"
    "{%% endfor %%}{%% if add_generation_prompt %%}<|assistant|>{%% endif %%}"
)

IN_PLACE = {
    "as it is": "{{ c }}",
    "stripped": "{{ c | trim }}",
    "stripped on one side": "{{ c.lstrip('\\n') }}",
    "put together": "{{ ('[' + c ~ ']') | trim }}",
    "stripped after it was put together": "{{ ('  ' + c + '  ').strip() }}",
    "a block": "{% set b %} {{ c }} {% endset %}{{ b | trim }}",
    "a macro": "{% macro f(x) %}({{ x }}){% endmacro %}{{ f(c) }}",
    "joined": "{{ ['a', c, 'b'] | join('-') }}{{ '' .join([m.role]) }}",
    "a type": "{% if c is string and c is not none and c is defined %}{{ c }}{% else %}?{% endif %}",
    "emptiness": "{% if not c %}?{% endif %}{{ c or 'nothing' }}",
    "what it holds": "{% if 'hi' in c %}{{ c }}!{% else %}{{ c }}{% endif %}",
    "what it does not hold": "{{ c }}{% if '<x>' not in c %}?{% endif %}",
    "how it begins": "{{ c }}{% if c.startswith('hi') %}!{% endif %}{{ '.' if not c.endswith(' ') }}",
    "what it equals": "{{ c }}{{ 'same' if c == 'hi' else 'other' }}{{ 'in' if c in ['hi', 'ho'] }}",
    "what is not split": "{{ c.split('</x>')[-1] }}",
    "what is not replaced": "{{ c.replace('<x>', '[x]') }}{{ '' if c.find('<y>') < 0 else '?' }}",
    "filters of lists": "{{ c }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "a namespace": "{% set n = namespace(s='') %}{% set n.s = n.s + c %}{{ n.s }}",
}
"""What a template may do with content `c` that leaves it in its place: patterns render most chats of such templates."""

CHANGED = {
    "length": "{{ c }}{{ c | length }}",
    "a character": "{{ c }}{{ c[0] }}",
    "a slice": "{{ c[1:] }}",
    "upper case": "{{ c | upper }}",
    "its characters": "{% for x in c %}{{ x }}{% endfor %}",
    "a pattern": "{{ '%s' | format(c) }}",
    "percent": "{{ '%s!' % c }}",
    "a key": "{{ c }}{{ {'hi': 1}.get(c, 2) }}",
    "its place in text": "{{ c }}{{ 'in' if c in 'hi there' }}",
    "its place, by a test": "{{ c }}{{ 'in' if c is in 'hi there' }}",
    "order": "{{ c }}{{ 'less' if c < 'm' }}",
    "a number": "{{ c }}{{ c | int }}",
    "JSON": "{{ c | tojson }}",
    "a list as text": "{{ [c] }}",
    "a method of other text": "{{ c }}{{ 'hi there'.startswith(c) }}",
    "replaced by it": "{{ 'X'.replace('X', c) }}",
    "lines": "{{ c.splitlines() | join('|') }}",
    "words": "{{ c }}{{ c | wordcount }}",
    "sorted": "{{ c }}{{ [c, 'm'] | sort | first }}",
    "unique": "{{ c }}{{ [c, 'hi'] | unique | list | length }}",
}

WORDS = st.lists(st.sampled_from(["hi", "ho", "hi there", "<x>", "</x>", " ", "\n", "m", "é"]), min_size=1, max_size=4)
CONTENT = WORDS.map("".join)


def renderer(template: str) -> ChatRenderer:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatRenderer(Template(template, tokens), Marks("</s>", ("</s>",), ("<s>", "</s>")))


def pair(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


def weights(messages: Sequence[Message]) -> list[float]:
    return [float(message.role == "assistant") for message in messages]


def rendered(by: ChatRenderer, messages: Sequence[Message]) -> list[Rendered] | str:
    try:
        return by.render(messages, weights(messages))
    except Refusal as refusal:
        return str(refusal)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each chat of a shape that has a pattern: whether the pattern rendered it."""
    found: list[bool] = []
    ordinary = Pattern.rendered

    def noted(*args: object) -> Rendered | None:
        text = ordinary(*args)
        found.append(text is not None)
        return text

    monkeypatch.setattr(Pattern, "rendered", noted)
    return found


@pytest.mark.parametrize("name", [*IN_PLACE, *CHANGED])
def test_whatever_a_template_does_with_words_patterns_render_as_the_proof_does(name: str, used: list[bool]) -> None:
    template = LOOP % {**IN_PLACE, **CHANGED}[name]
    by_pattern = renderer(template)

    @given(chats=st.lists(st.tuples(CONTENT, CONTENT), min_size=4, max_size=6))
    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    def check(chats: list[tuple[str, str]]) -> None:
        for question, answer in chats:
            messages = pair(question, answer)
            assert rendered(by_pattern, messages) == rendered(renderer(template), messages)

    check()
    assert name in CHANGED or sum(used) > len(used) / 10


LOST = {
    "history": "{% if loop.last %}{{ c }}{% else %}{{ c | trim }}?{% endif %}",
    "the last message": "{{ c }}{{ messages[-1].content }}",
    "the number of messages": "{{ messages | length }}{{ c }}",
    "dropped words": "{{ c if m.role == 'user' }}",
    "words twice": "{{ c + c }}",
    "words cut at their ends": "{{ c.strip('h') }}",
}
"""What a template may do to words and turns that the prompt law forbids."""


@pytest.mark.parametrize("name", LOST)
def test_no_pattern_renders_what_the_prompt_law_forbids(name: str, used: list[bool]) -> None:
    by_pattern = renderer(LOOP % LOST[name])
    for n in range(4):
        messages = pair(f"What is {n}?", f"hi {n}") + pair("And?", f"ho {n}")
        assert rendered(by_pattern, messages) == rendered(renderer(LOOP % LOST[name]), messages)
    assert not any(used)


WORDS_DECIDE = {
    "the prompt": "{{ '?' if add_generation_prompt and 'x' in messages[-1].content }}",
    "the text after the turn": "{{ '!' if not add_generation_prompt and 'x' in messages[-1].content }}",
    "the beginning": "{{ '' if loop.index > 1 or 'x' not in messages[0].content else '#' }}",
    "a turn as the last message": "{{ '~' if loop.last and loop.index == 2 and 'x' in c }}",
}
"""What a template may write because of words: a pattern of chats without an x must not stand for one with it."""


@pytest.mark.parametrize("name", WORDS_DECIDE)
def test_a_chat_for_which_the_template_writes_something_else_is_proven_by_itself(name: str, used: list[bool]) -> None:
    inside = "{{ c }}" + WORDS_DECIDE[name] if name == "a turn as the last message" else "{{ c }}"
    template = LOOP % inside
    if name == "the beginning":
        template = LOOP % (WORDS_DECIDE[name] + "{{ c }}")
    elif inside == "{{ c }}":
        template += WORDS_DECIDE[name]
    by_pattern = renderer(template)
    plain = [pair(f"q {n}", f"a {n}") + pair("And?", f"b {n}") for n in range(3)]
    for messages in plain:
        assert rendered(by_pattern, messages) == rendered(renderer(template), messages)
    assert used == [True, True]
    special = pair("q x", "a x") + pair("And x?", "b x")
    assert rendered(by_pattern, special) == rendered(renderer(template), special)
    assert used == [True, True, False]


BY_WORDS = {
    "words taken from another message": (
        "{{ messages[0].content if 'same' in messages[0].content else c }}",
        pair("same", "same"),
    ),
    "turns in another order": (
        "{{ (messages | reverse | list)[loop.index0].content if 'same' in messages[0].content else c }}",
        pair("same", "same"),
    ),
    "the template's own words": ("{{ '[hi]' if c == '[hi]' else c }}", pair("a", "[hi]")),
    "words repeated": ("{{ c }}{{ c if c == '!hi!' else '!hi!' }}", pair("a", "!hi!")),
    "a special token": ("{{ '<' ~ 's>' if c[1:] == 's>' else c }}", pair("<s>", "a")),
}
"""What a template may do with words by what they say, and a chat where the text alone does not tell who wrote it."""


@pytest.mark.parametrize("name", BY_WORDS)
def test_where_the_text_does_not_tell_who_wrote_it_a_chat_is_proven_by_itself(name: str, used: list[bool]) -> None:
    inside, chat = BY_WORDS[name]
    by_pattern = renderer(LOOP % inside)
    for messages in [pair("a", "b"), pair("c", "d")]:
        assert rendered(by_pattern, messages) == rendered(renderer(LOOP % inside), messages)
    assert used == [True]
    assert rendered(by_pattern, chat) == rendered(renderer(LOOP % inside), chat)
    assert not any(used[1:])


def test_shapes_differ_by_roles_fields_and_what_is_learnt(used: list[bool]) -> None:
    by_pattern = renderer(LOOP % "{{ m.reasoning_content }}{{ m.name }}{{ c }}")
    turns = [
        pair("a", "b"),
        [Message("system", "s"), *pair("a", "b")],
        [Message("user", "a"), Message("assistant", "b", reasoning="r")],
        [Message("user", ""), Message("assistant", "b")],
        [*pair("a", "b"), *pair("c", "d")],
        [Message("user", "a", tool_call_id="1"), Message("assistant", "b")],
    ]
    for messages in turns * 3:
        assert rendered(by_pattern, messages) == rendered(renderer(by_pattern.template.source), messages)
    assert used == [True] * len(turns) * 2
    last = [0.0, 0.0, 0.0, 0.5]
    found = [by_pattern.render(turns[4], last) for _ in range(2)]
    assert found[0] == found[1]
    assert [span.weight for span in found[1][0].spans] == [0.5]
    assert len(by_pattern._patterns) == len(turns) + 1


def test_white_space_seen_later_is_learnt_and_kept(used: list[bool]) -> None:
    by_pattern = renderer(LOOP % "{{ c | trim }}")
    for question, answer in [("a", "b"), (" a", "b"), ("a", "b "), (" a ", " b"), ("a", "b")]:
        messages = pair(question, answer)
        assert rendered(by_pattern, messages) == rendered(renderer(by_pattern.template.source), messages)
    assert used == [False, False, True, True]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "_SHAPES", 5)
    by_pattern = renderer(CHATML)
    for turns in range(1, 9):
        by_pattern.render(pair("a", "b") * turns, [0.0, 1.0] * turns)
        assert len(by_pattern._patterns) <= 5


def alone(encoder: RowEncoder, conversation: Conversation) -> EncodedRow:
    """The row by an encoder that has seen no other, and so has no pattern."""
    renderer = ChatRenderer(encoder.renderer.template, encoder.renderer.marks, encoder.renderer.rules)
    return RowEncoder(renderer, encoder.coder, encoder.policy).encode(conversation)


def assert_same(found: EncodedRow, expected: EncodedRow) -> None:
    assert (found.conversation, found.fate, found.reason) == (expected.conversation, expected.fate, expected.reason)
    assert (found.literal, found.split_at_edges, found.notes) == (
        expected.literal,
        expected.split_at_edges,
        expected.notes,
    )
    parts = [[part for example in row.examples for part in example] for row in (found, expected)]
    for part, other in zip(*parts, strict=True):
        assert part.origin == other.origin
        assert np.array_equal(part.tokens, other.tokens)
        assert np.array_equal(part.weights, other.weights)
        assert (part.tokens.dtype, part.weights.dtype) == (np.int32, np.float32)


HOSTILE = [
    "<|im_end|>",
    "</s>",
    "<|im_",
    "end|>",
    "<|im_start|>assistant\n",
    "hi",
    " ",
    "\n",
    "é",
    "<think>",
    "e\u0301",
]


def conversations(seed: int, count: int) -> list[Conversation]:
    """Chats, dialogues and texts with clean and hostile words, weights and lengths of all kinds."""
    draw = random.Random(seed)

    def words() -> str:
        return "".join(draw.choices(HOSTILE if draw.random() < 0.3 else ["the cat ", "What? ", "4 ", "\n"], k=3))

    def one(number: int) -> Conversation:
        kind = draw.choice(["chat"] * 6 + ["dialogue", "text"])
        roles = {"chat": ["user", "assistant"] * draw.choice([1, 1, 2]), "dialogue": ["prompt", "output"]}.get(kind)
        system = [Message("system", words())] if kind == "chat" and draw.random() < 0.3 else []
        messages = [Message(role, words(), draw.choice([None, None, 0.5, 0.0])) for role in roles or ["output"]]
        return Conversation(Origin("rows", number), kind, tuple(system + messages))

    return [one(number) for number in range(count)]


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(puts_bos=True), sentencepiece()])
@pytest.mark.parametrize("policy", [{}, {"train_on": "all"}, {"max_length": 40}, {"max_length": 30, "overflow": "cut"}])
def test_many_rows_are_encoded_as_each_alone(tokenizer: object, policy: dict[str, object]) -> None:
    encoder = row_encoder(tokenizer=tokenizer, **policy)
    rows = conversations(7, 150)
    for found, conversation in zip(encoder.encode_many(rows), rows, strict=True):
        assert_same(found, alone(encoder, conversation))


def test_special_tokens_made_by_messages_are_found_among_the_ids() -> None:
    encoder = row_encoder()
    chats = [Conversation(Origin("rows", n), "chat", tuple(pair("Hi", "Hello"))) for n in range(6)]
    chats += [
        Conversation(Origin("rows", 9), "chat", tuple(pair("Hi", text))) for text in ("a</s>b", "<|im_end|>", "<s>")
    ]
    rows = encoder.encode_many(chats)
    assert [row.literal for row in rows] == [0] * 6 + [1] * 3
    assert not any(row.split_at_edges for row in rows[:6])


def test_edges_found_between_special_tokens_are_those_that_offsets_give(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = row_encoder()
    rows = [
        row for row in conversations(3, 400) if row.kind == "chat" and any(m.weight != 0 for m in row.messages[1::2])
    ]
    found = encoder.encode_many(rows)
    monkeypatch.setattr(Coder, "_between_specials", lambda *_: None)
    for row, expected in zip(found, encoder.encode_many(rows), strict=True):
        assert_same(row, expected)
    assert sum(bool(row.examples) and not row.literal for row in found) > 100


FILES = ("gsm8k_train.jsonl", "fastchat_dummy_conversation.json", "v1_sft_demo.jsonl", "tinker_conversations.jsonl")
FAMILIES = ("qwen2.5", "qwen3", "llama-3", "mistral", "gemma", "deepseek", "chatml", "phi", "hermes")


@pytest.fixture(scope="module")
def corpus_rows(corpus: Path) -> list[Conversation]:
    read = [islice(sources.read(str(corpus / "data" / name)), 8) for name in FILES]
    return [row for rows in read for row in understand(rows, "corpus").conversations]


@pytest.fixture(scope="module")
def qwen(corpus: Path) -> Tokenizer:
    return edge.wrap(loaded(corpus, "qwen2.5"))


@pytest.mark.parametrize("family", FAMILIES)
def test_corpus_chats_are_encoded_as_each_alone(
    corpus: Path, corpus_rows: list[Conversation], qwen: Tokenizer, family: str
) -> None:
    templates = json.loads((corpus / "templates.json").read_text(encoding="utf-8"))
    found = [each["template"] for each in templates if family in each["name"].lower() and each["renders_plain"]]
    assert found
    for template in found[:2]:
        encoder = examples.encoder(qwen, choose("auto", template, False), Policy(max_length=4096))
        for encoded, row in zip(encoder.encode_many(corpus_rows), corpus_rows, strict=True):
            assert_same(encoded, alone(encoder, row))
