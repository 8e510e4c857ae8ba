"""HALOs' files: rows of `type` sample, binary_feedback, pairwise_feedback or scalar_feedback, an answer or two a row.

The good answers to a prompt are learnt: those labelled true, the winner of each pair, the highest reward; every sample.
`answers: best` keeps one per prompt_id. Where HALOs learns nothing better (no answer is labelled true), the answer of
the highest reward is taken. With a `control` text for bad answers, these are learnt too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deft.core.types import Conversation, Origin, Row
from deft.data import messages, pairs
from deft.data.fields import LeftOut, RowError, label_of, need, number_of, shortened, text_of
from deft.data.format import Choices
from deft.data.pairs import Side

_ROW = {"type", "prompt"}
KEYS = (
    *({*_ROW, "output"}, {*_ROW, "output", "label"}),
    *({*_ROW, "output_A"}, {*_ROW, "output_A", "output_B"}, {*_ROW, "output_A", "label"}),
)
READS = (
    "type",
    "prompt",
    "output",
    "output_A",
    "output_B",
    "label",
    "reward",
    "reward_A",
    "reward_B",
    "prompt_id",
    "split",
)
OPTIONS = {"answers", "control", "split"}
_TYPES = ("sample", "binary_feedback", "pairwise_feedback", "scalar_feedback")


def convert(row: Row, choices: Choices) -> list[Conversation]:
    """
    >>> from deft.core.types import Origin
    >>> value = {"type": "sample", "prompt": [{"role": "user", "content": "2+2?"}], "output": "4", "prompt_id": 0}
    >>> [message.content for message in convert(Row(Origin("a.json", 1), value), Choices())[0].messages]
    ['2+2?', '4']
    """
    need(row.value, ("type", "prompt"), "a row")
    kind = row.value["type"]
    if kind not in _TYPES:
        shown = shortened(repr(kind))
        fix = "mend it; where it means something else, name the format: data.format: prompt_completion"
        raise RowError("type", f"{shown} is not a type of HALOs' ({', '.join(_TYPES)})", fix)
    if choices.split is not None and row.value.get("split") not in (None, choices.split):
        raise LeftOut(f"split: {shortened(repr(row.value['split']))}, the source reads {choices.split!r}")
    if kind == "pairwise_feedback":
        fields = _ranked_pair(row.value)
        bad = [_answer(row, choices, fields[1], is_good=False)] if choices.learns_bad else []
        return [_answer(row, choices, fields[0]), *bad]
    is_good = kind != "binary_feedback" or _label(row.value)
    if kind == "scalar_feedback" and number_of(row.value.get("reward")) is None:
        raise RowError("reward", "missing or not a number", "scalar feedback needs it")
    return [_answer(row, choices, "output", is_good or not choices.learns_bad)]


def compared(row: Row) -> Row:
    """What `left_out` has to know of a row: its prompt and answers as digests.

    >>> from deft.core.types import Origin
    >>> value = {"type": "binary_feedback", "prompt": "q" * 999, "output": "a" * 999, "label": 1, "more": "x" * 999}
    >>> sorted(compared(Row(Origin("a.json", 1), value)).value)
    ['label', 'prompt_id', 'type']
    """
    value = row.value
    kept = {key: value[key] for key in ("type", "label", "reward", "reward_A", "reward_B") if key in value}
    kept["prompt_id"] = _digest(value.get("prompt_id", value["prompt"]))
    if value["type"] == "pairwise_feedback":
        kept |= {key: _digest(value[key]) for key in ("output_A", "output_B") if key in value}
    return Row(row.origin, kept)


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(repr(value).encode("utf-8"), digest_size=16).digest()


def left_out(rows: Sequence[Row], choices: Choices) -> dict[int, str]:
    """Which of the sound rows, as `compared` made them, are not learnt beside better ones, and why.

    >>> from deft.core.types import Origin
    >>> good, bad = ({"type": "binary_feedback", "prompt_id": 1, "label": label, "prompt": "q"} for label in (1, 0))
    >>> left_out([compared(Row(Origin("a.json", 1), bad)), compared(Row(Origin("a.json", 2), good))], Choices())
    {0: 'a worse answer than that of a.json:2'}
    """
    if choices.learns_bad:
        return {}
    found: dict[int, str] = {}
    for members in _by_prompt(rows):
        kept = _kept([rows[index] for index in members], choices)
        best = rows[members[kept[0]]].origin if kept else None
        for position, index in enumerate(members):
            if position not in kept:
                found[index] = _reason(rows[index], best)
    return found


def _reason(row: Row, best: Origin | None) -> str:
    if best is None:
        return "label: false, and no answer to its prompt has a reward"
    if row.value["type"] == "pairwise_feedback":
        return f"the same answer as that of {best}, or a worse one"
    return f"a worse answer than that of {best}"


def _by_prompt(rows: Sequence[Row]) -> Iterable[list[int]]:
    groups: dict[tuple[str, bytes], list[int]] = {}
    for index, row in enumerate(rows):
        if row.value["type"] != "sample":
            groups.setdefault((row.value["type"], row.value["prompt_id"]), []).append(index)
    return groups.values()


def _kept(rows: Sequence[Row], choices: Choices) -> list[int]:
    """Positions of the answers that are learnt, the best first."""
    kind = rows[0].value["type"]
    rewards = [_reward(row.value) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-rewards[i], i))
    if kind == "pairwise_feedback":
        good = _distinct(rows, order)
    elif kind == "binary_feedback":
        good = [i for i in order if _label(rows[i].value)]
        good = good or [i for i in order[:1] if rewards[i] > float("-inf")]
    else:
        good = order[:1]
    return good[:1] if choices.answers == "best" else good


def _distinct(rows: Sequence[Row], order: Iterable[int]) -> list[int]:
    """The rows whose winner no row before them in `order` has."""
    seen: dict[bytes, int] = {}
    for index in order:
        value = rows[index].value
        seen.setdefault(value[_ranked_pair(value)[0]], index)
    return list(seen.values())


def _reward(value: Mapping[str, Any]) -> float:
    """The reward of the answer that a row would give; minus infinity where it has none."""
    field = f"reward_{_ranked_pair(value)[0][-1]}" if value["type"] == "pairwise_feedback" else "reward"
    reward = number_of(value.get(field))
    return float("-inf") if reward is None else reward


def _ranked_pair(value: Mapping[str, Any]) -> tuple[str, str]:
    """The fields of winner and loser: by reward, as HALOs takes its SFT target; by label where rewards are not told."""
    need(value, ("output_A", "output_B"), "a pair")
    rewards = [number_of(value.get(f"reward_{side}")) for side in "AB"]
    if rewards[0] is None or rewards[1] is None or rewards[0] == rewards[1]:
        a_wins = _label(value)
    else:
        a_wins = rewards[0] > rewards[1]
    return ("output_A", "output_B") if a_wins else ("output_B", "output_A")


def _label(value: Mapping[str, Any]) -> bool:
    need(value, ("label",), str(value["type"]))
    return label_of(value["label"], "label")


def _answer(row: Row, choices: Choices, field: str, is_good: bool = True) -> Conversation:
    need(row.value, (field,), str(row.value["type"]))
    prompt, answer = _side(row.value["prompt"], "prompt"), _side(row.value[field], field)
    if not prompt:
        raise RowError("prompt", "empty", "fill it in or remove the row")
    return pairs.steered(pairs.as_chat(row, prompt, answer, ("prompt", field)), choices, is_good)


def _side(value: Any, field: str) -> Side:
    return messages.read_all(value, field) if isinstance(value, list | tuple) else text_of(value, field)
