"""A conversation -> its examples and its fate, under the overflow policy."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deft.core.types import (
    Conversation,
    Encoded,
    Fate,
    Message,
    Rendered,
)
from deft.encoding import raw
from deft.encoding.pieces import Coded, Coder
from deft.encoding.render import policy as render_policy
from deft.encoding.render.chat import DEFAULT_RULES, ChatRenderer, Rules
from deft.encoding.render.policy import TrainOn
from deft.encoding.render.template import Refusal
from deft.encoding.tokenizer import Tokenizer

Overflow = Literal["turns", "cut", "drop", "error"]
Render = Literal["auto", "raw", "chat"]

Example = tuple[Encoded, ...]
"""What the batch counts as one: the parts of one row, trained in the same step. Windows of a text are examples each."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How rows become tokens. max_length is the longest example in tokens; train_on None is the shape's default.

    rules            what of an answer is learnt: reasoning, tool calls
    template_kwargs  variables that every render of the chat template gets
    """

    max_length: int
    train_on: TrainOn | None = None
    render: Render = "auto"
    overflow: Overflow = "turns"
    truncation_side: raw.Side = "right"
    rules: Rules = DEFAULT_RULES
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row's examples and its fate.

    reason   why it was refused or too long
    literal  special tokens in its messages, encoded as text
    apart    an edge where one encoding of the whole text would have merged prompt and answer
    notes    the fallbacks that its masks needed
    """

    conversation: Conversation
    fate: Fate
    examples: tuple[Example, ...] = ()
    reason: str = ""
    literal: int = 0
    apart: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """One text of a row, encoded; `turns` and `notes` as in Rendered."""

    coded: Coded
    turns: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Chat:
    """A chat, rendered; `weights` are those of its messages."""

    conversation: Conversation
    messages: Sequence[Message]
    weights: Sequence[float]
    rendered: Sequence[Rendered]


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
        return self.encode_many([conversation])[0]

    def encode_many(self, conversations: Sequence[Conversation]) -> list[EncodedRow]:
        """The rows in order. All chats are rendered before the first is encoded: a processor's caches like that."""
        begun = [self._begun(conversation) for conversation in conversations]
        return [self._finished_chat(row) if isinstance(row, _Chat) else row for row in begun]

    def _begun(self, conversation: Conversation) -> EncodedRow | _Chat:
        if conversation.kind != "text" and not self.is_raw(conversation):
            return self._chat(conversation)
        weights = render_policy.weights(conversation.messages, self.train_on(conversation))
        return (self._text if conversation.kind == "text" else self._dialogue)(conversation, weights)

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
        if any(message.reasoning or message.tool_calls for message in conversation.messages):
            reason = "render: raw has no place for reasoning and tool calls; render it as a chat"
            return EncodedRow(conversation, Fate.REFUSED, reason=reason)
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

    def _chat(self, conversation: Conversation) -> EncodedRow | _Chat:
        messages = as_chat(conversation.messages)
        weights = render_policy.weights(messages, self.train_on(conversation))
        try:
            return _Chat(conversation, messages, weights, self._rendered(messages, weights, conversation))
        except Refusal as refusal:
            return EncodedRow(conversation, Fate.REFUSED, reason=str(refusal))

    def _rendered(
        self, messages: Sequence[Message], weights: Sequence[float], conversation: Conversation
    ) -> Sequence[Rendered]:
        if self.train_on(conversation) == "all":
            return [self.renderer.whole(messages, 1.0, conversation.tools)]
        return self.renderer.render(messages, weights, conversation.tools)

    def _parts(self, rendered: Sequence[Rendered]) -> list[_Part]:
        return [_Part(self.coder.encode(text), text.turns, text.notes) for text in rendered]

    def _finished_chat(self, chat: _Chat) -> EncodedRow:
        parts = self._parts(chat.rendered)
        longest = max(map(_tokens, parts))
        if longest <= self.policy.max_length:
            return self._row_of(chat.conversation, parts, Fate.TRAINED)
        shorter = self._shorter_chat(chat, parts)
        if not shorter:
            return self._too_long(chat.conversation, longest)
        return self._row_of(chat.conversation, shorter, Fate.CUT)

    def _shorter_chat(self, chat: _Chat, parts: Sequence[_Part]) -> list[_Part]:
        """The parts that fit, and those that do not made shorter; empty where nothing can be kept."""
        limit, side = self.policy.max_length, self.policy.truncation_side
        if self.policy.overflow == "cut":
            return [replace(part, coded=_cut(part.coded, limit, side)) for part in parts]
        if self.policy.overflow != "turns":
            return []
        kept: list[_Part] = []
        for part in parts:
            if _tokens(part) <= limit:
                kept.append(part)
            else:
                end = max(part.turns, default=len(chat.messages) - 1) + 1
                learnt = [w if i in part.turns else 0.0 for i, w in enumerate(chat.weights[:end])]
                kept += self._without_turns(chat.messages[:end], learnt, chat.conversation)
        return kept

    def _without_turns(
        self, messages: Sequence[Message], weights: Sequence[float], conversation: Conversation
    ) -> list[_Part]:
        """The conversation without as few of its first turns as possible, so that it fits; empty if none does.

        The system messages in front, the tools, and the last question with its answer always stay.
        """
        body = _body(messages)
        starts = _questions(messages, body)
        tried: dict[int, list[_Part]] = {}

        def fits(start: int) -> bool:
            try:
                fewer, learnt = [*messages[:body], *messages[start:]], [*weights[:body], *weights[start:]]
                tried[start] = self._parts(self._rendered(fewer, learnt, conversation))
            except Refusal:
                return False
            return max(map(_tokens, tried[start])) <= self.policy.max_length

        first = bisect_left(starts, True, key=fits)
        return tried[starts[first]] if first < len(starts) else []

    def _row_of(self, conversation: Conversation, parts: Sequence[_Part], fate: Fate) -> EncodedRow:
        coded = [part.coded for part in parts]
        encoded = tuple(Encoded(conversation.origin, each.tokens, each.weights) for each in coded)
        apart = any(each.apart and not each.literal for each in coded)
        notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        return _finished(conversation, (encoded,), fate, max(each.literal for each in coded), apart, notes)

    def _too_long(self, conversation: Conversation, length: int) -> EncodedRow:
        reason = f"{length} tokens, max_length is {self.policy.max_length}"
        return EncodedRow(conversation, Fate.TOO_LONG, reason=reason)


def _finished(
    conversation: Conversation,
    examples: Sequence[Example],
    fate: Fate,
    literal: int,
    apart: bool = False,
    notes: tuple[str, ...] = (),
) -> EncodedRow:
    """The row with the parts that have something to learn; no target where none has."""
    kept = tuple(learnt for example in examples if (learnt := tuple(part for part in example if _has_target(part))))
    if not kept:
        return EncodedRow(conversation, Fate.NO_TARGET, (), "no learnt token is left", literal, apart, notes)
    return EncodedRow(conversation, fate, kept, "", literal, apart, notes)


def _has_target(part: Encoded) -> bool:
    """The first token of a document is predicted from nothing, so it is no target."""
    return bool((part.weights[1:] > 0).any())


def _body(messages: Sequence[Message]) -> int:
    """The index of the first message after the system messages in front."""
    return next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), len(messages))


def _questions(messages: Sequence[Message], body: int) -> list[int]:
    """Where a conversation may begin, system messages aside, if its first turns go: at each later question."""
    later = range(body + 1, len(messages))
    return [i for i in later if messages[i].role == "user" and messages[i - 1].role != "user"]


def _tokens(part: _Part) -> int:
    return len(part.coded.tokens)


def _cut(part: Coded, max_length: int, side: raw.Side) -> Coded:
    kept = slice(0, max_length) if side == "right" else slice(-max_length, None)
    return Coded(part.tokens[kept], part.weights[kept], part.literal, part.apart)


def as_raw(messages: Sequence[Message]) -> list[Message]:
    """The messages as a dialogue: what the assistant says is an output, all else a prompt."""
    outputs = {"assistant", "output"}
    return [Message("output" if m.role in outputs else "prompt", m.content, m.weight) for m in messages]


def as_chat(messages: Sequence[Message]) -> list[Message]:
    """The messages as a chat: prompts are the user's, outputs the assistant's."""
    return [replace(m, role=_CHAT_ROLES[m.role]) if m.role in _CHAT_ROLES else m for m in messages]


_CHAT_ROLES = {"prompt": "user", "output": "assistant"}


def _whole(parts: Sequence[raw.Piece]) -> int:
    """A length at which nothing is cut, BOS included."""
    return _length(parts) + 1


def _length(parts: Sequence[raw.Piece]) -> int:
    return sum(len(part.ids) for part in parts)
