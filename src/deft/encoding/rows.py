"""A conversation -> its examples and its fate, under the overflow policy."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from deft.core.types import Conversation, Encoded, Fate, Kind, Message, Rendered
from deft.encoding import raw
from deft.encoding.coverage import Coverage, Kept
from deft.encoding.edges import Coded, Coder
from deft.encoding.render.chat import DEFAULT_RULES, AnswerRules, ChatRenderer
from deft.encoding.render.rendered import RenderedTexts, has_mark, header_of
from deft.encoding.render.template import Refusal
from deft.encoding.tokenizer import Tokenizer

TrainOn = Literal["assistant", "last_assistant", "completion", "all"]
Overflow = Literal["turns", "cut", "drop", "error"]
Render = Literal["auto", "raw", "chat", "rendered"]

Example = tuple[Encoded, ...]
"""What the batch counts as one: the parts of one row, trained in the same step. Windows of a text are examples each."""


TRAIN_ON: dict[Kind, TrainOn] = {"text": "all", "dialogue": "completion", "chat": "assistant"}
"""What is learnt where `train_on` is not said."""

NO_TOKENS = "{}: the tokenizer has no token for any of its characters; remove the row, or take another tokenizer"

_LEARNT_ROLES = {"assistant", "output"}


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
    rules: AnswerRules = DEFAULT_RULES
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row's examples and its fate.

    reason          why it was refused or too long
    literal         special tokens in its messages, encoded as text
    split_at_edges  an edge where one encoding of the whole text would have merged prompt and answer
    notes           the fallbacks that its masks needed
    loses_characters, changes_characters  its tokenizer has no token for some; it makes others of some that are learnt
    """

    conversation: Conversation
    fate: Fate
    examples: tuple[Example, ...] = ()
    reason: str = ""
    literal: int = 0
    split_at_edges: bool = False
    notes: tuple[str, ...] = ()
    loses_characters: bool = False
    changes_characters: bool = False


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
        rows = [self._finished_chat(row) if isinstance(row, _Chat) else row for row in begun]
        coverage = self.tokenizer.coverage
        return [self._covered(row, coverage) for row in rows] if coverage else rows

    def _covered(self, row: EncodedRow, coverage: Coverage) -> EncodedRow:
        """The row with what its tokenizer does not keep of its texts; refused where that is all of an answer."""
        conversation = row.conversation
        texts = ["".join(said(message)) for message in conversation.messages]
        tools = [json.dumps(tool, ensure_ascii=False) for tool in conversation.tools]
        kept = coverage.kept("\n".join([*texts, *tools]))
        if kept == Kept.WHOLE or not row.examples:
            return row
        weights = message_weights(conversation.messages, self.train_on(conversation))
        learnt = [index for index, weight in enumerate(weights) if weight > 0]
        gone = next((index for index in learnt if coverage.keeps_nothing(texts[index])), None)
        if gone is not None:
            reason = NO_TOKENS.format(f"messages[{gone}], which is learnt")
            return EncodedRow(conversation, Fate.REFUSED, reason=reason)
        is_changed = any(coverage.kept(texts[index]) == Kept.CHANGED for index in learnt)
        return replace(row, loses_characters=kept == Kept.LOST, changes_characters=is_changed)

    def _begun(self, conversation: Conversation) -> EncodedRow | _Chat:
        weights = message_weights(conversation.messages, self.train_on(conversation))
        lost = next((weight for weight in weights if not is_fp32(weight, conversation.weight)), None)
        if lost is not None:
            what = f"loss_weight: {conversation.weight:g} of the row times {lost:g} of a message is {OUT_OF_FP32}"
            return EncodedRow(conversation, Fate.REFUSED, reason=what)
        if self.policy.render == "rendered":
            return self._rendered_before(conversation, weights)
        if conversation.kind != "text" and not self.is_raw(conversation):
            return self._chat(conversation)
        return (self._text if conversation.kind == "text" else self._dialogue)(conversation, weights)

    def is_raw(self, conversation: Conversation) -> bool:
        """Strings without roles are never put in a template, messages with roles always; `render` overrides."""
        if self.policy.render != "auto":
            return self.policy.render != "chat"
        return conversation.kind != "chat"

    def train_on(self, conversation: Conversation) -> TrainOn:
        kind: Kind = "chat" if self.policy.render == "rendered" else conversation.kind
        return self.policy.train_on or TRAIN_ON[kind]

    def stop_marks(self) -> frozenset[str]:
        """The marks that ended the turns seen so far; of texts rendered beforehand, those of their template."""
        if self.policy.render != "rendered":
            return self.renderer.stop_marks()
        return frozenset(self.texts.stops) if isinstance(self.texts, RenderedTexts) else frozenset()

    @cached_property
    def texts(self) -> RenderedTexts | Refusal:
        """What finds the answers in texts that the template wrote; why nothing does."""
        try:
            return RenderedTexts.of(self.renderer)
        except Refusal as refusal:
            return refusal

    @cached_property
    def _answer_header(self) -> str:
        """What the template writes before an answer, if there is a mark in it: no other text has that by chance."""
        header = header_of(self.renderer.template)
        return header if self.tokenizer.find_special(header) or has_mark(header) else ""

    def holds_answers(self, message: Message) -> bool:
        """Whether a message's words are turns that the template wrote beforehand."""
        return bool(self._answer_header) and self._answer_header in message.content

    def begins_so(self, conversation: Conversation) -> bool:
        """Whether a text that the template wrote beforehand begins exactly as the template begins one today."""
        text = "".join(message.content for message in conversation.messages)
        return isinstance(self.texts, RenderedTexts) and self.texts.begins_so(text)

    def _rendered_before(self, conversation: Conversation, weights: Sequence[float]) -> EncodedRow:
        """A text that the template wrote beforehand: its marks are control tokens, its answers are learnt."""
        try:
            rendered = self._proven(conversation, weights)
        except Refusal as refusal:
            return EncodedRow(conversation, Fate.REFUSED, reason=f"render: rendered: {refusal}")
        part = self.coder.encode(rendered)
        if len(part.tokens) <= self.policy.max_length:
            return self._row_of(conversation, [part], Fate.TRAINED)
        if self.policy.overflow != "cut":
            return self._too_long(conversation, len(part.tokens))
        return self._row_of(conversation, [part.cut(self.policy.max_length, self.policy.truncation_side)], Fate.CUT)

    def _proven(self, conversation: Conversation, weights: Sequence[float]) -> Rendered:
        if conversation.kind == "chat":
            raise Refusal("it reads texts that a template wrote, and this row has messages; leave data.render out")
        if chat_only := _chat_only(conversation):
            raise Refusal(f"the template wrote the text beforehand, which has no place for {chat_only}; give messages")
        if self.policy.rules != DEFAULT_RULES:
            raise Refusal("answers are learnt whole; reasoning, learn_reasoning and learn_tool_calls need messages")
        if isinstance(self.texts, Refusal):
            raise self.texts
        train_on = self.train_on(conversation)
        if train_on == "all":
            return self.texts.whole(conversation.messages, weights)
        rendered = self.texts.prove(conversation.messages, weights, train_on == "last_assistant")
        coverage = self.tokenizer.coverage
        if coverage and any(map(coverage.keeps_nothing, self.texts.answers(rendered))):
            raise Refusal(NO_TOKENS.format("an answer"))
        return rendered

    def _text(self, conversation: Conversation, weights: Sequence[float]) -> EncodedRow:
        parts, literal = raw.pieces(conversation.messages, weights, self.tokenizer)
        ids, learnt = raw.join(raw.whole(parts, self.tokenizer))
        found = raw.windows(ids, learnt, self.policy.max_length)
        examples = tuple((Encoded(conversation.origin, *window),) for window in found)
        return _finished(conversation, examples, Fate.TRAINED, literal)

    def _dialogue(self, conversation: Conversation, weights: Sequence[float]) -> EncodedRow:
        if chat_only := _chat_only(conversation):
            reason = f"strings that are not put in a template have no place for {chat_only}; say data.render: chat"
            return EncodedRow(conversation, Fate.REFUSED, reason=reason)
        messages = as_raw(conversation.messages)
        parts, literal = raw.pieces(messages, weights, self.tokenizer)
        whole = raw.whole(parts, self.tokenizer)
        fate = Fate.TRAINED
        if raw.length(whole) > self.policy.max_length:
            shorter = self._shorter_dialogue(parts)
            if shorter is None:
                return self._too_long(conversation, raw.length(whole))
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
        tails = (raw.whole(parts[start:], self.tokenizer) for start in starts)
        return next((tail for tail in tails if raw.length(tail) <= limit), None)

    def _chat(self, conversation: Conversation) -> EncodedRow | _Chat:
        messages = as_chat(conversation.messages)
        weights = message_weights(messages, self.train_on(conversation))
        try:
            return _Chat(conversation, messages, weights, self._rendered(messages, weights, conversation))
        except Refusal as refusal:
            return EncodedRow(conversation, Fate.REFUSED, reason=str(refusal))

    def _rendered(
        self, messages: Sequence[Message], weights: Sequence[float], conversation: Conversation
    ) -> Sequence[Rendered]:
        renderer = self.renderer.of(conversation.template_kwargs)
        if self.train_on(conversation) == "all":
            return [renderer.whole(messages, 1.0, conversation.tools)]
        return renderer.render(messages, weights, conversation.tools)

    def _finished_chat(self, chat: _Chat) -> EncodedRow:
        parts = [*map(self.coder.encode, chat.rendered)]
        longest = _longest(parts)
        if longest <= self.policy.max_length:
            return self._row_of(chat.conversation, parts, Fate.TRAINED)
        shorter = self._shorter_chat(chat, parts)
        if not shorter:
            return self._too_long(chat.conversation, longest)
        return self._row_of(chat.conversation, shorter, Fate.CUT)

    def _shorter_chat(self, chat: _Chat, parts: Sequence[Coded]) -> list[Coded]:
        """The parts that fit, and those that do not made shorter; empty where nothing can be kept."""
        limit, side = self.policy.max_length, self.policy.truncation_side
        if self.policy.overflow == "cut":
            return [part.cut(limit, side) for part in parts]
        if self.policy.overflow != "turns":
            return []
        kept: list[Coded] = []
        for part in parts:
            if len(part.tokens) <= limit:
                kept.append(part)
            else:
                turns = part.rendered.turns
                end = max(turns, default=len(chat.messages) - 1) + 1
                learnt = [w if i in turns else 0.0 for i, w in enumerate(chat.weights[:end])]
                kept += self._without_turns(chat.messages[:end], learnt, chat.conversation)
        return kept

    def _without_turns(
        self, messages: Sequence[Message], weights: Sequence[float], conversation: Conversation
    ) -> list[Coded]:
        """The conversation without as few of its first turns as possible, so that it fits; empty if none does.

        The system messages in front, the tools, and the last question with its answer always stay.
        """
        body = _body(messages)
        starts = _questions(messages, body)
        tried: dict[int, list[Coded]] = {}

        def fits(start: int) -> bool:
            try:
                fewer, learnt = [*messages[:body], *messages[start:]], [*weights[:body], *weights[start:]]
                tried[start] = [*map(self.coder.encode, self._rendered(fewer, learnt, conversation))]
            except Refusal:
                return False
            return _longest(tried[start]) <= self.policy.max_length

        first = bisect_left(starts, True, key=fits)
        return tried[starts[first]] if first < len(starts) else []

    def _row_of(self, conversation: Conversation, parts: Sequence[Coded], fate: Fate) -> EncodedRow:
        encoded = tuple(Encoded(conversation.origin, each.tokens, each.weights) for each in parts)
        split = any(each.split_at_edges and not each.literal for each in parts)
        notes = tuple(dict.fromkeys(note for part in parts for note in part.rendered.notes))
        return _finished(conversation, (encoded,), fate, max(each.literal for each in parts), split, notes)

    def _too_long(self, conversation: Conversation, length: int) -> EncodedRow:
        reason = f"{length} tokens, max_length is {self.policy.max_length}"
        return EncodedRow(conversation, Fate.TOO_LONG, reason=reason)


def _longest(parts: Sequence[Coded]) -> int:
    return max(len(part.tokens) for part in parts)


def _finished(
    conversation: Conversation,
    examples: Sequence[Example],
    fate: Fate,
    literal: int,
    split_at_edges: bool = False,
    notes: tuple[str, ...] = (),
) -> EncodedRow:
    """The row with the parts that have something to learn; no target where none has."""
    kept = tuple(learnt for example in examples if (learnt := tuple(part for part in example if _has_target(part))))
    if not kept:
        return EncodedRow(conversation, Fate.NO_TARGET, (), "no learnt token is left", literal, split_at_edges, notes)
    return EncodedRow(conversation, fate, kept, "", literal, split_at_edges, notes)


def _chat_only(conversation: Conversation) -> str:
    """What of a row only a chat template can show: nothing, or what it is called."""
    has = {
        "reasoning": any(message.reasoning for message in conversation.messages),
        "tool calls": any(message.tool_calls for message in conversation.messages),
        "tools": bool(conversation.tools),
        "template variables": bool(conversation.template_kwargs),
        "a system prompt": conversation.kind == "dialogue" and conversation.messages[0].role == "system",
    }
    return ", ".join(name for name, is_there in has.items() if is_there)


def _has_target(part: Encoded) -> bool:
    """The first token of a document is predicted from nothing, so it is no target."""
    return bool(part.weights[1:].any())


def _body(messages: Sequence[Message]) -> int:
    """The index of the first message after the system messages in front."""
    return next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), len(messages))


def _questions(messages: Sequence[Message], body: int) -> list[int]:
    """Where a conversation may begin, system messages aside, if its first turns go: at each later question."""
    later = range(body + 1, len(messages))
    return [i for i in later if messages[i].role == "user" and messages[i - 1].role != "user"]


_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
OUT_OF_FP32 = "not 0, and no number of fp32 (1.2e-38 to 3.4e+38); say 0, or scale the weights"


def is_fp32(weight: Any, scale: Any) -> Any:
    """Whether weights times their scales are 0 because one of them is, or normal numbers of fp32; arrays as well.

    >>> is_fp32(1e-30, 1.0), is_fp32(1e-30, 1e-30), is_fp32(0.0, 1e-30), is_fp32(1e30, 1e30)
    (True, False, True, False)
    """
    product = weight * scale
    return (weight == 0) | (scale == 0) | ((product >= _SMALLEST) & (product <= _LARGEST))


def message_weights(messages: Sequence[Message], train_on: TrainOn) -> list[float]:
    """How much each message is learnt: its own weight, or 1 or 0 by the policy.

    A weight that a row carries counts on messages that the policy learns; it never makes another role a target.

    >>> chat = [Message("user", "a"), Message("assistant", "b", 0.5), Message("user", "c"), Message("assistant", "d")]
    >>> message_weights(chat, "assistant"), message_weights(chat, "last_assistant")
    ([0.0, 0.5, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0])
    """
    learnt = [train_on == "all" or message.role in _LEARNT_ROLES for message in messages]
    if train_on == "last_assistant" and any(learnt):
        last = max(index for index, is_learnt in enumerate(learnt) if is_learnt)
        learnt = [index == last for index in range(len(messages))]
    return [
        (1.0 if message.weight is None else message.weight) if is_learnt else 0.0
        for message, is_learnt in zip(messages, learnt, strict=True)
    ]


def said(message: Message) -> Iterator[str]:
    """All the words of a message."""
    yield message.content
    if message.reasoning:
        yield message.reasoning
    for call in message.tool_calls:
        yield call.name
        yield call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)


def as_raw(messages: Sequence[Message]) -> list[Message]:
    """The messages as a dialogue: what the assistant says is an output, all else a prompt."""
    outputs = {"assistant", "output"}
    return [Message("output" if m.role in outputs else "prompt", m.content, m.weight) for m in messages]


def as_chat(messages: Sequence[Message]) -> list[Message]:
    """The messages as a chat: prompts are the user's, outputs the assistant's."""
    return [replace(m, role=_CHAT_ROLES[m.role]) if m.role in _CHAT_ROLES else m for m in messages]


_CHAT_ROLES = {"prompt": "user", "output": "assistant"}
