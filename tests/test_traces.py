"""Chats rendered by the traces of their shapes are rendered as the template itself renders them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from encoders import row_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import understand
from tiny_tokenizers import CHATML, byte_level, sentencepiece

from deft import tokenizer as edge
from deft.data import sources
from deft.dataset import examples
from deft.encoding.rows import EncodedRow, Policy, RowEncoder
from deft.render import trace
from deft.render.chat import ChatRenderer, Rendered
from deft.render.choose import choose
from deft.render.stop import Marks
from deft.render.template import Refusal, Template
from deft.render.trace import Trace, Tracer
from deft.tokenizer import Tokenizer
from deft.types import Conversation, Message, Origin

LOOP = (
    "{%% for m in messages %%}<|{{ m.role }}|>{%% set c = m.content %%}%s{{ eos_token if m.role == 'assistant' }}"
    "{%% endfor %%}{%% if add_generation_prompt %%}<|assistant|>{%% endif %%}"
)

FOLLOWED = {
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
"""What a template does with content `c` -> followed, for the words that do not lead into what follows below."""

NOT_FOLLOWED = {
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


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces alone decide: no chat is rendered both ways."""
    monkeypatch.setattr(trace, "CHECKED_FIRST", -1)
    monkeypatch.setattr(trace, "CHECKED_EVERY", 1 << 40)


def renderer(template: str) -> ChatRenderer:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatRenderer(Template(template, tokens), Marks("</s>", ("</s>",), ("<s>", "</s>")))


def pair(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


def weights(messages: Sequence[Message]) -> list[float]:
    return [float(message.role == "assistant") for message in messages]


def both(tracer: Tracer, messages: Sequence[Message]) -> tuple[list[Rendered] | str, list[Rendered] | str, bool]:
    """What the tracer gives, what its renderer gives, and whether a trace was used."""
    learnt = weights(messages)
    try:
        expected: list[Rendered] | str = tracer.renderer.render(messages, learnt)
    except Refusal as refusal:
        expected = str(refusal)
    try:
        found = tracer.render(messages, learnt)
    except Refusal as refusal:
        return str(refusal), expected, False
    is_traced = isinstance(found, Trace)
    return [found.rendered(messages, learnt)] if isinstance(found, Trace) else found, expected, is_traced


@pytest.mark.parametrize("name", [*FOLLOWED, *NOT_FOLLOWED])
@pytest.mark.usefixtures("_unchecked")
def test_whatever_a_template_does_with_words_traces_render_as_it_does(name: str) -> None:
    tracer = Tracer(renderer(LOOP % {**FOLLOWED, **NOT_FOLLOWED}[name]))
    traced = []

    @given(chats=st.lists(st.tuples(CONTENT, CONTENT), min_size=4, max_size=6))
    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    def check(chats: list[tuple[str, str]]) -> None:
        for question, answer in chats:
            found, expected, is_traced = both(tracer, pair(question, answer))
            assert found == expected
            traced.append(is_traced)

    check()
    assert sum(traced) > len(traced) / 10 if name in FOLLOWED else not any(traced)


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
@pytest.mark.usefixtures("_unchecked")
def test_no_trace_stands_where_the_prompt_law_does_not_hold_at_once(name: str) -> None:
    tracer = Tracer(renderer(LOOP % LOST[name]))
    chats = [pair(f"What is {n}?", f"hi {n}") + pair("And?", f"ho {n}") for n in range(4)]
    compared = [both(tracer, chat) for chat in chats]
    assert all(found == expected for found, expected, _ in compared)
    assert not any(is_traced for _, _, is_traced in compared)


def test_shapes_differ_by_roles_fields_and_what_is_learnt() -> None:
    tracer = Tracer(renderer(LOOP % "{{ m.reasoning_content }}{{ m.name }}{{ c }}"))
    turns = [
        pair("a", "b"),
        [Message("system", "s"), *pair("a", "b")],
        [Message("user", "a", name="n"), Message("assistant", "b")],
        [Message("user", "a"), Message("assistant", "b", reasoning="r")],
        [Message("user", ""), Message("assistant", "b")],
        [*pair("a", "b"), *pair("c", "d")],
        [Message("user", "a", tool_call_id="1"), Message("assistant", "b")],
    ]
    for chat in turns * 3:
        found, expected, _ = both(tracer, chat)
        assert found == expected
    last = [0.0, 0.0, 0.0, 0.5]
    for _ in range(3):
        found_last = tracer.render(turns[5], last)
    assert isinstance(found_last, Trace)
    assert found_last.rendered(turns[5], last) == tracer.renderer.render(turns[5], last)[0]
    assert len(tracer._shapes) == len(turns) + 1


def test_a_difference_is_said_and_ends_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer(renderer(CHATML))
    chats = [pair("a", str(n)) for n in range(6)]
    for chat in chats[:2]:
        tracer.render(chat, weights(chat))
    monkeypatch.setattr(Trace, "rendered", lambda *_: None)
    (said,) = tracer.render(chats[2], weights(chats[2]))
    assert said.notes == (trace.DIFFERS,)
    monkeypatch.undo()
    assert tracer.render(chats[3], weights(chats[3])) == tracer.renderer.render(chats[3], weights(chats[3]))


def test_the_first_chats_of_a_trace_and_every_thousandth_are_rendered_both_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracer = Tracer(renderer(CHATML))
    rendered = []
    ordinary = ChatRenderer.render
    monkeypatch.setattr(ChatRenderer, "render", lambda *args: rendered.append(1) or ordinary(*args))
    for number in range(2002):
        tracer.render(pair("a", str(number)), [0.0, 1.0])
    assert sum(rendered) == 2 + trace.CHECKED_FIRST + 2000 // trace.CHECKED_EVERY


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_SHAPES", 5)
    monkeypatch.setattr(trace, "_BEGINNINGS", 7)
    tracer = Tracer(renderer(CHATML))
    for turns in [*range(1, 10), *range(1, 10)] * 2:
        chat = [message for _ in range(turns) for message in pair("a", "b")]
        for _ in range(2):
            found, expected, _ = both(tracer, chat)
            assert found == expected
    assert len(tracer._shapes) == 5
    assert len(tracer._beginnings) == 7


def alone(encoder: RowEncoder, conversation: Conversation) -> EncodedRow:
    """The row by an encoder that has seen no other, and so traces nothing."""
    return RowEncoder(encoder.renderer, encoder.coder, encoder.policy).encode(conversation)


def assert_same(found: EncodedRow, expected: EncodedRow) -> None:
    assert (found.conversation, found.fate, found.reason) == (expected.conversation, expected.fate, expected.reason)
    assert (found.literal, found.apart, found.notes) == (expected.literal, expected.apart, expected.notes)
    parts = [[part for example in row.examples for part in example] for row in (found, expected)]
    for part, other in zip(*parts, strict=True):
        assert part.origin == other.origin
        assert np.array_equal(part.tokens, other.tokens)
        assert np.array_equal(part.weights, other.weights)
        assert (part.tokens.dtype, part.weights.dtype) == (np.int32, np.float32)


def many(encoder: RowEncoder, conversations: Sequence[Conversation], size: int = 64) -> Iterator[EncodedRow]:
    for start in range(0, len(conversations), size):
        yield from encoder.encode_many(conversations[start : start + size])


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
@pytest.mark.usefixtures("_unchecked")
def test_many_rows_are_encoded_as_each_alone(tokenizer: object, policy: dict[str, object]) -> None:
    encoder = row_encoder(tokenizer=tokenizer, **policy)
    rows = conversations(7, 150)
    for found, conversation in zip(many(encoder, rows), rows, strict=True):
        assert_same(found, alone(encoder, conversation))


def test_special_tokens_made_by_messages_are_found_among_the_ids() -> None:
    encoder = row_encoder()
    chats = [Conversation(Origin("rows", n), "chat", tuple(pair("Hi", "Hello"))) for n in range(6)]
    chats += [
        Conversation(Origin("rows", 9), "chat", tuple(pair("Hi", text))) for text in ("a</s>b", "<|im_end|>", "<s>")
    ]
    rows = encoder.encode_many(chats)
    assert [row.literal for row in rows] == [0] * 6 + [1] * 3
    assert not any(row.apart for row in rows[:6])


def test_edges_found_by_counting_special_tokens_are_those_that_offsets_give() -> None:
    encoder = row_encoder()
    coder = encoder.coder
    chats = [
        row for row in conversations(3, 300) if row.kind == "chat" and any(m.weight != 0 for m in row.messages[1::2])
    ]
    checked = 0
    for chat in chats:
        learnt = [0.5 if message.role == "assistant" else 0.0 for message in chat.messages]
        try:
            (rendered,) = encoder.renderer.render(chat.messages, learnt)
        except Refusal:
            continue
        found, expected = coder.encode(rendered), coder._by_offsets(rendered)
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.weights, expected.weights)
        assert (found.literal, found.apart) == (expected.literal, expected.apart)
        checked += 1
    assert checked > 100


FILES = ("gsm8k_train.jsonl", "fastchat_dummy_conversation.json", "v1_sft_demo.jsonl", "tinker_conversations.jsonl")
FAMILIES = ("qwen2.5", "qwen3", "llama-3", "mistral", "gemma", "deepseek", "chatml", "phi", "hermes")


@pytest.fixture(scope="module")
def corpus_rows(corpus: Path) -> list[Conversation]:
    read = [islice(sources.read(str(corpus / "data" / name)), 8) for name in FILES]
    return [row for rows in read for row in understand(rows, "corpus").conversations]


@pytest.fixture(scope="module")
def qwen(corpus: Path) -> Tokenizer:
    return edge.load(str(corpus / "tokenizers" / "qwen2.5"))


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("family", FAMILIES)
def test_corpus_chats_are_encoded_as_each_alone(
    corpus: Path, corpus_rows: list[Conversation], qwen: Tokenizer, family: str
) -> None:
    templates = json.loads((corpus / "templates.json").read_text(encoding="utf-8"))
    found = [each["template"] for each in templates if family in each["name"].lower() and each["renders_plain"]]
    assert found
    for template in found[:2]:
        encoder = examples.encoder(qwen, choose("auto", template, False), Policy(max_length=4096))
        for encoded, row in zip(many(encoder, corpus_rows), corpus_rows, strict=True):
            assert_same(encoded, alone(encoder, row))
