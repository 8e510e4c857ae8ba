"""Draws docs/show.svg: what `deft show` prints of chats, one with a tool, and of a dialogue.

    python examples/picture_of_show.py [FILE.svg]

The tokenizer is made on the spot from these rows; the template is ChatML with tools, in the style of Qwen.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from deft.commands.show import rows, terminal
from deft.commands.show.rows import Wanted
from deft.dataset import examples
from deft.dataset.source import SourceSpec
from deft.dataset.survey import understand
from deft.encoding import tokenizer as edge
from deft.encoding.render.template import choose
from deft.encoding.rows import Policy

ROOT = Path(__file__).parents[1]
WIDTH = 92

CHATML = """\
{%- if tools -%}
    {{- '<|im_start|>system\\n<tools>\\n' -}}
    {%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
    {{- '</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content -}}
    {%- for call in message.tool_calls -%}
        {{- '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}
        {{- '\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CHATS = [
    {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "Is it warm in Paris?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0.5},
            {"role": "tool", "content": "21 degrees"},
            {"role": "assistant", "content": "Yes, 21 degrees."},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": "What stops a model?\n\nPeople say <|im_end|> does."},
            {"role": "assistant", "content": "A control token.\nIn your message it was text."},
        ]
    },
    {"messages": [{"role": "user", "content": "Is anybody there?"}]},
]
DIALOGUES = [["What is 2 + 2?", " It is 4.", " And 3 + 3?", " It is 6."]]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 420 tokens with ChatML's control tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = [json.dumps([CHATS, DIALOGUES, "system user assistant"])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=CHATML)


def picture() -> str:
    """The rows as an SVG that fetches nothing."""
    held = edge.wrap(tokenizer())
    chosen = choose("auto", held.chat_template, held.puts_bos, held.special_tokens)
    encoder = examples.encoder(held, chosen, Policy(2048))
    sources = [SourceSpec("chats.jsonl", rows=tuple(CHATS)), SourceSpec("dialogues.jsonl", rows=tuple(DIALOGUES))]
    shown = rows.show(understand(sources), [], encoder, 0.0, 0, Wanted(10))
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor", no_color=False
    )
    terminal.write(console, shown)
    without_fonts = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(
        title="deft show run.yaml", theme=DIMMED_MONOKAI, code_format=without_fonts, unique_id="show"
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "show.svg"
    target.write_text(picture(), encoding="utf-8")
    print(f"{target}: {target.stat().st_size} bytes")
