"""`evaluate.prompts: FILE`: every kind of file that data may be, and what is no prompt by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_llama

import deft
from deft.core.errors import InputError, Problems
from deft.evaluation import prompts
from deft.evaluation.prompts import Prompt

ASKED = [{"role": "user", "content": "2+2?"}]
VALUES = [
    "Hi",
    {"prompt": "2+2=", "answer": "4"},
    {"prompt": ASKED},
    {"messages": ASKED, "answer": "4"},
    {"conversations": [{"from": "human", "value": "2+2?"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]},
    ASKED,
]
PROMPTS = (
    Prompt("Hi", {}),
    Prompt("2+2=", {"answer": "4"}),
    Prompt(ASKED, {}),
    Prompt(ASKED, {"answer": "4"}),
    Prompt(ASKED, {}),
    Prompt(ASKED, {}),
    Prompt(ASKED, {}),
)
FILES = {
    "a.jsonl": "\n".join(map(json.dumps, VALUES)),
    "a.json": json.dumps(VALUES, indent=1),
    "a.ndjson": "\n\n".join(map(json.dumps, VALUES)) + "\n",
}


def write(folder: Path, name: str, text: str) -> str:
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_of_json_is_as_a_list_of_its_values(name: str, suffix: str, tmp_path: Path) -> None:
    assert prompts.load(write(tmp_path, name + suffix, FILES[name])) == PROMPTS == prompts.load(VALUES)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_each_line_of_a_text_file_is_a_prompt(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, "\ufeffHi\r\n\r\n  2+2=\n \t\nTell me.\u2028Now.\n")
    assert [prompt.prompt for prompt in prompts.load(path)] == ["Hi", "  2+2=", "Tell me.\u2028Now."]


def test_a_table_has_a_column_of_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'prompt,answer\n2+2=,4\n"Hi,\nyou",\n')
    assert prompts.load(path) == (Prompt("2+2=", {"answer": "4"}), Prompt("Hi,\nyou", {"answer": ""}))


def test_a_line_break_in_a_json_string_parts_no_prompt(tmp_path: Path) -> None:
    assert prompts.load(write(tmp_path, "a.jsonl", '"One.\\nTwo."')) == (Prompt("One.\nTwo.", {}),)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("3", "a number, not a prompt; give text or a list of messages"),
        ("{broken", "not valid JSON"),
        ('{"question": "Hi"}', "has the keys 'question', not 'prompt' or 'messages'"),
        ('{"role": "user", "content": "Hi"}', "put the messages of one prompt in a list"),
        ('{"prompt": null}', "prompt: null, not a prompt"),
        ('{"prompt": "Hi", "outputs": 1}', "outputs: metric_fn is given its own argument of this name; rename it"),
        ('{"messages": []}', "messages: the list is empty"),
        ('{"messages": "Hi"}', "messages: text, not a list"),
        ('{"messages": [{"role": "usr", "content": "Hi"}]}', "messages[0].role: 'usr' is not a role"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content: missing"),
        (
            '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}',
            "messages: the last message is the assistant's ('4'): nothing to answer; end with the user's message",
        ),
        ('{"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "f"}]}', "tools: a prompt cannot offer"),
        ('["Hi", "Hello"]', "[0]: text, not a message"),
        ('"half \\ud800"', "a lone surrogate"),
    ],
)
def test_what_is_no_prompt_is_named_by_file_and_line(line: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", f'"Hi"\n\n{line}\n"Bye"\n')
    with pytest.raises(Problems, match=r"evaluate\.prompts: 1 cannot be used") as error:
        prompts.load(path, "evaluate.prompts")
    (problem,) = error.value.problems
    assert problem.where == f"{path}:3"
    assert said in str(problem).removeprefix(f"{path}:3: ")


def test_all_of_them_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '3\n"Hi"\n{"a": 1}\n')
    with pytest.raises(Problems) as error:
        prompts.load(path)
    assert [problem.where for problem in error.value.problems] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("promps.txt", "no such file or folder; did you mean 'prompts.txt'?"),
        ("prompts.md", "unknown kind of file"),
        ("empty.txt", "the file is empty"),
        ("What is 2 + 2?", "put it in a list"),
    ],
)
def test_a_file_that_cannot_be_read_is_said(name: str, said: str, tmp_path: Path) -> None:
    for file, text in (("prompts.txt", "Hi"), ("prompts.md", "Hi"), ("empty.txt", "\n")):
        write(tmp_path, file, text)
    with pytest.raises(InputError, match=r"^evaluate\.prompts: .*") as error:
        prompts.load(str(tmp_path / name), "evaluate.prompts")
    assert said in str(error.value)


@pytest.mark.parametrize("way", ["the configuration", "a path from Python"])
def test_a_run_answers_the_prompts_of_a_file(way: str, tmp_path: Path) -> None:
    path = Path(write(tmp_path, "prompts.jsonl", '{"prompt": "What is 1?", "answer": 1}\n"Hi"\n'))
    given: dict[str, Any] = {"evaluate__prompts": str(path)} if way == "the configuration" else {"eval_prompts": path}
    found: list[Any] = []

    def metric(prompts: list[str], answer: list[Any], **_: Any) -> dict[str, list[float]]:
        found.append((prompts, answer))
        return {}

    run = deft.train(
        write_llama(tmp_path / "model"),
        samples=[["What is 2?", "It is 2."]] * 2,
        metric_fn=metric,
        evaluate__generate={"max_new_tokens": 2},
        output=str(tmp_path / "run"),
        epochs=1,
        **given,
    )
    assert found == [(["What is 1?", "Hi"], [1, None])] * 2, "before training and at the end"
    samples = [json.loads(line)["prompt"] for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert samples == ["What is 1?", "Hi"] * 2
    assert f"prompts: {path}" in (run.folder / "config.yaml").read_text()
