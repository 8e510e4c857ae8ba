"""A conversation -> its examples and its fate, under the overflow policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from deft.encoding import raw
from deft.encoding.pieces import Coded, Coder
from deft.render import policy as render_policy
from deft.render.chat import ChatRenderer
from deft.render.policy import TrainOn
from deft.render.template import Refusal
from deft.tokenizer import Tokenizer
from deft.types import Conversation, Encoded, Fate, Message

Overflow = Literal["turns", "cut", "drop", "error"]
Render = Literal["auto", "raw", "chat"]

Example = tuple[Encoded, ...]
"""What the batch counts as one: the parts of one row, trained in the same step. Windows of a text are examples each."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How rows become tokens. max_length is the longest example in tokens; train_on None is the shape's default."""

    max_length: int
    train_on: TrainOn | None = None
    render: Render = "auto"
    overflow: Overflow = "turns"
    truncation_side: raw.Side = "right"


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row's examples and its fate.

    reason   why it was refused or too long
    literal  special tokens in its messages, encoded as text
    apart    an edge where one encoding of the whole text would have merged prompt and answer
    """

    conversation: Conversation
    fate: Fate
    examples: tuple[Example, ...] = ()
    reason: str = ""
    literal: int = 0
    apart: bool = False


@dataclass(frozen=True)
class RowEncoder:
    """Encodes conversations one by one; the same conversation always gives the same examples."""

    renderer: ChatRenderer
    coder: Coder
    policy: Policy

    @property
    def tokenizer(self) -> Tokenizer:
        return self.coder.tokenizer

    def encode(self, conversation: Conversation) -> EncodedRow:
        messages = conversation.messages
        weights = render_policy.weights(messages, self.train_on(conversation))
        if conversation.kind == "text":
            return self._text(conversation, weights)
        if self.is_raw(conversation):
            return self._dialogue(conversation, weights)
        return self._chat(conversation)

    def is_raw(self, conversation: Conversation) -> bool:
        """Strings without roles are never put in a template, messages with roles always; `render` overrides."""
        if self.policy.render != "auto":
            return self.policy.render == "raw"
        return conversation.kind != "chat"

    def train_on(self, conversation: Conversation) -> TrainOn:
        return self.policy.train_on or render_policy.DEFAULT[conversation.kind]

    def _text(self, conversation: Conversation, weights: Sequence[float]) -> EncodedRow:
        parts, literal = raw.pieces(conversation.messages, weights, self.tokenizer)
        ids, learnt = raw.join(raw.fit(parts, self.tokenizer, _whole(parts), "right"))
        found = raw.windows(ids, learnt, self.policy.max_length)
        examples = tuple((Encoded(conversation.origin, *window),) for window in found)
        return _finished(conversation, examples, Fate.TRAINED, literal)

    def _dialogue(self, conversation: Conversation, weights: Sequence[float]) -> EncodedRow:
        messages = as_raw(conversation.messages)
        parts, literal = raw.pieces(messages, weights, self.tokenizer)
        whole = raw.fit(parts, self.tokenizer, _whole(parts), "right")
        fate = Fate.TRAINED
        if _length(whole) > self.policy.max_length:
            shorter = self._shorter_dialogue(parts)
            if shorter is None:
                return self._too_long(conversation, _length(whole))
            whole, fate = shorter, Fate.CUT
        encoded = Encoded(conversation.origin, *raw.join(whole))
        return _finished(conversation, ((encoded,),), fate, literal)

    def _shorter_dialogue(self, parts: Sequence[raw.Piece]) -> list[raw.Piece] | None:
        limit = self.policy.max_length
        if self.policy.overflow == "cut":
            return raw.fit(parts, self.tokenizer, limit, self.policy.truncation_side)
        if self.policy.overflow != "turns":
            return None
        starts = [i for i in range(1, len(parts)) if parts[i - 1].is_output and not parts[i].is_output]
        tails = (raw.fit(parts[start:], self.tokenizer, _whole(parts), "right") for start in starts)
        return next((tail for tail in tails if _length(tail) <= limit), None)

    def _chat(self, conversation: Conversation) -> EncodedRow:
        messages = as_chat(conversation.messages)
        try:
            coded = self._coded(messages, conversation)
            longest = max(len(part.tokens) for part in coded)
            if longest <= self.policy.max_length:
                return self._chat_row(conversation, coded, Fate.TRAINED)
            shorter = self._shorter_chat(messages, coded, conversation)
        except Refusal as refusal:
            return EncodedRow(conversation, Fate.REFUSED, reason=str(refusal))
        if shorter is None:
            return self._too_long(conversation, longest)
        return self._chat_row(conversation, shorter, Fate.CUT)

    def _coded(self, messages: Sequence[Message], conversation: Conversation) -> list[Coded]:
        train_on = self.train_on(conversation)
        if train_on == "all":
            return [self.coder.encode(self.renderer.whole(messages, 1.0))]
        rendered = self.renderer.render(messages, render_policy.weights(messages, train_on))
        return [self.coder.encode(part) for part in rendered]

    def _shorter_chat(
        self, messages: Sequence[Message], coded: Sequence[Coded], conversation: Conversation
    ) -> list[Coded] | None:
        if self.policy.overflow == "cut":
            return [_cut(part, self.policy.max_length, self.policy.truncation_side) for part in coded]
        if self.policy.overflow != "turns":
            return None
        for fewer in _without_first_turns(messages):
            candidate = self._coded(fewer, conversation)
            if max(len(part.tokens) for part in candidate) <= self.policy.max_length:
                return candidate
        return None

    def _chat_row(self, conversation: Conversation, coded: Sequence[Coded], fate: Fate) -> EncodedRow:
        parts = tuple(Encoded(conversation.origin, part.tokens, part.weights) for part in coded)
        apart = any(part.apart and not part.literal for part in coded)
        return _finished(conversation, (parts,), fate, max(part.literal for part in coded), apart)

    def _too_long(self, conversation: Conversation, length: int) -> EncodedRow:
        reason = f"{length} tokens, max_length is {self.policy.max_length}"
        return EncodedRow(conversation, Fate.TOO_LONG, reason=reason)


def _finished(
    conversation: Conversation, examples: Sequence[Example], fate: Fate, literal: int, apart: bool = False
) -> EncodedRow:
    """The row with the parts that have something to learn; no target where none has."""
    kept = tuple(learnt for example in examples if (learnt := tuple(part for part in example if _has_target(part))))
    if not kept:
        return EncodedRow(conversation, Fate.NO_TARGET, reason="no learnt token is left", literal=literal, apart=apart)
    return EncodedRow(conversation, fate, kept, literal=literal, apart=apart)


def _has_target(part: Encoded) -> bool:
    """The first token of a document is predicted from nothing, so it is no target."""
    return bool((part.weights[1:] > 0).any())


def _without_first_turns(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation without its first question, its first two, ...; the system messages in front always stay."""
    body = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), len(messages))
    questions = [i for i in range(body + 1, len(messages)) if messages[i].role == "user"]
    for start in questions:
        if messages[start - 1].role != "user":
            yield [*messages[:body], *messages[start:]]


def _cut(part: Coded, max_length: int, side: raw.Side) -> Coded:
    kept = slice(0, max_length) if side == "right" else slice(-max_length, None)
    return Coded(part.tokens[kept], part.weights[kept], part.literal, part.apart)


def as_raw(messages: Sequence[Message]) -> list[Message]:
    """The messages as a dialogue: what the assistant says is an output, all else a prompt."""
    outputs = {"assistant", "output"}
    return [Message("output" if m.role in outputs else "prompt", m.content, m.weight) for m in messages]


def as_chat(messages: Sequence[Message]) -> list[Message]:
    """The messages as a chat: prompts are the user's, outputs the assistant's."""
    roles = {"prompt": "user", "output": "assistant"}
    return [Message(roles.get(m.role, m.role), m.content, m.weight) for m in messages]


def _whole(parts: Sequence[raw.Piece]) -> int:
    """A length at which nothing is cut, BOS included."""
    return _length(parts) + 1


def _length(parts: Sequence[raw.Piece]) -> int:
    return sum(len(part.ids) for part in parts)
