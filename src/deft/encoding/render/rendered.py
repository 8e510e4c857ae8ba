"""Texts that a chat template wrote beforehand -> what is learnt in them (`render: rendered`).

Such a text is `apply_chat_template`'s, kept as one string or as prompt and completion: the template's marks in it are
control tokens. What the template writes around answers is found by rendering made-up conversations under the prompt
law. An assistant turn is what stands between the inference prompt's end and the mark that stops generation; a text that
does not fit is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from deft.core.types import Message, Rendered, Span, ToolCall
from deft.encoding.render.chat import ChatRenderer
from deft.encoding.render.stop import BEGUN, LOOKS_LIKE_A_MARK, any_of
from deft.encoding.render.template import Refusal, Template
from deft.encoding.render.template_inputs import PROBE_TOOLS

_CHAT = (
    Message("user", "probe 0"),
    Message("assistant", "probe 1"),
    Message("user", "probe 2"),
    Message("assistant", "probe 3"),
)
_CALLS = (
    Message("user", "probe 0"),
    Message("assistant", "", tool_calls=(ToolCall("probe", {"a": "b"}, "000000000"),)),
    Message("tool", "probe 2", name="probe", tool_call_id="000000000"),
    Message("assistant", "probe 3"),
)


@dataclass(frozen=True, slots=True)
class AnswerPrompt:
    """What stands between somebody's words and the answer at inference; `header` is how a text shows an answer begins.

    text    "<|im_end|>\\n<|im_start|>assistant\\n"
    header  "<|im_start|>assistant"
    """

    text: str
    header: str

    @property
    def opening(self) -> str:
        """From the header on."""
        return self.text[self.text.rfind(self.header) :]


@dataclass(frozen=True, slots=True)
class AnswerTurn:
    """An assistant turn: its header's place, where the answer begins and ends, and the mark that stops it.

    start  None where the text before the answer is not as at inference
    stop   empty where the text ends first
    """

    header: int
    start: int | None
    end: int
    stop: str = ""


@dataclass(frozen=True)
class RenderedTexts:
    """Finds the assistant turns in texts that one template wrote.

    bos      the template writes it in front of a conversation; empty where it does not
    begins   what the template may write before the first words
    prompts  between words and an answer, those with the longest opening first
    openers  what begins another's turn: no answer has it
    stops    marks that stop generation
    closing  what ends an answer that has no stop
    tail     what the template writes after the last answer, if that is no stop
    """

    bos: str
    begins: tuple[str, ...]
    prompts: tuple[AnswerPrompt, ...]
    openers: tuple[str, ...]
    stops: tuple[str, ...]
    closing: str
    tail: str | None

    @classmethod
    def of(cls, renderer: ChatRenderer) -> RenderedTexts:
        """What a template writes; Refusal where no answer can be told from what stands around it."""
        fresh = ChatRenderer(renderer.template, renderer.marks)
        chats = _proven(fresh, [_CHAT, _thinking(_CHAT)])
        more = _rendered(fresh, [(Message("system", "probe"), *_CHAT)], ())
        more += _rendered(fresh, [_CALLS, _thinking(_CALLS)], PROBE_TOOLS)
        texts = [text for each in (*chats, *more) for text in each]
        prompts = _prompts(texts, chats[0][-1], header_of(fresh.template))
        stops = _stops({*fresh.stop_marks(), *fresh.marks.eos_all}, texts)
        last = chats[0][-1]
        begins = tuple(dict.fromkeys(text.text[: text.written[0][0]] for text in texts))
        bos = fresh.template.tokens.get("bos_token", "")
        return cls(
            bos=bos if any(bos and begin.startswith(bos) for begin in begins) else "",
            begins=begins,
            prompts=prompts,
            openers=_openers(texts, last, begins, {*stops, *(prompt.header for prompt in prompts)}),
            stops=stops,
            closing=last.text[max(end for _, end in last.written) :],
            tail=_tail(fresh, stops),
        )

    def prove(self, messages: Sequence[Message], weights: Sequence[float], only_last: bool) -> Rendered:
        """The messages' texts as one, in which the answers are learnt that stand in messages with weight.

        A message "prompt" ends where its row says so; an answer whose beginning it holds is learnt from its end on.
        Raises Refusal where the text is not one that the template writes.
        """
        contents = self._with_bos([message.content for message in messages])
        whole = "".join(contents)
        self._refuse_beginning(whole)
        turns = list(self._turns(whole))
        if not turns:
            raise Refusal(f"no assistant turn: {self.prompts[-1].text!r} stands nowhere in it")
        notes = []
        if not turns[-1].stop and (len(messages) > 1 or self.tail is not None):
            whole = whole.removesuffix(self.tail or "") + self.closing
            turns[-1] = replace(turns[-1], end=len(whole), stop=self.closing)
            notes.append(f"the template's stop {self.closing!r} closes what ends without one")
        ends = [*accumulate(map(len, contents))]
        ends[-1] = len(whole)
        learnt = list(_learnt(turns, list(pairwise([0, *ends])), weights))
        spans = [self._span(whole, *each) for each in (learnt[-1:] if only_last else learnt)]
        if not spans and any(weights):
            raise Refusal(f"no answer begins in what is learnt: the text before it ends {self.prompts[-1].text!r}")
        edges = sorted({edge for span in spans for edge in (span.start, span.end)})
        whole = whole[: edges[-1]] if edges else whole
        return Rendered(whole, tuple(spans), (), tuple(edges), tuple(notes))

    def whole(self, messages: Sequence[Message], weights: Sequence[float]) -> Rendered:
        """All of the messages' texts, learnt by their weights (train_on: all)."""
        contents = self._with_bos([message.content for message in messages])
        self._refuse_beginning("".join(contents))
        ranges = pairwise([0, *accumulate(map(len, contents))])
        spans = tuple(Span(*each, weight) for each, weight in zip(ranges, weights, strict=True) if each[0] < each[1])
        return Rendered("".join(contents), spans, ())

    def answers(self, rendered: Rendered) -> list[str]:
        """What is learnt of a text, without the marks that stop it."""
        return [self._marks.sub("", rendered.text[span.start : span.end]) for span in rendered.spans]

    def begins_so(self, text: str) -> bool:
        """Whether a text begins, BOS aside, exactly as the template begins a conversation."""
        return any(self._bare(text).startswith(self._bare(begin)) for begin in self.begins)

    def _bare(self, text: str) -> str:
        return text.removeprefix(self.bos)

    def _with_bos(self, contents: Sequence[str]) -> list[str]:
        """The contents with BOS in front of the first where the template writes one."""
        first, *others = contents
        if self.bos and first.startswith(self.bos * 2):
            raise Refusal(f"it begins with {self.bos * 2!r}: BOS stands once; take one out")
        return [self.bos + self._bare(first), *others]

    def _refuse_beginning(self, text: str) -> None:
        bare = self._bare(text)
        firsts = [mark[0] for begin in self.begins if (mark := LOOKS_LIKE_A_MARK.match(self._bare(begin)))]
        known = [*firsts, *map(str.strip, self.openers), *(prompt.header for prompt in self.prompts)]
        if not self.begins_so(text) and not bare.startswith(tuple(known)):
            expected = min(self.begins, key=len)
            raise Refusal(f"it begins with {bare[:40]!r}, where the template begins with {expected[:80]!r}")

    def _turns(self, text: str) -> Iterator[AnswerTurn]:
        at = 0
        while found := self._headers.search(text, at):
            start = self._start(text, found)
            if start is None:
                at = found.end()
                yield AnswerTurn(found.start(), None, at)
                continue
            stop = self._marks.search(text, start)
            at = stop.end() if stop else len(text)
            if start < len(text):
                yield AnswerTurn(found.start(), start, at, stop[0] if stop else "")

    def _start(self, text: str, header: re.Match[str]) -> int | None:
        """Where the answer begins, if the text before it is that of inference."""
        for prompt in self.prompts:
            begin = header.start() - len(prompt.text) + len(prompt.opening)
            is_first = not self._bare(text[: header.start()])
            if prompt.header != header[0]:
                continue
            if (begin >= 0 and text.startswith(prompt.text, begin)) or (
                is_first and text.startswith(prompt.opening, header.start())
            ):
                return header.start() + len(prompt.opening)
        return None

    def _span(self, text: str, turn: AnswerTurn, begin: int, weight: float) -> Span:
        if turn.start is None:
            shown = next(prompt.text for prompt in self.prompts if text.startswith(prompt.header, turn.header))
            raise Refusal(
                f"the text has {text[max(0, turn.header - 20) : turn.end + 20]!r}, and at inference the prompt ends "
                f"{shown!r}; give messages, which are rendered as at inference"
            )
        answer = text[turn.start : turn.end].removesuffix(turn.stop)
        opened = next((opener for opener in self.openers if opener in answer), None)
        if opened:
            raise Refusal(f"an assistant turn has no stop ({self.closing!r}) before {opened!r} begins another")
        return Span(max(turn.start, begin), turn.end, weight)

    @cached_property
    def _headers(self) -> re.Pattern[str]:
        return any_of({prompt.header for prompt in self.prompts})

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        return any_of(self.stops)


def header_of(template: Template) -> str:
    """What a template writes before an answer: the generation prompt, or what follows the question where there is none.

    Empty where it cannot be rendered.

    >>> from deft.encoding.render.template import chatml
    >>> header_of(Template(chatml(puts_bos=False, has_end=True), {"eos_token": "</s>"}))
    '<|im_start|>assistant'
    """
    question = _CHAT[:1]
    try:
        bare, prompt = template.render(question), template.render(question, add_generation_prompt=True)
    except Refusal:
        return ""
    asked, shown = str.__str__(bare), str.__str__(prompt)
    generation = shown.removeprefix(asked) if shown.startswith(asked) else ""
    return (generation if generation.strip() else shown.rpartition(question[0].content)[2]).strip()


def has_mark(text: str) -> bool:
    """Whether a text holds what looks like a control token, which the tokenizer may lack.

    >>> has_mark(" [/INST]"), has_mark("assistant:")
    (True, False)
    """
    return LOOKS_LIKE_A_MARK.search(text) is not None


def _thinking(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with reasoning in each answer."""
    return tuple(replace(each, reasoning="probe") if each.role == "assistant" else each for each in messages)


def _proven(renderer: ChatRenderer, chats: Sequence[Sequence[Message]]) -> list[list[Rendered]]:
    """The chats that can be rendered; Refusal, with the reason of the first, where none can."""
    found = _rendered(renderer, chats, ())
    if not found:
        renderer.render(chats[0], _weights(chats[0]))
    return found


def _rendered(
    renderer: ChatRenderer, chats: Sequence[Sequence[Message]], tools: Sequence[Mapping[str, Any]]
) -> list[list[Rendered]]:
    found = []
    for messages in chats:
        try:
            found.append(renderer.render(messages, _weights(messages), tools))
        except Refusal:
            continue
    return found


def _weights(messages: Sequence[Message]) -> list[float]:
    return [float(message.role == "assistant") for message in messages]


def _prompts(texts: Sequence[Rendered], last: Rendered, header: str) -> tuple[AnswerPrompt, ...]:
    """What stands before the answers of all texts; Refusal where it is nothing."""
    between = last.text[last.written[0][1] : last.written[1][0]]
    lengths = range(len(header), 0, -1)
    shared = next((header[:length] for length in lengths if header[:length] in between), "")
    shared = BEGUN.sub("", shared).strip()
    shown = dict.fromkeys(
        text.text[max((end for _, end in text.written if end <= span.start), default=0) : span.start]
        for text in texts
        for span in text.spans
    )
    found = [
        AnswerPrompt(text, shared if shared and shared in text else text.strip()) for text in shown if text.strip()
    ]
    question = last.text[last.written[1][1] : last.written[2][0]]
    if not found or any(prompt.header in question for prompt in found):
        raise Refusal("the template writes nothing before an answer by which it could be told from a question")
    return tuple(sorted(found, key=lambda prompt: len(prompt.opening), reverse=True))


def _stops(marks: set[str], texts: Sequence[Rendered]) -> tuple[str, ...]:
    """The marks that end answers and stand nowhere else in them."""
    learnt = [text.text[span.start : span.end] for text in texts for span in text.spans]
    return tuple(sorted(mark for mark in marks if not any(mark in answer.removesuffix(mark) for answer in learnt)))


def _openers(texts: Sequence[Rendered], last: Rendered, begins: Sequence[str], known: set[str]) -> tuple[str, ...]:
    """What begins the turns of others, and of the next answer, as far as no answer has it.

    known  stops and the headers of answers
    """
    learnt = "".join(text.text[span.start : span.end] for text in texts for span in text.spans)
    header = any_of(known).sub("", last.text[last.written[1][1] : last.written[2][0]])
    marks = [mark for mark in LOOKS_LIKE_A_MARK.findall(header) if mark not in learnt] or [header.rstrip()]
    firsts = [mark for begin in begins for mark in LOOKS_LIKE_A_MARK.findall(begin)[:1]]
    found = dict.fromkeys([*marks, *firsts, *sorted(known)])
    return tuple(each for each in found if each.strip() and each not in learnt)


def _tail(renderer: ChatRenderer, stops: Sequence[str]) -> str | None:
    """What stands after the last answer in the template's own text; None where a stop does."""
    try:
        own = str.__str__(renderer.template.render(_CHAT))
    except Refusal:
        return None
    tail = own.rpartition(_CHAT[-1].content)[2]
    return None if any_of(stops).search(tail) else tail


def _learnt(
    turns: Sequence[AnswerTurn], ranges: Sequence[tuple[int, int]], weights: Sequence[float]
) -> Iterator[tuple[AnswerTurn, int, float]]:
    """The turns that end in a message with weight, or begin in one: with its beginning and its weight."""
    for turn in turns:
        begin = turn.header if turn.start is None else turn.start
        for (first, end), weight in zip(ranges, weights, strict=True):
            if weight > 0 and first < turn.end and begin < end:
                yield turn, first, weight
                break
