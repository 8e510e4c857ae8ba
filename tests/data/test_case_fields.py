"""Cases of the corpus whose rows say more than their format reads: what of each is learnt, prompted, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mask_cases
import pytest

from deft.core.types import Encoded, Fate
from deft.dataset.build import store
from deft.dataset.source import SourceSpec
from deft.dataset.store import FATES
from deft.dataset.survey import Execution, understand
from deft.encoding.rows import RowEncoder

TEMPLATES = {
    "qwen25": "llama.cpp/Qwen-Qwen2.5-7B-Instruct",
    "qwen3": "llama.cpp/Qwen-Qwen3-0.6B",
    "gptoss": "llama.cpp/openai-gpt-oss-120b",
}
ALONE = Execution(processes=1)


@dataclass(frozen=True, slots=True)
class Expected:
    """What is expected of a row: the words that are learnt, in order; words of its prompts; or why it is refused."""

    learnt: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()
    no_prompt: tuple[str, ...] = ()
    lost: str = ""


BLUE = Expected(("Blue.<|im_end|>",), ("Green.<|im_end|>",))
FRENCH = Expected(("Bonjour.<|im_end|>",), ("<|im_start|>system\nAnswer in French only.<|im_end|>",), ("You are Qwen",))
WEATHER = '{"type": "function", "function": {"name": "weather", "description": '
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
UNSEEN = "deft trains on text"
EXPECTED: dict[str, tuple[Expected, ...]] = {
    "D01": (BLUE,),  # loss: false of a turn
    "D03": (BLUE,) * 4,  # loss_mask of a message and of the row, trainable, masked
    "D04": (Expected(lost="its weight is 0"), Expected(("5<|im_end|>",))),  # weight of the row
    "D06": (Expected(("4.<|im_end|>",), ("<think>\n\n</think>\n\n",)),),  # template variables of the row
    "D07": (FRENCH,),  # system beside messages
    "D08": (FRENCH,),  # system_prompt beside conversations
    "D08b": (Expected(("Bonjour.<|im_end|>",), ("system\ndetailed thinking on<|im_end|>",)),),
    "D11": (Expected((CALLED, "3 C.<|im_end|>"), (WEATHER, "Use tools.")),),  # tools in the system message
    "D12": (Expected(("<|channel|>analysis<|message|>Add two and two.<|end|>",)),),  # harmony's channels
    "D13": (Expected(lost=f"image: {UNSEEN}"), Expected(lost=f"images: {UNSEEN}")),  # pictures
    "D30": (Expected((CALLED, "3 C.<|im_end|>"), (WEATHER,), ("null",)),),  # padding of tables
    "D46": (Expected(("b<|im_end|>",), ("user\na<|im_end|>",)),),  # a null column
    "D51": (Expected(("I can't help with that.<|im_end|>",)),),  # a refusal in place of content
    "D52": (FRENCH,),  # the developer where the template has none
}


@cache
def encoder(corpus: Path, name: str) -> RowEncoder:
    (template,) = (each["template"] for each in mask_cases.templates(corpus) if each["name"] == TEMPLATES[name])
    return mask_cases.row_encoder(template, mask_cases.tokenizer(corpus, "qwen2.5", template))


def pieces(row_encoder: RowEncoder, part: Encoded) -> Iterator[tuple[bool, str]]:
    """The text in runs that are learnt and runs that are not."""
    is_learnt = (part.weights > 0).tolist()
    start = 0
    for end in range(1, len(is_learnt) + 1):
        if end == len(is_learnt) or is_learnt[end] != is_learnt[start]:
            yield is_learnt[start], str(row_encoder.tokenizer.hf.decode(part.tokens[start:end].tolist()))
            start = end


def check(row_encoder: RowEncoder, spec: SourceSpec, row: int, expected: Expected) -> None:
    ((_, found),) = understand([spec], ALONE)
    done = store(spec, found, row_encoder, ALONE)
    parts = [part for example in done.examples_of(row) for part in example]
    if expected.lost:
        assert not parts
        assert FATES[done.value(row, "fate")] in (Fate.REFUSED, Fate.NO_TARGET)
        assert expected.lost in done.value(row, "reason")
        return
    assert parts, done.value(row, "reason")
    runs = [run for part in parts for run in pieces(row_encoder, part)]
    learnt, prompt = ([text for is_learnt, text in runs if is_learnt == wanted] for wanted in (True, False))
    assert len(learnt) == len(expected.learnt)
    for text, words in zip(learnt, expected.learnt, strict=True):
        assert text.startswith(words), (text, words)
    for words in expected.prompt:
        assert any(words in text for text in prompt), (words, prompt)
    for words in expected.no_prompt:
        assert not any(words in text for _, text in runs), (words, runs)


def cases(corpus: Path) -> dict[str, dict[str, Any]]:
    return {case["id"]: case for case in json.loads((corpus / "cases" / "data.json").read_text())}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_case_is_learnt_as_it_should_be_or_refused_by_name(name: str, corpus: Path) -> None:
    case = cases(corpus)[name]
    rows = [json.loads(line) for line in case["file"].splitlines()]
    assert len(rows) == len(EXPECTED[name])
    for number, (row, expected) in enumerate(zip(rows, EXPECTED[name], strict=True)):
        # Pictures stand in rows of two shapes, which a file may not mix.
        spec = SourceSpec(f"{name}-{number}", rows=(row,)) if expected.lost else SourceSpec(name, rows=tuple(rows))
        check(encoder(corpus, case["template"]), spec, 0 if expected.lost else number, expected)


def test_rows_weights_scale_what_is_learnt(corpus: Path) -> None:
    rows = [json.loads(line) for line in cases(corpus)["D04"]["file"].splitlines()]
    ((spec, found),) = understand([SourceSpec("D04", rows=tuple(rows))], ALONE)
    ((part,),) = store(spec, found, encoder(corpus, "qwen25"), ALONE).examples_of(1, 1.0)
    assert set(part.weights.tolist()) == {0.0, 0.25}


USER, ANSWER = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Bonjour."}
CHAT = {"messages": [USER, ANSWER]}
BONJOUR = ("Bonjour.<|im_end|>",)
BRIEF = Expected(BONJOUR, ("<|im_start|>system\nBe brief.<|im_end|>",), ("You are Qwen",))
TWO_TURNS = [USER, {"role": "assistant", "content": "Green."}, USER, {"role": "assistant", "content": "Blue."}]
FURTHER: dict[str, tuple[str, Any, Expected]] = {
    "ms-swift's loss of a turn": (
        "qwen25", {"messages": [USER, {**TWO_TURNS[1], "loss": False}, *TWO_TURNS[2:]]}, BLUE),
    "axolotl's training of a turn": (
        "qwen25",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Green.", "training": False},
                           {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Blue.", "training": True}]},
        BLUE,
    ),
    "a mask of the row as JSON text": ("qwen25", {"messages": TWO_TURNS, "train": "[false, false, false, true]"}, BLUE),
    "a mask by token": (
        "qwen25", {"messages": TWO_TURNS, "loss_mask": [0, 1]}, Expected(lost="2 values for 4 messages")),
    "a sample weight as text": ("qwen25", {**CHAT, "sample_weight": "0"}, Expected(lost="its weight is 0")),
    "two flags at odds": ("qwen25", {**CHAT, "weight": 1, "train": "no"}, Expected(lost="train: contradicts weight")),
    "bedrock's system": ("qwen25", {**CHAT, "system": [{"text": "Be brief."}]}, BRIEF),
    "vertex's systemInstruction": ("qwen25", {**CHAT, "systemInstruction": {"parts": [{"text": "Be brief."}]}}, BRIEF),
    "system_message beside a question": (
        "qwen25", {"question": "Hello?", "answer": "Bonjour.", "system_message": "Be brief."}, BRIEF),
    "system beside strings": ("qwen25", {"prompt": "a", "completion": "b", "system": "c"},
                              Expected(lost="no place for a system prompt; say data.render: chat")),
    "functions beside sharegpt": (
        "qwen25",
        {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Bonjour."}],
         "functions": [{"name": "weather", "parameters": {"properties": {"n": None}}}]},
        Expected(BONJOUR, ('{"name": "weather", "parameters": {"properties": {}}}',)),
    ),
    "reasoning beside a question": (
        "qwen3", {"question": "2+2?", "answer": "4.", "reasoning": "Easy."},
        Expected(("<think>\nEasy.\n</think>\n\n4.<|im_end|>",)),
    ),
    "reasoning beside two answers": (
        "qwen3", {"messages": TWO_TURNS, "thinking": "Hm."}, Expected(lost="beside 2 answers")),
    "template variables as JSON text": (
        "qwen3", {**CHAT, "template_kwargs": '{"enable_thinking": false}'},
        Expected(BONJOUR, ("<think>\n\n</think>",))),
    "template variables of a list": (
        "qwen3", {**CHAT, "chat_template_kwargs": {"xml_tools": ["f"]}}, Expected(lost="xml_tools: a list")),
    "a template variable with a control token": (
        "gptoss", {**CHAT, "template_kwargs": {"model_identity": "<|end|>"}}, Expected(lost="holds a special token")),
    "a commentary": (
        "gptoss", {"messages": [USER, {**ANSWER, "channel": "commentary", "recipient": "functions.f"}]},
        Expected(lost="'commentary' of the assistant")),
    "an audio of a message": ("qwen25", {"messages": [{**USER, "audios": ["a.wav"]}, ANSWER]}, Expected(lost=UNSEEN)),
    "documents": ("qwen25", {**CHAT, "documents": [{"text": "a"}]}, Expected(lost="hands no documents")),
    "a history beside a question": (
        "qwen25", {"question": "a", "answer": "b", "history": [["c", "d"]]},
        Expected(lost="history: rows of this shape")),
    "system and developer": (
        "qwen25", {"messages": [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Rhyme."},
                                USER, ANSWER]},
        Expected(BONJOUR, ("system\nBe brief.<|im_end|>\n<|im_start|>system\nRhyme.<|im_end|>",)),
    ),
    "a developer that the template knows": (
        "gptoss", {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]},
        Expected(("<|channel|>final<|message|>Bonjour.",), ("developer<|message|># Instructions\n\nBe brief.",)),
    ),
    "an empty column of a table": (
        "qwen25", {"instruction": "a", "output": "b", "messages": "", "loss_weight": "", "images": []},
        Expected(("b<|im_end|>",)),
    ),
    "a call's null that its schema requires": (
        "qwen25",
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": {"a": None, "b": None}}}]}],
         "tools": [{"name": "f", "parameters": {"properties": {"a": {}, "b": {}}, "required": ["a"]}}]},
        Expected(('<tool_call>\n{"name": "f", "arguments": {"a": null}}\n</tool_call><|im_end|>',)),
    ),
}  # fmt: skip
"""Further cases of the same kinds: (template, row, what is expected)."""


@pytest.mark.parametrize("name", FURTHER)
def test_a_further_case_is_learnt_as_it_should_be_or_refused_by_name(name: str, corpus: Path) -> None:
    template, row, expected = FURTHER[name]
    check(encoder(corpus, template), SourceSpec(name, rows=(row,)), 0, expected)
