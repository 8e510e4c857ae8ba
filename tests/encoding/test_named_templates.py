"""Tokenizers with several chat templates: rows with tools go through tool_use, as transformers chooses at inference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tiny_writers import TEMPLATE, tokenizer_of

from deft.core.errors import InputError
from deft.core.types import Message
from deft.dataset.examples import template_of
from deft.encoding.render.template import Template
from deft.encoding.tokenizer import Tokenizer

TOOL_USE = "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}" + TEMPLATE + "\n"
TOOLS: Any = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}},)
MESSAGES = [Message("user", "Hi"), Message("assistant", "Ho")]


def tokenizer(**named: str) -> Tokenizer:
    hf = copy.deepcopy(tokenizer_of("bytes"))
    hf.chat_template = dict(named)
    return Tokenizer(hf)


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_what_rows_become_is_what_transformers_shows(tools: Any) -> None:
    held = tokenizer(default=TEMPLATE + "\n", tool_use=TOOL_USE, rag="no")
    chosen = template_of(held, "auto")
    assert chosen.is_own
    text = Template(chosen.source, held.template_tokens).render(MESSAGES, tools=tools)
    messages = [{"role": each.role, "content": each.content} for each in MESSAGES]
    assert text == held.hf.apply_chat_template(messages, tools=list(tools) or None, tokenize=False)
    assert ("TOOLS" in text) == bool(tools)


def test_one_of_several_can_be_named_and_must_be_without_a_default() -> None:
    held = tokenizer(tool_use=TOOL_USE, rag=TEMPLATE)
    assert template_of(held, "rag").source == TEMPLATE
    with pytest.raises(InputError, match=r"the model has rag, tool_use and no default; name one: template=rag"):
        template_of(held, "auto")
