"""Results of tools stand in the order of their calls, and each answers one of them."""

from __future__ import annotations

from typing import Any

import pytest
from readers import understand

from deft.data import sources

CALLS = [{"id": name, "function": {"name": name, "arguments": {}}} for name in ("a", "b", "c")]


def turn(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def result(name: str | None, words: str = "") -> dict[str, Any]:
    return {"role": "tool", "content": words or str(name), "tool_call_id": name}


def said(*messages: dict[str, Any]) -> tuple[list[str], str]:
    """What each message says, and why the row is refused; a good row stands beside it."""
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": [good[0], *messages]}, {"messages": good}]
    found = understand(sources.from_values(rows), "rows")
    return [message.content for message in found.conversations[0].messages[1:]], "".join(map(str, found.refused))


def test_results_follow_the_order_of_their_calls() -> None:
    assert said(turn(*CALLS), result("c"), result("a"), result("b"))[0] == ["", "a", "b", "c"]
    assert said(turn(*CALLS), result("c"), result("b"))[0] == ["", "b", "c"]
    later = turn({"id": "d", "function": {"name": "d"}})
    assert said(turn(*CALLS[:2]), result("b"), result("a"), later, result("d"))[0] == ["", "a", "b", "", "d"]


def test_calls_of_adjacent_messages_are_one_turn_and_words_between_results_keep_their_place() -> None:
    assert said(turn(CALLS[0]), turn(CALLS[1]), result("b"), result("a"))[0] == ["", "", "a", "b"]
    note = {"role": "user", "content": "Look."}
    assert said(turn(*CALLS[:2]), result("b"), note, result("a"))[0] == ["", "a", "Look.", "b"]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ((turn(*CALLS), result("z")), "messages[2].tool_call_id: answers no call of the turn before"),
        ((turn(*CALLS[:2]), result("a"), turn(CALLS[2]), result("b")), "messages[4].tool_call_id: answers no call"),
        ((turn(*CALLS), result("a"), result("a", "again")), "messages[3].tool_call_id: is a second result of 'a'"),
    ],
)  # fmt: skip
def test_a_result_of_no_call_or_a_second_one_refuses_the_row(messages: Any, what: str) -> None:
    assert what in said(*messages)[1]


def test_what_ids_do_not_name_stays_as_it_is() -> None:
    nameless = [{"function": {"name": name}} for name in ("a", "b")]
    assert said(turn(*nameless), result("z"), result("y"))[0] == ["", "z", "y"]
    assert said(turn(*CALLS), result(None, "x"), result("a"))[0] == ["", "x", "a"]
    twins = [{**CALLS[0], "id": "same"}, {**CALLS[1], "id": "same"}]
    assert said(turn(*twins), result("same", "1"), result("same", "2"))[0] == ["", "1", "2"]
