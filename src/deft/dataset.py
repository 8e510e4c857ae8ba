"""Sources -> examples and the ledger: the data half from end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from deft import ledger
from deft import tokenizer as edge
from deft.data import shapes, sources
from deft.data.shapes import Understood
from deft.data.split import is_held_out
from deft.encoding.pieces import Coder
from deft.encoding.raw import Side
from deft.encoding.rows import EncodedRow, Example, Overflow, Policy, Render, RowEncoder
from deft.errors import Problem, Problems
from deft.ledger import SourceLedger
from deft.render.chat import ChatRenderer
from deft.render.choose import Chosen, choose
from deft.render.policy import TrainOn
from deft.render.template import Template
from deft.tokenizer import Tokenizer
from deft.types import Conversation, Encoded, Fate, Origin, Row


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is trained on, what is held out, and what became of every row."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    ledgers: tuple[SourceLedger, ...]

    def __add__(self, other: Dataset) -> Dataset:
        return Dataset(self.train + other.train, self.held_out + other.held_out, self.ledgers + other.ledgers)


@dataclass(frozen=True, slots=True)
class Named:
    """A source by path, or rows that a caller holds."""

    path: str
    format: str = "auto"
    rows: tuple[Any, ...] | None = None

    def read(self) -> Iterator[Row | Problem]:
        if self.rows is None:
            return sources.read(self.path)
        return iter(sources.from_values(self.rows, self.path))


def encoder(tokenizer: Tokenizer, chosen: Chosen, policy: Policy, stop_ids: Sequence[int] = ()) -> RowEncoder:
    """What turns conversations into tokens; `stop_ids` are those of the model's generation_config."""
    template = Template(chosen.source, tokenizer.template_tokens)
    return RowEncoder(ChatRenderer(template, tokenizer.marks(stop_ids)), Coder(tokenizer), policy)


def understand(named: Iterable[Named]) -> list[tuple[Named, Understood]]:
    """Reads all sources; every source that cannot be understood is in one error."""
    found: list[tuple[Named, Understood]] = []
    problems: list[Problem] = []
    for source in named:
        try:
            found.append((source, shapes.understand(source.read(), source.path, source.format)))
        except Problems as error:
            problems += error.problems or [Problem(source.path, error.heading)]
    if problems:
        raise Problems("the data cannot be read", problems)
    return found


def encode_sources(
    understood: Sequence[tuple[Named, Understood]],
    row_encoder: RowEncoder,
    *,
    share: float = 0.0,
    is_eval: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Dataset:
    """Encodes sources; `share` of the rows by content hash, or all with `is_eval`, are held out.

    advance  is called once per row, for a progress bar
    """
    train: list[Example] = []
    held_out: list[Example] = []
    ledgers = []
    for source, known in understood:
        rows = []
        for conversation in known.conversations:
            row = _encode(conversation, row_encoder, is_eval or is_held_out(conversation, share))
            (held_out if row.fate == Fate.HELD_OUT else train).extend(row.examples)
            rows.append(row)
            advance()
        ledgers.append(ledger.account(source.path, known.shape, rows, known.refused))
    return Dataset(tuple(train), tuple(held_out), tuple(ledgers))


def _encode(conversation: Conversation, row_encoder: RowEncoder, held_out: bool) -> EncodedRow:
    row = row_encoder.encode(conversation)
    return replace(row, fate=Fate.HELD_OUT) if held_out and row.examples else row


@dataclass(frozen=True)
class EncodedRows(Sequence[Encoded]):
    """Encoded rows in their order, and the refused: [(origin, reason), ...]."""

    rows: tuple[Encoded, ...]
    refused: tuple[tuple[Origin, str], ...]

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


def encode(
    rows: Iterable[Any],
    tokenizer: Any,
    *,
    train_on: TrainOn | None = None,
    render: Render = "auto",
    template: str = "auto",
    max_length: int = 2048,
    overflow: Overflow = "turns",
    truncation_side: Side = "right",
) -> EncodedRows:
    """Rows in any shape that deft reads -> ids and weights, for any trainer.

    tokenizer  a fast Hugging Face tokenizer, or the folder of one

    A row that its template forces into several texts gives several items with one origin; rows that are refused, too
    long or without a target are in `refused` with their reason. Raises Problems where the rows have no common shape.
    """
    held = edge.load(tokenizer) if isinstance(tokenizer, str) else edge.wrap(tokenizer)
    chosen = choose(template, held.chat_template, held.puts_bos)
    row_encoder = encoder(held, chosen, Policy(max_length, train_on, render, overflow, truncation_side))
    known = shapes.understand(sources.from_values(rows), "rows")
    done = [row_encoder.encode(conversation) for conversation in known.conversations]
    lost = [(row.conversation.origin, row.reason) for row in done if not row.examples]
    unread = [(Origin("rows", int(p.where.rpartition(":")[2])), p.what) for p in known.refused]
    parts = tuple(part for row in done for example in row.examples for part in example)
    return EncodedRows(parts, tuple(sorted(lost + unread, key=lambda item: item[0].line)))
