"""Every format: found by looking, read right, and refused by field where a row is wrong."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from deft.data import shapes, sources
from deft.errors import DeftError, Problems
from deft.types import Message

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}

GOOD: dict[str, list[Any]] = {
    "text": ["Once upon a time", {"text": "Once upon a time"}],
    "prompt_completion": [{"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "4"}],
    "dialogue": [["p", "o"], ["p", "o", "q", ""]],
    "messages": [{"messages": [USER, ANSWER]}, {"messages": [ANSWER], "id": 7}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
    "question_answer": [{"question": "2+2?", "answer": "4"}],
}

BAD: list[tuple[str, Any, str]] = [
    ("text", {"text": None}, "text: null, not text"),
    ("text", {"text": " "}, "no words"),
    ("prompt_completion", {"prompt": "a"}, "completion: missing"),
    ("prompt_completion", {"prompt": "a", "completion": ""}, "completion: empty"),
    ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "prompt: a list, not text"),
    ("dialogue", ["a", "b", "c"], "3 messages"),
    ("dialogue", ["a", 2], r"\[1\]: a number, not text"),
    ("messages", {"messages": []}, "the list is empty"),
    ("messages", {"messages": [USER]}, "no assistant message"),
    ("messages", {"messages": [USER, {"role": "asistant", "content": "x"}]}, "did you mean 'assistant'"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": " "}]}, r"messages\[1\]: an assistant message"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": -1}]}, "-1 is not a weight"),
    ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "'robot' is not a role"),
    ("sharegpt", {"conversations": [{"from": "gpt"}]}, r"conversations\[0\].value: missing"),
    ("question_answer", {"question": "a"}, "answer: missing"),
]


def understand(rows: list[Any]) -> shapes.Understood:
    return shapes.understand(sources.from_values(rows), "rows")


def test_every_format_of_the_folder_has_good_and_bad_rows_here() -> None:
    assert set(shapes.names()) == set(GOOD) == {shape for shape, _, _ in BAD}


@pytest.mark.parametrize("shape", sorted(GOOD))
def test_a_shape_is_found_by_looking(shape: str) -> None:
    known = understand(GOOD[shape])
    assert (known.shape, len(known.conversations), known.refused) == (shape, len(GOOD[shape]), ())


@pytest.mark.parametrize(("shape", "row", "what"), BAD)
def test_a_bad_row_is_refused_by_line_and_field(shape: str, row: Any, what: str) -> None:
    known = understand([*GOOD[shape], row])
    assert len(known.conversations) == len(GOOD[shape])
    (problem,) = known.refused
    assert problem.where == f"rows:{len(GOOD[shape]) + 1}"
    assert re.search(what, str(problem)), str(problem)


def test_weights_and_system_prompts_are_read() -> None:
    known = understand([{"messages": [USER, {**ANSWER, "loss_weight": 0.5}]}])
    assert known.conversations[0].messages[1] == Message("assistant", "Hello", 0.5)
    chat = {"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert understand([chat]).conversations[0].messages[0] == Message("system", "Be brief.")


def test_a_file_of_several_shapes_names_the_rows() -> None:
    with pytest.raises(Problems, match="several shapes") as error:
        understand([*GOOD["question_answer"] * 3, ["p", "o"]])
    assert [problem.where for problem in error.value.problems] == ["rows:4"]


def test_a_row_with_two_meanings_names_both() -> None:
    with pytest.raises(Problems, match="reads as messages and as text"):
        understand([{"messages": [USER, ANSWER], "text": "x"}])


def test_rows_without_a_shape_show_their_keys() -> None:
    with pytest.raises(Problems, match="'foo'"):
        understand([{"foo": 1}])


ACCEPTED = {
    "UTF-8 BOM", "CRLF", "blank line inside", "assistant first", "two user turns", "system not first",
    "control token in user text", "control token in answer", "pad token in answer", "2 MB row",
    "prompt fills max_length", "every row duplicate", "extra column in one row", "unknown columns only", "huge integer",
}  # fmt: skip
"""Sound rows; "unknown columns only" holds question and answer, which deft reads."""


def test_the_corpus_of_bad_inputs_is_refused_by_line(corpus: Path, tmp_path: Path) -> None:
    cases = json.loads((corpus / "bad_inputs.json").read_text())
    accepted = set()
    for case in cases:
        path = tmp_path / "train.jsonl"
        path.write_bytes(base64.b64decode(case["jsonl_base64"]))
        try:
            refused = shapes.understand(sources.read(str(path)), str(path)).refused
        except DeftError as error:
            message = str(error)
        else:
            message = "\n".join(map(str, refused))
        if not message:
            accepted.add(case["name"])
        elif case["line"] is not None and "gzip" not in case["name"]:
            assert f"train.jsonl:{case['line']}:" in message, (case["name"], message)
    assert len(cases) == 60
    assert accepted == ACCEPTED
