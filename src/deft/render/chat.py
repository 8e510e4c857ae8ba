"""A chat -> texts and learnt spans, under the prompt law.

The text before each learnt span is exactly what the template shows the model at inference, and the span ends with the
mark that stops generation. A chat whose template rewrites its history becomes several texts, each learnt turn in one of
them. What cannot be proven is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deft.render.provenance import TEMPLATE, Traced
from deft.render.stop import Marks, Stop, find, last_character
from deft.render.template import Refusal, Template
from deft.types import Message, Span


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text, what is learnt in it, and which of its characters were written by messages.

    In the `written` ranges special tokens are text, never control tokens.
    """

    text: str
    spans: tuple[Span, ...]
    written: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Turn:
    """One learnt turn: the text up to its stop mark, which is learnt from `start` on."""

    text: Traced
    start: int
    weight: float


@dataclass(frozen=True)
class ChatRenderer:
    """Renders chats with one template.

    `stops` remembers the stop rule's answer per sequence of roles and characters after the turn, which is all that it
    depends on; `used` collects the marks that were found, for the exported generation_config.
    """

    template: Template
    marks: Marks
    _stops: dict[tuple[tuple[str, ...], str], Stop] = field(default_factory=dict, repr=False)

    def render(self, messages: Sequence[Message], weights: Sequence[float]) -> list[Rendered]:
        """One text, or several where history is rewritten; `weights[i]` > 0 says that message i is learnt.

        Raises Refusal where a mask cannot be proven. No learnt message gives the whole text without spans.
        """
        learnt = [index for index, weight in enumerate(weights) if weight > 0]
        if not learnt:
            text = self.template.render(messages)
            return [Rendered(str.__str__(text), (), _written(text))]
        turns = [self._turn(messages[: index + 1], weights[index]) for index in learnt]
        return [_as_rendered(group) for group in _grouped(turns)]

    def whole(self, messages: Sequence[Message], weight: float) -> Rendered:
        """The text of all messages, every character of it learnt (train_on: all)."""
        text = self.template.render(messages)
        plain = str.__str__(text)
        return Rendered(plain, (Span(0, len(plain), weight),), _written(text))

    def stop_marks(self) -> frozenset[str]:
        """The marks that ended the turns seen so far."""
        return frozenset(stop.mark for stop in self._stops.values())

    def _turn(self, messages: Sequence[Message], weight: float) -> _Turn:
        prompt = self.template.render(messages[:-1], add_generation_prompt=True)
        text = self.template.render(messages)
        start = len(prompt)
        if not text.startswith(prompt):
            raise Refusal(_contradiction(prompt, text))
        last = _check_words(text, start, messages)
        stop = self._stop(messages, str.__getitem__(text, slice(last, None)))
        end = last + stop.length
        if any(owner not in (len(messages) - 1, TEMPLATE) for owner, _ in text[start:end].runs):
            raise Refusal(f"the template writes another message inside messages[{len(messages) - 1}]")
        return _Turn(text[:end] + stop.appended, start, weight)

    def _stop(self, messages: Sequence[Message], tail: str) -> Stop:
        key = (tuple(message.role for message in messages), tail)
        if key not in self._stops:
            self._stops[key] = find(self.template, self.marks, messages, tail)
        return self._stops[key]


def _check_words(text: Traced, start: int, messages: Sequence[Message]) -> int:
    """One past the last character of the last message; Refusal unless the turn holds all its words."""
    index = len(messages) - 1
    own = "".join(piece for owner, piece in _pieces(text[start:]) if owner == index)
    if "".join(own.split()) != "".join(messages[-1].content.split()):
        raise Refusal(f"the template drops words of messages[{index}], which is learnt: {_shortened(own)} is left")
    last = last_character(text, index)
    if last is None:
        raise Refusal(f"messages[{index}] has no words to learn")
    return last


def _grouped(turns: Sequence[_Turn]) -> list[list[_Turn]]:
    """Turns that stand in one text, told by the prefix order of their texts; the longest is the first of its group."""
    groups: list[list[_Turn]] = []
    for turn in reversed(turns):
        home = next((group for group in groups if group[0].text.startswith(turn.text)), None)
        if home is None:
            groups.append([turn])
        else:
            home.append(turn)
    return groups[::-1]


def _as_rendered(group: Sequence[_Turn]) -> Rendered:
    longest = group[0].text
    turns = sorted(group, key=lambda turn: turn.start)
    spans = tuple(Span(turn.start, len(turn.text), turn.weight) for turn in turns)
    return Rendered(str.__str__(longest), spans, _written(longest))


def _written(text: Traced) -> tuple[tuple[int, int], ...]:
    at, ranges = 0, []
    for owner, length in text.runs:
        if owner != TEMPLATE:
            ranges.append((at, at + length))
        at += length
    return tuple(ranges)


def _pieces(text: Traced) -> list[tuple[int, str]]:
    at, pieces = 0, []
    for owner, length in text.runs:
        pieces.append((owner, str.__getitem__(text, slice(at, at + length))))
        at += length
    return pieces


def _contradiction(prompt: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    shown, written = prompt[at : at + 30], text[at : at + 30]
    return (
        f"the template contradicts itself: at inference the prompt has {shown!r} "
        f"where the conversation has {written!r} (character {at})"
    )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
