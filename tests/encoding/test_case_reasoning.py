"""Reasoning of an answer, wherever a row has it, and the stop of its turn, under real templates: what is learnt.

The corpus's own cases of these kinds (C: reasoning, D: the mark that ends a tool call), then rows of ours on each
template that reasons. Nothing is doubled, nothing is of deft's own making, each turn ends with what stops the model.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from encoders import chat as row
from encoders import row_encoder, source
from readers import understand

from deft.core.types import Conversation, Message
from deft.data import sources
from deft.dataset import build
from deft.encoding.render.chat import AnswerRules, ChatRenderer
from deft.encoding.render.reasoning import apart, shown
from deft.encoding.render.stop import Marks
from deft.encoding.render.template import Refusal, Template
from deft.encoding.rows import message_weights

TEMPLATES = {
    "qwen25": "llama.cpp/Qwen-Qwen2.5-7B-Instruct",
    "llama3": "axolotl/llama3",
    "qwen3": "llama.cpp/Qwen-Qwen3-0.6B",
    "qwen35": "llama.cpp/Qwen3.5-4B",
    "qwen38": "xinference/qwen3.8",
    "qwen38max": "xinference/qwen3.8-max",
    "kimi": "llama.cpp/Kimi-K2-Thinking",
    "k3": "llama.cpp/Kimi-K3",
    "gemma4": "llama.cpp/google-gemma-4-31B-it",
    "gptoss": "llama.cpp/openai-gpt-oss-120b",
    "dsr1": "llama.cpp/llama-cpp-deepseek-r1",
    "dsv31": "xinference/Deepseek-V3.1",
    "dsv32": "llama.cpp/deepseek-ai-DeepSeek-V3.2",
    "dsv4": "ik_llama.cpp/deepseek-ai-DeepSeek-V4",
    "qwq": "xinference/QwQ-32B",
    "command": "llama.cpp/CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "apriel": "llama.cpp/Apriel-1.6-15b-Thinker-fixed",
    "lfm25": "llama.cpp/LFM2.5-8B-A1B",
    "minimax": "xinference/MiniMax-M2.5",
    "nemotron": "llama.cpp/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "laguna": "llama.cpp/poolside-Laguna-S-2.1",
    "hy3": "llama.cpp/tencent-Hy3",
    "solar": "llama.cpp/upstage-Solar-Open-100B",
    "muse": "llama.cpp/muse-glimmer",
    "phi4": "axolotl/phi_4",
    "glm46": "llama.cpp/GLM-4.6",
    "glm45": "trl/glm4moe",
    "glm47": "xinference/GLM-4.7",
    "glm51": "xinference/glm-5.1",
    "glm52": "ik_llama.cpp/GLM-5.2",
}
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
K3_END = "<|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>"
_MARKS = re.compile(
    r"<\|[^<>\s{}'\"+%]{1,40}>|<[^<>\s{}'\"+%]{0,40}\|>|<\uff5c[^<>\s{}]{1,40}\uff5c>|</?s>|</assistant>"
)
_STOPS = ("<|im_end|>", "<|return|>", "<turn|>", DEEPSEEK_END, "<|END_OF_TURN_TOKEN|>", "<|end_of_msg|>")
_STOPS += ("<|eot_id|>", "<|eot|>", "</assistant>")


@cache
def templates(corpus: Path) -> dict[str, str]:
    return {entry["name"]: entry["template"] for entry in json.loads((corpus / "templates.json").read_text("utf-8"))}


def renderer(corpus: Path, name: str, rules: AnswerRules | None = None, **kwargs: Any) -> ChatRenderer:
    """The template with the EOS tokens of its model, as generation_config has them."""
    text = templates(corpus)[TEMPLATES.get(name, name)]
    found = set(_MARKS.findall(text))
    if "[gMASK]" in text:
        stops: tuple[str, ...] = ("<|endoftext|>", "<|user|>", "<|observation|>")
    else:
        stops = (next((mark for mark in _STOPS if mark in found), "</s>"), *(("<|call|>",) if "gptoss" in name else ()))
    tokens = {"bos_token": "<s>", "eos_token": stops[0]}
    marks = Marks(stops[0], stops, tuple(sorted(found | {*stops, "<s>"})))
    return ChatRenderer(Template(text, tokens, kwargs), marks, rules or AnswerRules())


def learnt(by: ChatRenderer, conversation: Conversation) -> list[str]:
    """Each prompt's last twenty characters but for line breaks and control tokens, and what is learnt after it."""
    messages = conversation.messages
    texts = by.render(messages, message_weights(messages, "assistant"), conversation.tools)
    return [text.text[span.start : span.end] for text in texts for span in text.spans]


def conversation(*answers: str | dict[str, Any], **more: Any) -> Conversation:
    """A chat of a question before each answer; an answer is its content, or more keys of its message."""
    messages: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        said = {"content": answer} if isinstance(answer, str) else {"content": "", **answer}
        messages += [{"role": "user", "content": f"Q{number}"}, {"role": "assistant", **said}]
    (found,) = understand(sources.from_values([{"messages": messages, **more}]), "rows").conversations
    return found


def prompt_of(by: ChatRenderer, chat: Conversation, index: int = 1, **switches: Any) -> str:
    """What the template shows the model before messages[index]."""
    template = Template(by.template.source, by.template.tokens, {**by.template.kwargs, **switches})
    return str.__str__(template.render(chat.messages[:index], True, chat.tools))


THOUGHT = {
    "D14": ["<think>Two and two.</think>4.<|im_end|>"],
    "D14b": ["Two and two.\n</think>\n\n4.<|im_end|>"],
    "D15": ["<|channel>thought\nTwo and two.\n<channel|>4.<turn|>"],
    "D15b": [
        "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>4.<|return|>"
    ],
    "D16": ["<think>R1</think>A1<|im_end|>", "<think>R2</think>A2<|im_end|>"],
    "D17": ["4.<|im_end|>"],
    "D18": ["<think>\nTwo and two.\n</think>\n\n4.<|im_end|>"],
    "D20": ["Two and two.\n</think>\n\n4." + DEEPSEEK_END],
    "D20b": ["<think>\nTwo and two.\n</think>\n\n4.<|im_end|>"],
    "D21": ["\n<think></think>\n<tool_call>now\n</tool_call><|observation|>", "\n<think></think>\nIt is 5 pm.<|user|>"],
}
"""What is learnt of the corpus's cases, in the order of their turns."""


@pytest.mark.parametrize("name", THOUGHT)
def test_a_case_of_the_corpus_learns_exactly_this(corpus: Path, name: str) -> None:
    case = next(each for each in json.loads((corpus / "cases" / "data.json").read_text("utf-8")) if each["id"] == name)
    rows = [json.loads(line) for line in case["file"].splitlines()]
    (chat,) = understand(sources.from_values(rows), "rows").conversations
    assert learnt(renderer(corpus, case["template"]), chat) == THOUGHT[name]


INLINE, FIELD, HALF = "<think>\nR.\n</think>\n\n4.", {"content": "4.", "reasoning_content": "R."}, "R.\n</think>\n\n4."
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>4.<|return|>"

ONE_SPELLING = {
    "kimi": "<think>R.</think>4.<|im_end|>",
    "k3": "R.<|close|>think<|sep|><|open|>response<|sep|>4." + K3_END,
    "qwen3": "<think>\nR.\n</think>\n\n4.<|im_end|>",
    "qwen35": "R.\n</think>\n\n4.<|im_end|>",
    "qwen38": "R.\n</think>\n\n4.<|im_end|>",
    "qwen38max": "R.\n</think>\n\n4.<|im_end|>",
    "gemma4": "<|channel>thought\nR.\n<channel|>4.<turn|>",
    "gptoss": "<|channel|>analysis<|message|>R." + FINAL,
    "dsv32": "R.</think>4." + DEEPSEEK_END,
    "dsv4": "R.</think>4." + DEEPSEEK_END,
    "command": "<|START_THINKING|>R.<|END_THINKING|><|START_RESPONSE|>4.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "apriel": "R.\n[BEGIN FINAL RESPONSE]\n4.",
    "lfm25": "<think>R.</think>4.<|im_end|>",
    "minimax": "R.\n</think>\n\n4.",
    "nemotron": "R.\n</think>\n4.<|im_end|>",
    "laguna": "R.</think>4.",
    "hy3": "R.</think:opensource>4.",
    "solar": "<|think|>R.<|end|><|begin|>assistant<|content|>4.",
    "muse": " to=self<|message|>R.<|eom|><|start|>assistant to=user<|message|>4.",
    "glm46": "\n<think>R.</think>\n4.<|user|>",
    "glm45": "\n<think>R.</think>\n4.<|user|>",
    "glm47": "R.</think>4.<|user|>",
    "glm51": "R.</think>4.<|user|>",
    "glm52": "R.</think>4.<|user|>",
}
"""What a template that shows reasoning makes of it, wherever the row has it; EOS aside."""

HELD = {
    "field": FIELD,
    "inline": INLINE,
    "half": HALF,
    "tight": "<think>R.</think>4.",
    "marks in the field": {"content": "4.", "reasoning_content": "<think>\nR.\n</think>"},
    "twice": {"content": INLINE, "reasoning_content": "R."},
    "other marks": "<thinking>R.</thinking>\n4.",
}


@pytest.mark.parametrize("name", ONE_SPELLING)
@pytest.mark.parametrize("held", HELD)
def test_a_template_that_shows_reasoning_writes_it_in_one_way(corpus: Path, name: str, held: str) -> None:
    (found,) = learnt(renderer(corpus, name), conversation(HELD[held]))
    assert found.startswith(ONE_SPELLING[name])
    rest = found.removeprefix(ONE_SPELLING[name])
    assert re.fullmatch(r"\s*(<[^<>\s]+>)?", rest), rest
    assert found.count("R.") == found.count("4.") == 1


ITS_OWN = {
    "dsr1": ("R.\n</think>\n\n4.", "R.</think>4."),
    "qwq": ("R.\n</think>\n\n4.", "R.</think>4."),
    "dsv31": ("\nR.\n</think>\n\n4.", "R.</think>4."),
    "phi4": ("<think>\nR.\n</think>\n\n4.", "<think>R.</think>4."),
}
"""Templates that never show reasoning: what is learnt of INLINE and of FIELD. No white space but the row's."""


@pytest.mark.parametrize("name", ITS_OWN)
def test_a_template_that_shows_none_gets_its_marks_with_the_row_s_white_space(corpus: Path, name: str) -> None:
    by, (inline, field) = renderer(corpus, name), ITS_OWN[name]
    assert learnt(by, conversation(INLINE))[0].startswith(inline)
    assert learnt(by, conversation(FIELD))[0].startswith(field)


@pytest.mark.parametrize("name", ["qwen25", "llama3"])
@pytest.mark.parametrize("content", [INLINE, HALF, "<think>\nR. 4.", "a <think>b</think> c", "<think>\n\n</think>\n4."])
def test_a_template_without_reasoning_learns_the_marks_as_text(corpus: Path, name: str, content: str) -> None:
    by = renderer(corpus, name)
    (found,) = learnt(by, conversation(content))
    assert found.startswith(content)
    assert by.marked(Message("assistant", content)) == "text"


UNCLEAR = {
    "unclosed": ("<think>\nR. 4.", "opens '<think>' and never closes it"),
    "two": ("<think>A</think>\n\nB <think>C</think> 4.", "has '<think>' after its reasoning"),
    "closed twice": ("<think>A</think> B</think> 4.", "has '</think>' after its reasoning"),
    "middle": ("So: <think>A</think> 4.", "has '<think>' in the middle of its content"),
    "two openings": ("<think>A <think>B</think> 4.", "has '<think>' inside its reasoning"),
    "marks inside the field": ({"content": "4.", "reasoning_content": "A </think> B"}, "inside its reasoning"),
    "said twice": ({"content": INLINE, "reasoning_content": "Other."}, "reasoning stands twice"),
}


@pytest.mark.parametrize("name", ["qwen3", "qwen35", "kimi", "gptoss", "gemma4", "dsr1", "glm46", "dsv32"])
@pytest.mark.parametrize("how", UNCLEAR)
def test_what_is_not_clearly_one_block_in_front_is_refused(corpus: Path, name: str, how: str) -> None:
    answer, why = UNCLEAR[how]
    with pytest.raises(Refusal, match=re.escape(why)) as refusal:
        learnt(renderer(corpus, name), conversation("4.", answer))
    assert "messages[3]" in str(refusal.value)


def test_only_a_mark_that_the_prompt_may_have_opened_stands_alone(corpus: Path) -> None:
    (found,) = learnt(renderer(corpus, "apriel"), conversation("R.\n[BEGIN FINAL RESPONSE]\n4."))
    assert found.startswith("R.\n[BEGIN FINAL RESPONSE]\n4.")
    with pytest.raises(Refusal, match="in the middle"):
        learnt(renderer(corpus, "gemma4"), conversation("R.\n<channel|>4."))


def test_openthoughts_marks_of_its_answer_go_with_those_of_its_reasoning(corpus: Path) -> None:
    thought = "<|begin_of_thought|>\n\nR.\n\n<|end_of_thought|>\n\n"
    solution = "<|begin_of_solution|>\n\n4.\n\n<|end_of_solution|>"
    plain, marked = ({"content": content, "reasoning": "R."} for content in ("4.", solution))
    whole = learnt(renderer(corpus, "qwen3"), conversation(plain))
    assert learnt(renderer(corpus, "qwen3"), conversation(thought + solution)) == whole
    assert learnt(renderer(corpus, "qwen3"), conversation(marked)) == whole
    assert learnt(renderer(corpus, "qwen25"), conversation(solution)) == [solution + "<|im_end|>"]


def test_words_that_a_template_writes_behind_tool_calls_are_refused(corpus: Path) -> None:
    call = {"content": "Wait.", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}
    with pytest.raises(Refusal, match="behind its tool calls"):
        learnt(renderer(corpus, "gemma4"), conversation(call, tools=[{"name": "weather"}]))
    (found,) = learnt(renderer(corpus, "gemma4"), conversation({**call, "content": ""}, tools=[{"name": "weather"}]))
    assert "call:weather" in found


def test_a_turn_that_is_not_learnt_may_say_what_it_likes(corpus: Path) -> None:
    chat = conversation({"content": "<think>\nR. 4.", "weight": 0}, "4.")
    assert learnt(renderer(corpus, "kimi"), chat) == ["<think></think>4.<|im_end|>"]


def test_history_shows_each_answer_as_the_template_does_and_every_turn_is_learnt_once(corpus: Path) -> None:
    for name in ("qwen3", "kimi", "gemma4", "gptoss", "glm46", "dsv32"):
        by = renderer(corpus, name)
        fields = conversation(*({"content": f"A{n}.", "reasoning_content": f"R{n}."} for n in range(3)))
        inline = conversation(*(f"<think>\nR{n}.\n</think>\n\nA{n}." for n in range(3)))
        found = learnt(by, inline)
        assert found == learnt(by, fields), name
        assert [re.findall(r"[RA]\d", each) for each in found] == [[f"R{n}", f"A{n}"] for n in range(3)]


def test_the_answer_keeps_the_indentation_of_its_first_line(corpus: Path) -> None:
    message, _ = apart(Message("assistant", "<think>R.</think>\n\n    def f(): ..."))
    assert message.content == "    def f(): ..."
    assert apart(Message("assistant", "<think>R.</think> 4."))[0].content == "4."


WITHOUT = {
    "qwen35": (["4.<|im_end|>"], "\n</think>\n\n4.<|im_end|>"),
    "qwen38": (["4.<|im_end|>"], "\n</think>\n\n4.<|im_end|>"),
    "qwen38max": (["\n</think>\n\n4.<|im_end|>"], "\n</think>\n\n4.<|im_end|>"),
    "glm47": (["4.<|user|>"], "</think>4.<|user|>"),
    "glm51": (["4.<|user|>"], "</think>4.<|user|>"),
    "glm52": (["4.<|user|>"], "</think>4.<|user|>"),
    "nemotron": (["4.<|im_end|>"], "</think>4.<|im_end|>"),
    "k3": (["4." + K3_END], "<|close|>think<|sep|><|open|>response<|sep|>4." + K3_END),
    "dsr1": (None, "</think>4." + DEEPSEEK_END),
    "qwq": (None, "</think>4.<|im_end|>"),
    "minimax": (None, "\n</think>\n\n4.</s>"),
}
"""An answer without reasoning where the prompt opens a block: what `auto` learns, None for refused, and `empty`."""


@pytest.mark.parametrize("name", WITHOUT)
def test_an_answer_without_reasoning_follows_the_setting(corpus: Path, name: str) -> None:
    chat, (auto, empty) = conversation("4."), WITHOUT[name]
    by = renderer(corpus, name)
    if auto is None:
        with pytest.raises(Refusal, match="opens a reasoning block"):
            learnt(by, chat)
    else:
        assert learnt(by, chat) == auto
    assert learnt(renderer(corpus, name, AnswerRules(reasoning="empty")), chat) == [empty]
    with pytest.raises(Refusal, match="has no reasoning"):
        learnt(renderer(corpus, name, AnswerRules(reasoning="require")), chat)


@pytest.mark.parametrize("name", ["qwen35", "qwen38", "glm47", "glm52", "nemotron"])
def test_without_reasoning_the_prompt_is_that_of_the_switch(corpus: Path, name: str) -> None:
    by, chat = renderer(corpus, name), conversation("4.")
    (text,) = by.render(chat.messages, [0, 1])
    assert text.text[: text.spans[0].start] == prompt_of(by, chat, enable_thinking=False)
    assert text.notes == ("enable_thinking=false",)
    asked = renderer(corpus, name, enable_thinking=True)
    if name == "glm47":  # its history shows an answer without reasoning as one that the prompt asked none for
        with pytest.raises(Refusal, match="opens a reasoning block"):
            learnt(asked, chat)
        return
    (text,) = asked.render(chat.messages, [0, 1])
    assert text.text[: text.spans[0].start] == prompt_of(asked, chat)
    assert "an empty reasoning block is learnt" in text.notes[0]


def test_an_empty_block_that_the_row_has_is_learnt_where_the_prompt_opens_one(corpus: Path) -> None:
    chat = conversation("<think>\n\n</think>\n\n4.")
    (text,) = renderer(corpus, "dsr1").render(chat.messages, [0, 1])
    assert text.text.endswith("<think>\n\n</think>\n\n4." + DEEPSEEK_END)
    assert learnt(renderer(corpus, "qwq"), chat) == ["\n</think>\n\n4.<|im_end|>"]


def test_a_prompt_that_opens_a_block_is_no_prompt_of_an_answer_that_nothing_closes() -> None:
    opens = (
        "{% for m in messages %}[{{ m.role }}]{{ '<think>' if m.role == 'assistant' }}{{ m.content }}</s>{% endfor %}"
    )
    template = Template(opens + "{% if add_generation_prompt %}[assistant]<think>{% endif %}", {"eos_token": "</s>"})
    by = ChatRenderer(template, Marks("</s>", ("</s>",), ("</s>",)))
    with pytest.raises(Refusal, match="opens a reasoning block"):
        learnt(by, conversation("4."))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}, "id": "call12345"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "sums",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
        },
    }
]
CALLED = {
    "messages": [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "reasoning_content": "R.", "tool_calls": [CALL]},
        {"role": "tool", "content": "5 pm", "name": "add", "tool_call_id": "call12345"},
        {"role": "assistant", "content": "A.", "reasoning_content": "S."},
    ],
    "tools": TOOLS,
}


@pytest.mark.parametrize("name", ["glm45", "glm46", "glm47", "glm51", "glm52"])
@pytest.mark.parametrize("end", [2, 4])
def test_a_tool_call_of_glm_ends_with_observation_and_an_answer_with_user(corpus: Path, name: str, end: int) -> None:
    by = renderer(corpus, name)
    row = {**CALLED, "messages": CALLED["messages"][:end]}
    (chat,) = understand(sources.from_values([row]), "rows").conversations
    call, *answer = learnt(by, chat)
    assert re.search(r"x</arg_value>\s*</?tool_call><\|observation\|>\Z", call), call
    assert all(each.endswith("A.<|user|>") for each in answer)
    assert by.stop_marks() == {"<|observation|>", "<|user|>"} if answer else {"<|observation|>"}
    assert len(by.render(chat.messages, message_weights(chat.messages, "assistant"), chat.tools)) == 1


def test_a_header_is_a_stop_only_where_the_model_stops_there(corpus: Path) -> None:
    by = renderer(corpus, "glm46")
    alone = Marks("<|endoftext|>", ("<|endoftext|>",), by.marks.special)
    (chat,) = understand(sources.from_values([CALLED]), "rows").conversations
    call, answer = learnt(ChatRenderer(by.template, alone), chat)
    assert (call[-13:], answer[-13:]) == ("<|endoftext|>", "<|endoftext|>")


def test_a_tool_call_that_a_user_answers_still_ends_with_observation(corpus: Path) -> None:
    messages = [*CALLED["messages"][:2], {"role": "user", "content": "No."}, *CALLED["messages"][3:]]
    (chat,) = understand(sources.from_values([{**CALLED, "messages": messages}]), "rows").conversations
    assert learnt(renderer(corpus, "glm46"), chat)[0].endswith("<|observation|>")


@pytest.mark.parametrize(("close", "is_learnt"), [("<close>", True), ("<bot>", False)])
def test_marks_that_close_an_answer_may_stand_before_the_stop_but_no_header(close: str, is_learnt: bool) -> None:
    template = "{% for m in messages %}{{ '<bot>' if m.role == 'assistant' else '<user>' }}{{ m.content }}"
    template += "{{ '" + close + "' if m.role == 'assistant' }}</s>{% endfor %}{{ '<bot>' if add_generation_prompt }}"
    marks = Marks("</s>", ("</s>",), ("</s>", "<bot>", "<user>", "<close>"))
    by = ChatRenderer(Template(template, {"eos_token": "</s>"}), marks)
    if is_learnt:
        assert learnt(by, conversation("4.")) == ["4.<close></s>"]
        return
    with pytest.raises(Refusal, match="between"):
        learnt(by, conversation("4."))


def test_how_a_template_spells_reasoning_is_seen_in_turns_that_show_it(corpus: Path) -> None:
    for name, spelled in [
        ("kimi", ("<think>", "</think>")),
        ("gemma4", ("<|channel>thought\n", "\n<channel|>")),
        ("command", ("<|START_THINKING|>", "<|END_THINKING|>")),
        ("qwen3", ("<think>\n", "\n</think>\n\n")),
    ]:
        found = shown(renderer(corpus, name).template)
        assert found.spelling is not None
        assert (found.spelling.opening, found.spelling.closing) == spelled
    assert [shown(renderer(corpus, name).template).is_taken for name in ("qwen25", "llama3", "gptoss", "dsr1")] == [
        False,
        False,
        True,
        True,
    ]


OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>"
    "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}{% endif %}"
)


def told(template: str | None, answer: dict[str, Any]) -> list[str]:
    encoder = row_encoder(template) if template else row_encoder()
    (ledger,) = build.encode_sources([source(row("Hi", **answer))], encoder).ledgers
    assert ledger.fates["trained"] == 1, ledger.lost
    return [seen.name for seen in ledger.warnings]


@pytest.mark.parametrize(
    ("template", "answer", "warning"),
    [
        (OPENING, {"answer": "4."}, "thinking_off"),
        (OPENING.replace("enable_thinking", "other"), {"answer": "4."}, "empty_reasoning"),
        (OPENING, {"answer": INLINE}, "moved_reasoning"),
        (OPENING, {"answer": "<think></think>4."}, "empty_block"),
        (None, {"answer": INLINE}, "reasoning_as_text"),
    ],
)
def test_what_becomes_of_reasoning_is_said_and_counted(
    template: str | None, answer: dict[str, Any], warning: str
) -> None:
    assert warning in told(template, answer)
    assert told(template, {"answer": "4.", "reasoning_content": "R."} if template else {"answer": "4."}) == []
