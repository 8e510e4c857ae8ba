"""The arrows: what travels from a file to an optimizer step, each a frozen value with its shapes beside it.

    file -> Row            a JSON value, as it was read                       data/readers/
         -> Conversation   messages with roles and weights, tools             data/formats/
         -> Rendered       text, and the spans of it that are learnt          encoding/render/
         -> Encoded        tokens int32 [T], weights float32 [T]              encoding/rows.py
         -> StepBatch      the micro-batches of one optimizer step            plan/loader.py
         -> MicroBatch     documents end to end, shifted: [M], targets [K]    plan/loader.py
         -> Tally          sum of the weighted losses, sum of the weights     training/loss/
         -> StepRecord     a line of metrics.jsonl                            training/loop.py

`Origin`, a file and a line, travels with a row to the end, so that every error can name it.

Shape suffixes: M tokens of a micro-batch, K targets of a micro-batch, H hidden size, V vocabulary, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label Hugging Face gives a token that is not learnt."""

Kind = Literal["text", "dialogue", "chat"]
"""text: one string, all learnt. dialogue: prompts and outputs without roles. chat: messages with roles."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from; lines count from 1, in tables rows do.

    item  which element of a JSON array it is, from 1, where it does not begin its line; 0 otherwise

    >>> str(Origin("train.jsonl", 812)), str(Origin("train.json", 1, item=37))
    ('train.jsonl:812', 'train.json:1 (row 37)')
    """

    source: str
    line: int
    item: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" + (f" (row {self.item})" if self.item else "")

    @classmethod
    def at(cls, place: str) -> Origin:
        """The origin that was written as `place`.

        >>> Origin.at("train.json:1 (row 37)")
        Origin(source='train.json', line=1, item=37)
        """
        place, _, item = place.removesuffix(")").partition(" (row ")
        source, _, line = place.rpartition(":")
        return cls(source, int(line), int(item or 0))


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: a JSON object, a list or a string, nothing interpreted."""

    origin: Origin
    value: Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant makes; `arguments` as the row has them: an object, or JSON text."""

    name: str
    arguments: Any
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message. In a chat `role` is the template's; in text and dialogues it is "prompt" or "output".

    weight        how much each of its tokens is learnt; None leaves it to `train_on`
    reasoning     what the assistant thought before it answered, without marks
    tool_calls    what the assistant calls
    name          of the tool that answers, or of the speaker
    tool_call_id  of the call that a tool's message answers
    """

    role: str
    content: str
    weight: float | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row, or one of several that a row holds, understood.

    tools            JSON schemas, as OpenAI writes them, that the assistant may call
    weight           of the row: it multiplies the weight of every token
    template_kwargs  variables that the chat template gets for this row, before those of the run
    doubts           names of warnings about it that its format found
    """

    origin: Origin
    kind: Kind
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a text, learnt with `weight` each token."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text, what is learnt in it, and which of its characters were written by messages and tools.

    In the `written` ranges special tokens are text, never control tokens. At `edges` the text is cut at inference:
    where prompts end, and where answers do. `notes` say which fallbacks were needed; `turns` are the learnt messages.
    """

    text: str
    spans: tuple[Span, ...]
    written: tuple[tuple[int, int], ...]
    edges: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    turns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example, or one part of a row that had to be split: ids and how much each is learnt.

    tokens   int32   [T]
    weights  float32 [T]   0 on prompts; `weights[t]` belongs to predicting `tokens[t]`

    >>> Encoded(Origin("a.jsonl", 1), np.array([5, 6, 7], np.int32), np.array([0, 1, 1], np.float32)).labels
    array([-100,    6,    7], dtype=int32)
    """

    origin: Origin
    tokens: np.ndarray
    weights: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int32 [T]: the Hugging Face form, not shifted, -100 where nothing is learnt."""
        return np.where(self.weights > 0, self.tokens, np.int32(IGNORED))


class Fate(StrEnum):
    """What became of a row. Each row has exactly one. Left out: sound, and not trained because its source says so."""

    TRAINED = "trained"
    HELD_OUT = "held_out"
    LEFT_OUT = "left_out"
    CUT = "cut"
    TOO_LONG = "too_long"
    NO_TARGET = "no_target"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch: whole documents laid end to end, nothing padded, already shifted.

    tokens     int64   [M]
    positions  int64   [M]   0, 1, 2, ... in each document
    documents  lengths of the documents in order; they sum to M
    rows       int64   [K]   ascending indices into [M]: the positions whose hidden state predicts a target
    targets    int64   [K]   the token that follows each of them
    weights    float32 [K]   > 0
    seeds      of what is drawn for each document in training, the same whatever it is packed with
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    documents: tuple[int, ...]
    rows: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The micro-batches of one optimizer step, all of them or one rank's share; the numbers are of the whole step.

    step        from 0
    normalizer  Z of the loss: the sum of the weights of the whole step, or its number of examples
    tokens      of all its documents, target_tokens those that are learnt
    origins     of each micro-batch's documents, in their order
    """

    step: int
    epoch: int
    micro_batches: tuple[MicroBatch, ...]
    normalizer: float
    tokens: int
    target_tokens: int
    origins: tuple[tuple[Origin, ...], ...]


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias)).

    weight  [V, H]    bias  [V] or None    softcap(x) = cap * tanh(x / cap), or nothing where cap is None
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """An objective's sums over the targets of a micro-batch: two scalars.

    nll_sum     float   sum over targets of weight times loss, in nats, with its graph
    weight_sum  float   sum of the weights, without a graph
    """

    nll_sum: torch.Tensor
    weight_sum: torch.Tensor


class Objective(Protocol):
    """What is minimised, as a sum over the targets of a micro-batch: nothing in it is divided.

    hidden_KH float [K, H], logits_KV float [K, V], targets_K int64 [K], weights_K float32 [K]. K may be 0.

    uses_start  whether it is to be given what the model that the run began with says of the same targets: its hidden
                states and head, or its logits
    """

    @property
    def uses_start(self) -> bool: ...

    def __call__(
        self,
        hidden_KH: torch.Tensor,
        head: Head,
        targets_K: torch.Tensor,
        weights_K: torch.Tensor,
        start: tuple[torch.Tensor, Head] | None = None,
    ) -> Tally:
        """From hidden states and the head to apply to them."""
        ...

    def from_logits(
        self,
        logits_KV: torch.Tensor,
        targets_K: torch.Tensor,
        weights_K: torch.Tensor,
        start_KV: torch.Tensor | None = None,
    ) -> Tally:
        """From final logits, where the head is not understood: no scale or softcap is applied."""
        ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, as a line of metrics.jsonl.

    loss is nats per unit of weight over the whole step; tokens counts all tokens of the step's documents, target_tokens
    those with weight; padded_tokens what the model was shown beyond them; seconds is wall time since the previous line.
    """

    step: int
    epoch: int
    loss: float
    grad_norm: float
    learning_rate: float
    target_tokens: int
    tokens: int
    padded_tokens: int
    seconds: float
    peak_bytes: int

    @property
    def is_finite(self) -> bool:
        """False for a step that changed nothing, because of its loss or its gradient."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)
