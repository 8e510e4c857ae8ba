"""Row encoders over tiny tokenizers, and rows in memory as sources."""

from __future__ import annotations

from typing import Any

from tiny_tokenizers import CHATML, byte_level
from transformers import PreTrainedTokenizerFast

from deft.data.shapes import Survey
from deft.dataset import examples
from deft.dataset.source import SourceSpec
from deft.dataset.survey import understand
from deft.encoding import tokenizer as edge
from deft.encoding.render.template import Chosen
from deft.encoding.rows import Policy, RowEncoder


def row_encoder(
    template: str = CHATML,
    tokenizer: PreTrainedTokenizerFast | None = None,
    stop_ids: tuple[int, ...] = (),
    **policy: Any,
) -> RowEncoder:
    """ChatML over the byte-level tokenizer (EOS is </s>) unless something else is named."""
    held = edge.wrap(tokenizer or byte_level())
    return examples.encoder(
        held, Chosen(template, "a test's template", True), Policy(**{"max_length": 256, **policy}), stop_ids
    )


def source(*rows: Any, name: str = "rows.jsonl", **settings: Any) -> tuple[SourceSpec, Survey]:
    (found,) = understand([SourceSpec(name, rows=rows, **settings)])
    return found


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A row of two messages; `more` goes to the answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}
