"""Law 1: the text before each learnt span is what the template shows at inference, and the span ends with its mark."""

from __future__ import annotations

import json
from pathlib import Path

import mask_oracle  # noqa: F401  transformers is told the time that deft tells templates
import pytest

from deft.core.types import Message, Rendered, ToolCall
from deft.encoding.render.chat import ChatRenderer
from deft.encoding.render.stop import Marks
from deft.encoding.render.template import Refusal, Template, plain
from deft.encoding.render.traced import Traced, join

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MARKS = Marks("</s>", ("</s>",), ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"))

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
CHATML = (
    LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip


def opens(prompt: str) -> str:
    return "{% if add_generation_prompt %}" + prompt + "{% endif %}"


PROMPTS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"

SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "Hi?"), Message("assistant", "Hello.")
TWO = [USER, ANSWER, Message("user", "Why?"), Message("assistant", "So.")]


def render(template: str, messages: list[Message], weights: list[float] | None = None) -> list[Rendered]:
    learnt = weights or [float(message.role == "assistant") for message in messages]
    return ChatRenderer(Template(template, TOKENS), MARKS).render(messages, learnt)


def learnt(rendered: Rendered) -> list[str]:
    return [rendered.text[span.start : span.end] for span in rendered.spans]


def test_each_answer_is_learnt_with_its_mark_and_nothing_else() -> None:
    (one,) = render(CHATML, [SYSTEM, *TWO])
    assert learnt(one) == ["Hello.<|im_end|>", "So.<|im_end|>"]
    assert one.text.endswith("So.<|im_end|>"), "the white space after the last mark is not even shown"


def test_the_text_before_a_span_is_the_inference_prompt() -> None:
    (one,) = render(CHATML, TWO)
    template = Template(CHATML, TOKENS)
    for span, index in zip(one.spans, (1, 3), strict=True):
        assert one.text[: span.start] == template.render(TWO[:index], add_generation_prompt=True)


def test_deft_s_plain_template_closes_each_answer_with_eos() -> None:
    (one,) = render(plain(puts_bos=True), TWO)
    assert one.text == "<s>user: Hi?\nassistant: Hello.</s>\nuser: Why?\nassistant: So.</s>"
    assert learnt(one) == [" Hello.</s>", " So.</s>"]


def test_only_the_messages_with_weight_are_learnt() -> None:
    (one,) = render(CHATML, TWO, [0, 0, 0, 0.5])
    assert [(span.weight, text) for span, text in zip(one.spans, learnt(one), strict=True)] == [(0.5, "So.<|im_end|>")]


STOPS = {
    "eos inside": (LOOP + "<|{{ m.role }}|>{{ m.content }}</s>\n" + END + PROMPTS, "So.</s>"),
    "text before the mark": (LOOP + "<|{{ m.role }}|>{{ m.content }}\n</s>" + END + PROMPTS, "So.\n</s>"),
    "left out at the end": (
        LOOP
        + "<|{{ m.role }}|>{{ m.content }}{% if not (loop.last and m.role == 'assistant') %}</s>{% endif %}"
        + END
        + PROMPTS,
        "So.</s>",
    ),
    "only at the end": (
        LOOP
        + "<|{{ m.role }}|>{{ m.content }}{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}"
        + END
        + PROMPTS,
        "So.</s>",
    ),
    "no mark at all": (LOOP + "{{ m.role }}: {{ m.content }}\n" + END + opens("assistant: "), "So.</s>"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_the_stop_mark_is_found_or_appended(name: str) -> None:
    template, expected = STOPS[name]
    assert learnt(render(template, TWO)[-1])[-1] == expected


def test_a_next_header_that_is_eos_is_the_mark() -> None:
    template = LOOP + "<|{{ m.role }}|>{{ m.content }}" + END + PROMPTS
    marks = Marks("</s>", ("</s>", "<|user|>"), MARKS.special)
    (one,) = ChatRenderer(Template(template, TOKENS), marks).render(TWO, [0, 1, 0, 1])
    assert learnt(one) == ["Hello.<|user|>", "So.<|user|>"]


def test_a_template_that_rewrites_history_gives_one_text_per_answer() -> None:
    strips = LOOP + "[{{ m.role }}]{{ m.content if loop.last else m.content[:2] }}</s>" + END + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )  # fmt: skip
    texts = render(strips, [Message("user", "Hi"), ANSWER, Message("user", "No"), Message("assistant", "Yes.")])
    assert [learnt(text) for text in texts] == [["Hello.</s>"], ["Yes.</s>"]]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP + "{{ m.content }}</s>" + END + opens("assistant:"), "contradicts"),
        (LOOP + "{{ m.role }}{{ m.content[:3] }}</s>" + END + opens("assistant"), "drops"),
        ("{{ raise_exception('no') }}", "refuses this conversation: no"),
        (LOOP + "{{ m.role }}{{ m.content + messages[0].content }}</s>" + END + opens("assistant"), "another message"),
        (LOOP + "{{ m.role }}{{ m.content }}<|im_end|></s>" + END + opens("assistant"), "between"),
    ],
)  # fmt: skip
def test_what_cannot_be_proven_is_refused(template: str, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        render(template, TWO)


def test_another_message_inside_an_answer_is_refused() -> None:
    template = LOOP + "{{ m.role }}{{ m.content[:2] ~ messages[0].content ~ m.content[2:] }}</s>" + END
    with pytest.raises(Refusal, match="another message inside"):
        render(template + opens("assistant"), [USER, ANSWER])


CALL = ToolCall("f", {"a": "b", "c": [{"d": "it's"}, 1, True]}, "id")
CALLED = [USER, Message("assistant", "", tool_calls=(CALL,)), Message("tool", "x", name="f"), ANSWER]
ARGUMENTS = "{{ call.function.name }}({% for k in call.function.arguments %}{{ k }}={{ V }}, {% endfor %})"
CALLS = LOOP + "<|{{ m.role }}|>{{ m.name }}{{ m.content }}{% for call in m.tool_calls %}" + ARGUMENTS + "{% endfor %}"


def test_a_tool_s_answer_that_names_its_call_does_not_hide_where_the_call_ends() -> None:
    names = CALLS.replace("{{ m.name }}", "{{ messages[loop.index0 - 1].tool_calls[0].function.name if m.name }}")
    for template in (CALLS, names):
        (one,) = render(template.replace("V", "call.function.arguments[k]") + "</s>" + END + PROMPTS, CALLED)
        assert learnt(one) == ["""f(a=b, c=[{'d': "it's"}, 1, True], )</s>""", "Hello.</s>"]


def test_arguments_in_pieces_are_no_arguments() -> None:
    with pytest.raises(Refusal, match=r"drops words.*tool calls"):
        render(CALLS.replace("V", "call.function.arguments[k]|string|list|join('.')") + "</s>" + END + PROMPTS, CALLED)


def test_of_several_marks_the_last_before_the_next_header_ends_an_answer() -> None:
    template = LOOP + "<|{{ m.role }}|>{{ m.content }}<|close|>text<|close|><|end|>\n" + END + PROMPTS
    marks = Marks("</s>", ("</s>",), ("</s>", "<|user|>", "<|assistant|>", "<|close|>", "<|end|>"))
    (one,) = ChatRenderer(Template(template, TOKENS), marks).render(TWO, [0, 1, 0, 1])
    assert learnt(one) == ["Hello.<|close|>text<|close|><|end|>", "So.<|close|>text<|close|><|end|>"]


def test_no_reasoning_follows_a_prompt_that_has_closed_it() -> None:
    template = LOOP + "[{{ m.role }}]{{ '</think>' if m.role == 'assistant' }}{{ m.content }}</s>" + END
    prompt = opens("[assistant]{{ '<think>' if thinking else '</think>' }}")
    (one,) = render(template + prompt, [USER, Message("assistant", "4.", reasoning="2 + 2")])
    assert one.text == "[user]Hi?</s>[assistant]<think>2 + 2</think>4.</s>"
    with pytest.raises(Refusal, match=r"drops words.*reasoning"):
        render(template + opens("[assistant]</think>"), [USER, Message("assistant", "4.", reasoning="2 + 2")])


def test_characters_remember_their_message_through_what_templates_do() -> None:
    text = Traced.of(" Hello, World ", 1)
    for changed, owned in [
        (text.strip() + "!", "Hello, World"),
        (text.strip().replace("o", "0"), "HellWrld, "),
        (text.strip().split(", ")[1], "World"),
        (text.strip().upper(), "HELLO, WORLD"),
        (join("-", [text.strip()[:2], "x"]), "He"),
        (text.strip().__rmod__("<%s>"), "Hello, World"),
        (text.strip().rsplit(" ", 1)[-1], "World"),
        (text.strip()[::-1], "dlroW ,olleH"),
        (text.strip().partition(",")[0], "Hello"),
    ]:
        kept = "".join(
            character for character, owner in zip(str.__str__(changed), changed.owners(), strict=True) if owner == 1
        )
        assert sorted(kept) == sorted(owned), changed


def test_texts_of_real_templates_are_those_of_transformers(corpus: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    chat = [USER, ANSWER, Message("user", "Why\nso? "), Message("assistant", " So. ")]
    compared = 0
    for entry in json.loads((corpus / "templates.json").read_text()):
        source = entry["template"]
        try:
            messages = [{"role": m.role, "content": m.content} for m in chat[:3]]
            expected = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **tokens)[0][
                0
            ]
        except Exception:  # a template that refuses this chat is none of this test's business
            continue
        assert str.__str__(Template(source, tokens).render(chat[:3], add_generation_prompt=True)) == expected
        compared += 1
    assert compared > 100
