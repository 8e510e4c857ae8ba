"""Shapes of popular data sets: each row says what its publisher means, or is refused with a way out that works."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft.core.errors import InputError, Problems
from deft.core.types import Conversation, Message
from deft.data import shapes
from deft.data.format import Choices
from deft.data.shapes import Outcome
from deft.dataset.source import SourceSpec
from deft.dataset.survey import Execution, understand
from deft.encoding.render.chat import GREETING, ChatRenderer
from deft.encoding.render.stop import Marks
from deft.encoding.render.template import Refusal, Template
from deft.run import config
from deft.run.reading import Session, _sources

ALONE = Execution(processes=1)
Said = list[tuple[str, Any]]


def outcomes(spec: SourceSpec) -> tuple[str, list[Outcome]]:
    ((_, found),) = understand([spec], ALONE)
    reader = shapes.Reader(spec.path, found.shape, spec.choices)
    return found.shape, [each for chunk in spec.chunks() for each in reader.each(chunk.read())]


def words(conversation: Conversation) -> Said:
    """Roles and words, calls in place of the words of a message that makes them."""
    return [(m.role, [(c.name, c.arguments) for c in m.tool_calls] or m.content) for m in conversation.messages]


def file(folder: Path, name: str, content: str | bytes) -> SourceSpec:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return SourceSpec(str(path))


def read(spec: SourceSpec) -> tuple[str, list[Said]]:
    shape, found = outcomes(spec)
    assert [str(each.refused) for each in found if each.refused] == []
    return shape, [words(conversation) for each in found for conversation in each.conversations]


def rows(*values: Any, **more: Any) -> SourceSpec:
    return SourceSpec("rows", rows=values, **more)


def why(spec: SourceSpec) -> str:
    """Why the first row that is refused is, or the source."""
    try:
        _, found = outcomes(spec)
    except (InputError, Problems) as error:
        return str(error)
    return next(str(each.refused) for each in found if each.refused)


OSLO, ROME = ("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})
BEST = "\n\nHuman: Best fruit?\n\nAssistant:"
CASES: dict[str, tuple[str, list[Said]]] = {
    "D23": ("sharegpt", [[("user", "Oslo and Rome?"), ("assistant", [OSLO, ROME]), ("tool", "3C"), ("tool", "9C"),
                          ("assistant", "3 and 9.")]]),
    "D25": ("preference", [[("prompt", BEST), ("output", " I think it is the apple.")]]),
    "D27": ("preference", [[("prompt", BEST), ("output", " Apple. It is sweet.")],
                           [("prompt", BEST), ("output", " Plum.")]]),
    "D31": ("alpaca", [[("user", "Name a fruit."), ("assistant", "Apple.")]]),
    "D31b": ("sharegpt", [[("user", "Name a fruit."), ("assistant", "Apple.")]]),
    "D32": ("sharegpt", [[("user", "How do I boil an egg?"), ("assistant", "Eight minutes.")]]),
    "D33": ("question_answer", [[("user", "2+2?"), ("assistant", "4")]]),
    "D33d": ("prompt_completion", [[("prompt", "2+2?"), ("output", "4")]]),
    "D35": ("function_calls", [[("user", "Weather in Oslo and Rome?"), ("assistant", [OSLO, ROME])]]),
    "D36": ("gemini", [[("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]]),
    "D39": ("messages", [[("user", "Oslo?"), ("assistant", [OSLO]), ("tool", "3C"), ("assistant", "3 C.")]]),
    "D44": ("oasst", [[("user", "hi"), ("assistant", "hello")]]),
    "D46": ("alpaca", [[("user", "a"), ("assistant", "b")]]),
    "D48": ("prompt_completion", [[("prompt", "2+2="), ("output", "4")]]),
    "D49": ("prompt_completion", [[("prompt", "2+2="), ("output", "4")], [("prompt", "3+2="), ("output", "5")]]),
}  # fmt: skip
"""Case -> the shape it is read as, and what its conversations say."""


@pytest.fixture(scope="module")
def cases(corpus: Path) -> dict[str, dict[str, str]]:
    return {case["id"]: case for case in json.loads((corpus / "cases" / "data.json").read_text())}


@pytest.mark.parametrize("name", CASES)
def test_a_reported_file_is_read_as_it_is_meant(name: str, cases: dict[str, Any], tmp_path: Path) -> None:
    case = cases[name]
    assert read(file(tmp_path, f"rows.{case['ext']}", case["file"])) == CASES[name]


def test_reported_files_with_a_system_prompt_and_tools_in_their_own_form(cases: dict[str, Any], tmp_path: Path) -> None:
    for name in ("D33c", "D37"):  # the prompt stands beside the turns, whatever the shape
        _, (said,) = read(file(tmp_path, f"{name}.jsonl", cases[name]["file"]))
        assert [each for each in said if each[0] != "system"] == [("user", "2+2?"), ("assistant", "4")]
    for name, function in (
        ("D35", {"name": "weather", "description": "d",
                 "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}),
        ("D42", {"name": "weather"}),
    ):  # fmt: skip
        _, (outcome,) = outcomes(file(tmp_path, f"{name}.jsonl", cases[name]["file"]))
        assert outcome.conversations[0].tools == ({"type": "function", "function": function},)


def test_a_sentence_before_a_call_belongs_to_its_message(cases: dict[str, Any], tmp_path: Path) -> None:
    _, (outcome,) = outcomes(file(tmp_path, "D39.jsonl", cases["D39"]["file"]))
    assert outcome.conversations[0].messages[1].content == "I look."


def keys_of_row(value: Any) -> str:
    return ",".join(value) if isinstance(value, dict) else ""


PAIR: Said = [("prompt", "2+2?"), ("output", "4")]
CHAT: Said = [("user", "2+2?"), ("assistant", "4")]
TWICE: Said = [*CHAT, ("user", "3+2?"), ("assistant", "5")]
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
TEXT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"

READ: list[tuple[Any, str, Said]] = [
    *(({"prompt": "2+2?", name: "4"}, "prompt_completion", PAIR) for name in ("response", "answer", "output")),
    ({"inputs": "2+2?", "targets": "4", "task": "sum"}, "prompt_completion", PAIR),
    ({"prompt": "2+2?", "completion": "4", "response": "4"}, "prompt_completion", PAIR),
    ({"prompt": "2+2?", "completion": "4", "response": ""}, "prompt_completion", PAIR),
    ({"problem": "2+2?", "solution": "4", "level": "1"}, "question_answer", CHAT),
    ({"Question": "2+2?", "Response": "4"}, "question_answer", CHAT),
    ({"QUERY": "2+2?", "Answer": "4"}, "question_answer", CHAT),
    ({"user": "2+2?", "assistant": "4"}, "question_answer", CHAT),
    ({"Messages": [{"Role": "user", "Content": "2+2?"}, {"Role": "assistant", "Content": "4"}]}, "messages", CHAT),
    ({"messages": json.dumps([{"Role": each["role"], "Content": each["content"]} for each in TURNS])}, "messages",
     CHAT),
    ({"Conversations": [{"From": "human", "Value": "2+2?"}, {"From": "gpt", "Value": "4"}]}, "sharegpt", CHAT),
    ({"question": "2+2?", "answers": {"text": ["4", "4"], "answer_start": [0, 3]}}, "question_answer", CHAT),
    ({"instruction": "2+2?", "answer": "4"}, "alpaca", CHAT),
    ({"instruction": "2+2?", "context": "", "response": "4", "category": "qa"}, "alpaca", CHAT),
    ({"instruction": "Add.", "input": "2, 2", "output": "4", "prompt": "Add. 2, 2 ### 4"}, "alpaca",
     [("user", "Add.\n\n2, 2"), ("assistant", "4")]),
    ({"messages": TURNS, "text": TEXT}, "messages", CHAT),
    ({"problem": "2+2?", "solution": "4", "messages": TURNS}, "messages", CHAT),
    ({"conversations": [["2+2?", "4"], ["3+2?", "5"]]}, "sharegpt", TWICE),
    ({"id": "0", "data": ["2+2?", "4", "3+2?", "5"]}, "sharegpt", TWICE),
    ({"conversation": [{"input": "2+2?", "output": "4"}, {"input": "3+2?", "output": "5"}]}, "sharegpt", TWICE),
    ({"conversation": [{"human": "2+2?", "assistant": "4"}]}, "sharegpt", CHAT),
    ({"dialog": TURNS}, "sharegpt", CHAT),
    ({"input": "2+2?", "chosen": "4", "rejected": "5"}, "preference", PAIR),
    ({"query": "2+2?", "chosen": "4", "rejected": "5"}, "preference", CHAT),
    ({"prompt": "2+2?", "response": "4", "label": True}, "preference", PAIR),
    ({"instruction": "2+2?", "input": "", "output": "4", "kto_tag": True}, "preference", CHAT),
    ({"chosen": "### Human: a### Assistant: b", "rejected": "### Human: a### Assistant: c"}, "preference",
     [("prompt", "### Human: a### Assistant:"), ("output", " b")]),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
      "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d e"}, "preference",
     [("prompt", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"), ("output", " d")]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "shape", "said"), READ, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
)
def test_names_and_shapes_of_popular_sets_are_read(row: Any, shape: str, said: Said) -> None:
    assert read(rows(row)) == (shape, [said])


REFUSED: list[tuple[Any, str]] = [
    ({"instruction": "a", "output": "b", "response": "c"}, "output: says something else than response"),
    ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "input: says something else than context"),
    ({"problem": "a", "solution": "b", "answer": "c"},
     r"answer: says something else than solution.*ignore: \[solution\]"),
    ({"prompt": "a", "input": "b", "output": "c"}, "prompt: says something else than input"),
    ({"question": "a", "context": "b", "answer": "c"}, "{instruction: question, input: context, output: answer}"),
    ({"messages": TURNS, "text": "a summary"}, "as messages and as text, which say different.*data.format: messages"),
    ({"instruction": "a", "response": "b", "conversations": ["c", "d"]}, "as sharegpt and as alpaca, which say"),
    ({"chosen": "The apple.", "rejected": "The pear."}, "no `Assistant:`.*give prompt"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "\n\nHuman: a\n\nAssistant: x"},
     "rejected has another text up to the last"),
    ({"prompt": "a", "chosen": TURNS}, "prompt: says something else than the messages of chosen"),
    ({"input": "fine", "output": "good", "label": "pos"}, "name the format, as data.format: prompt_completion"),
    ({"prompt": float("nan"), "completion": "b"}, "prompt_completion is closest, but prompt is null"),
    ({"prompt": "a", "completion": float("inf")}, "completion: NaN, not text"),
    ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "prompt: a list of texts.*write a row a line"),
    ({"data": [{"prompt": "a", "completion": "b"}]}, "data: a list of rows.*on a line of its own"),
    ({"train": [{"prompt": "a", "completion": "b"}]}, "the rows stand in the list under 'train'"),
    ({"ask": "2+2?", "tell": "4", "id": "1"}, "'ask', 'tell', 'id'; map the .*{prompt: ask, completion: tell}"),
    ({"prompt": "2+2?", "told": "4"}, "prompt_completion is closest.*columns: {prompt: prompt, completion: told}"),
    ({"speech": TURNS}, "columns: {messages: speech}"),
    ({"role": "user", "content": "Hi"}, "a message alone is no row"),
    ({"system": "SYSTEM: Be brief.", "chat": "USER: 2+2?\n\n\nASSISTANT: 4 <|endoftext|>"},
     "the turns stand in one text, 'chat', behind headers.*format: pkg.mod:fn"),
    ({"question": "2+2?", "options": ["3", "4"], "answer": "B"}, r"options: rows of this shape.*ignore: \[options\]"),
    ({"mesages": "x", "id": 1}, r"columns: {text: mesages}"),
    ({"contents": [{"role": "user", "parts": [{"text": "a"}]}]}, "no assistant message"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "what"), REFUSED, ids=keys_of_row)
def test_what_is_not_sure_is_refused_with_a_way_out(row: Any, what: str) -> None:
    assert re.search(what, why(rows(row))), why(rows(row))


def test_a_refusals_way_out_works() -> None:
    squad = {"question": "Capital?", "context": "Oslo is it.", "answers": {"text": ["Oslo"], "answer_start": [0]}}
    columns = {"instruction": "question", "input": "context", "output": "answers"}
    said = [("user", "Capital?\n\nOslo is it."), ("assistant", "Oslo")]
    assert read(rows(squad, choices=Choices(columns))) == ("alpaca", [said])
    math = {"problem": "2+2?", "solution": "4", "answer": "four"}
    assert read(rows(math, choices=Choices(ignore=("answer",))))[1] == [CHAT]
    both = {"messages": TURNS, "text": "a summary"}
    assert read(rows(both, format="text")) == ("text", [[("output", "a summary")]])


def test_nan_in_a_calls_arguments_or_a_tools_schema_is_refused() -> None:
    call = {"function": {"name": "f", "arguments": {"x": float("nan")}}}
    row = {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [call]}]}
    assert "arguments: nan is not JSON" in why(rows(row))
    assert "tools[0]: inf is not JSON" in why(rows({"messages": TURNS, "tools": [{"name": "f", "max": float("inf")}]}))


RESULTS: Said = [("user", "Oslo?"), ("assistant", [OSLO]), ("tool", "3C"), ("assistant", "3 C.")]
WEATHER = {"name": "weather", "description": "d"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CAPITALS = {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}}
ASKED, TOLD = {"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": "3 C."}
TOOL_CHATS: dict[str, Any] = {
    "anthropic": {
        "tools": [{**WEATHER, "input_schema": SCHEMA}],
        "messages": [
            ASKED,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "weather", "input": OSLO[1]}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "3C"}]},
            TOLD,
        ],
    },
    "bedrock": {
        "toolConfig": {"tools": [{"toolSpec": {**WEATHER, "inputSchema": {"json": SCHEMA}}}]},
        "messages": [
            {"role": "user", "content": [{"text": "Oslo?"}]},
            {"role": "assistant", "content": [{"toolUse": {"toolUseId": "c", "name": "weather", "input": OSLO[1]}}]},
            {"role": "user", "content": [{"toolResult": {"toolUseId": "c", "content": [{"text": "3C"}]}}]},
            {"role": "assistant", "content": [{"text": "3 C."}]},
        ],
    },
    "responses": {
        "tools": [{"type": "function", **WEATHER, "parameters": SCHEMA}],
        "input": [
            ASKED,
            {"type": "function_call", "call_id": "c", "name": "weather", "arguments": OSLO[1]},
            {"type": "function_call_output", "call_id": "c", "output": "3C"},
        ],
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "3 C."}]}],
    },
    "gemini": {
        "tools": [{"functionDeclarations": [{**WEATHER, "parameters": CAPITALS}]}],
        "contents": [
            {"role": "user", "parts": [{"text": "Oslo?"}]},
            {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": OSLO[1]}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": "3C"}}]},
            {"role": "model", "parts": [{"text": "3 C."}]},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TOOL_CHATS)
def test_tools_calls_and_results_of_apis_are_those_of_openai(name: str) -> None:
    _, (outcome,) = outcomes(rows(TOOL_CHATS[name]))
    (chat,) = outcome.conversations
    assert words(chat) == RESULTS
    assert chat.tools == ({"type": "function", "function": {**WEATHER, "parameters": SCHEMA}},)
    assert chat.messages[1].tool_calls[0].id == chat.messages[2].tool_call_id


def test_what_stands_between_results_keeps_its_place() -> None:
    parts = [{"type": "text", "text": "Look."}, {"type": "tool_result", "tool_use_id": "c", "content": "3C"}]
    _, (said,) = read(rows({"messages": [{"role": "user", "content": parts}, TOLD]}))
    assert said == [("user", "Look."), ("tool", "3C"), ("assistant", "3 C.")]


def flat(number: int, parent: int | None, role: str, text: str, tree: str = "t", **more: Any) -> dict[str, Any]:
    up = None if parent is None else str(parent)
    return {"message_id": str(number), "parent_id": up, "role": role, "text": text, "message_tree_id": tree, **more}


def test_flat_messages_are_gathered_into_their_trees(tmp_path: Path) -> None:
    one = [
        flat(0, None, "prompter", "q"),
        flat(1, 0, "assistant", "worse", rank=1),
        flat(2, 0, "assistant", "best", rank=0),
    ]
    other = [flat(3, None, "prompter", "r", "u"), flat(4, 3, "assistant", "s", "u")]
    expected = ("oasst", [[("user", "q"), ("assistant", "best")], [("user", "r"), ("assistant", "s")]])
    assert read(rows(*one, *other)) == expected
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**each, "rank": each.get("rank")} for each in (*one, *other)]), sink)
    spec = file(tmp_path, "trees.parquet", sink.getvalue())
    assert read(spec) == expected
    assert [each.origin.line for each in outcomes(spec)[1]] == [1, 4]
    assert read(rows(*one, *other, choices=Choices(answers="all")))[1][1] == [("user", "q"), ("assistant", "worse")]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([flat(2, 9, "assistant", "b")], "rows:4: parent_id: '9' is not in its tree"),
        ([flat(2, None, "prompter", "b")], "rows:3: 2 messages without a parent"),
        ([flat(2, 3, "assistant", "b"), flat(3, 2, "prompter", "c")], "rows:3: messages that are each other's parents"),
        ([flat(1, None, "prompter", "b")], "rows:3: a message_id twice"),
        (
            [flat(4, 1, "assistant", "b"), flat(5, 0, "assistant", "b", "first")],
            "rows:5: stands apart from its tree; sort the rows",
        ),
    ],
)
def test_a_tree_that_is_not_whole_is_refused_by_its_row(messages: list[Any], what: str) -> None:
    first = [flat(0, None, "prompter", "q", "first"), flat(9, 0, "assistant", "a", "first")]
    found = why(rows(*first, flat(1, None, "prompter", "q"), *messages))
    assert what in found, found


DOCUMENTS: dict[str, Any] = {
    "under data": {"version": "1.1", "data": [{"prompt": "2+2?", "completion": "4"}]},
    "under train": {"train": [{"prompt": "2+2?", "completion": "4"}]},
    "columns": {"prompt": ["2+2?"], "completion": ["4"]},
    "pandas columns": {"prompt": {"0": "2+2?"}, "completion": {"0": "4"}},
    "pandas index": {"0": {"prompt": "2+2?", "completion": "4"}},
    "pandas split": {"columns": ["prompt", "completion"], "index": [0], "data": [["2+2?", "4"]]},
    "one row": {"prompt": "2+2?", "completion": "4"},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_rows_inside_a_document_are_read(name: str, tmp_path: Path) -> None:
    assert read(file(tmp_path, "rows.json", json.dumps(DOCUMENTS[name], indent=1))) == ("prompt_completion", [PAIR])


def test_rows_inside_a_document_know_their_lines_and_two_lists_are_an_error(tmp_path: Path) -> None:
    pair = {"prompt": "2+2?", "completion": "4"}
    text = '{"version": 1,\n "data": [\n' + json.dumps(pair) + ",\n" + json.dumps(pair) + "\n]}\n"
    assert [each.origin.line for each in outcomes(file(tmp_path, "a.json", text))[1]] == [3, 4]
    both = file(tmp_path, "b.json", json.dumps({"train": [pair], "test": [pair]}))
    assert "b.json:1: rows stand under 'train' and under 'test'" in why(both)
    task = {"instruction": "Add.", "instances": [{"input": "2+2?", "output": "4"}]}
    assert read(file(tmp_path, "c.json", json.dumps(task)))[0] == "instances"
    chat = {"messages": TURNS, "examples": [pair]}
    assert read(file(tmp_path, "d.json", json.dumps(chat)))[0] == "messages"


def configured(**data: Any) -> tuple[SourceSpec, ...]:
    train, held_out = _sources(config.make({"model": "m", "data": data}), Session())
    return (*train, *held_out)


def prompts(spec: SourceSpec) -> list[str]:
    return [said[0][1] for said in read(spec)[1]]


@pytest.fixture
def hub(tmp_path: Path) -> str:
    """A clone of a data set of the Hub, whose splits README.md names."""
    for split in ("train_sft", "test_sft"):
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([{"prompt": split, "completion": "a"}])
        pq.write_table(table, tmp_path / f"hub/data/{split}-00000-of-00001-ab12.parquet")
    head = "configs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {name}\n    path: data/{name}_sft-*\n" for name in ("train", "test")
    )
    file(tmp_path, "hub/README.md", f"---\nlicense: mit\n{head}---\n# Rows\n")
    return str(tmp_path / "hub")


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """What `save_to_disk` writes, with a file that `map` left behind."""
    file(tmp_path, "saved/dataset_dict.json", '{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        for name, prompt in (("data-00000-of-00001", split), ("cache-12", "cached")):
            sink = io.BytesIO()
            table = pa.Table.from_pylist([{"prompt": prompt, "completion": "a"}])
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            file(tmp_path, f"saved/{split}/{name}.arrow", sink.getvalue())
        file(tmp_path, f"saved/{split}/state.json", "{}")
    return str(tmp_path / "saved")


def test_of_a_folder_with_splits_one_is_read_and_named(hub: str, saved: str) -> None:
    for folder, train, test in ((hub, "train_sft", "test_sft"), (saved, "train", "test")):
        (source,) = configured(train=folder)
        assert prompts(source) == [train]
        assert source.split_read() == f"{folder}: reads split train of it; there is test too (split: chooses)"
        assert prompts(configured(train=folder, split="test")[0]) == [test]
        assert [prompts(each) for each in configured(train=folder, eval=folder)] == [[train], [test]]
        assert "no split 'tset'; there is" in why(configured(train=folder, split="tset")[0])
        assert "did you mean 'test'?" in why(configured(train=folder, split="tset")[0])
    assert "no subset 'en'; say subset: default" in why(configured(train={"path": hub, "subset": "en"})[0])
    assert prompts(configured(train=f"{saved}/test")[0]) == ["test"]


def test_files_name_their_splits_and_a_file_of_none_is_an_error(tmp_path: Path) -> None:
    pair = '{"prompt": "%s", "completion": "a"}\n'
    for name in ("train", "val", "test"):
        file(tmp_path, f"plain/{name}.jsonl", pair % name)
    folder = str(tmp_path / "plain")
    assert prompts(configured(train=folder)[0]) == ["train"]
    assert prompts(configured(train=folder, split="validation")[0]) == ["val"]
    file(tmp_path, "plain/extra.jsonl", pair % "extra")
    assert "extra.jsonl that is of none; name the files" in why(configured(train=folder)[0])
    assert prompts(configured(train=f"{folder}/[tv]*.jsonl")[0]) == ["test", "train", "val"]
    file(tmp_path, "one/train-a.jsonl", pair % "a")
    file(tmp_path, "one/b.jsonl", pair % "b")
    assert prompts(configured(train=str(tmp_path / "one"))[0]) == ["b", "a"]


def test_format_and_split_of_data_are_the_defaults_of_its_sources() -> None:
    both = [{"path": "a"}, {"path": "b", "format": "text", "split": "own"}]
    a, b, held_out = configured(train=both, eval="c", format="messages", split="train_sft")
    assert [each.format for each in (a, b, held_out)] == ["messages", "text", "messages"]
    assert [each.choices.split for each in (a, b, held_out)] == ["train_sft", "own", "test"]
    assert [each.choices.names_split for each in (a, b, held_out)] == [True, True, False]


QWEN = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ nothing.at.all }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GREETS = [Message("assistant", "Welcome!"), Message("user", "2+2?"), Message("assistant", "4.")]


def rendered(template: str, messages: list[Message]) -> Any:
    marks = Marks("<|end|>", ("<|end|>",), ("<|end|>", "<|user|>", "<|assistant|>"))
    return ChatRenderer(Template(template, {}), marks).render(
        messages, [float(m.role == "assistant") for m in messages]
    )


def test_a_greeting_is_context_where_the_template_has_no_prompt_for_it_and_is_counted() -> None:
    (text,) = rendered(QWEN, GREETS)
    assert [text.text[span.start : span.end] for span in text.spans] == ["4.<|end|>"]
    assert text.notes == (GREETING,)
    assert text.text.startswith("<|assistant|>Welcome!<|end|><|user|>")
    (text,) = rendered(QWEN, [Message("system", "Be kind."), *GREETS])
    assert [text.text[span.start : span.end] for span in text.spans] == ["Welcome!<|end|>", "4.<|end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (QWEN, GREETS[:1], "no prompt without a message before the answer; it begins with system or user or assistant"),
        (STRICT, GREETS, "cannot show the roles assistant, user in this order; it begins with user, then user and"),
        (
            STRICT,
            [GREETS[1], GREETS[1], GREETS[2]],
            "roles user, user in this order; it begins with user, then user and",
        ),
    ],
)
def test_an_order_of_roles_that_a_template_does_not_know_is_said_in_words(
    template: str, messages: list[Message], what: str
) -> None:
    with pytest.raises(Refusal, match=what) as error:
        rendered(template, messages)
    assert "has no element" not in str(error.value)
    assert "undefined" not in str(error.value)


def test_a_null_that_other_rows_fill_waits_for_them() -> None:
    rated = [{"messages": TURNS, "label": label} for label in (True, None)]
    assert "rows:2: label: null is neither true nor false" in why(rows(*rated))
    assert read(rows({"messages": TURNS, "label": None})) == ("messages", [CHAT])
