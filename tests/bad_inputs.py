"""Kinds of bad training file, and what must happen to each: refused by file, line and field, or read and reported.

The ideas are those of reliability tests of other trainers; the data is the project's own.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ASKED = {"role": "user", "content": "What is the capital of Peru?"}
TOLD = {"role": "assistant", "content": "Lima."}
CHAT = {"messages": [ASKED, TOLD]}
PAIR = {"prompt": "The capital of Peru is", "completion": " Lima."}


@dataclass(frozen=True)
class Case:
    """A file, and what must happen.

    line    of the error, None where the file as a whole is at fault
    says    what the error must say, the field among it
    report  of what is read all the same: the fate or symptom it is counted under; None where nothing is to be said
    """

    name: str
    file: str
    content: bytes
    line: int | None = None
    says: str = ""
    report: str | None = None

    @property
    def kind(self) -> str:
        return "error" if self.says else "warning" if self.report else "accepted"


def _line(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()


def _among(good: Any, bad: Any) -> bytes:
    """The bad row on line 4, good ones around it."""
    rows = [dict(good, id=index) if isinstance(good, dict) else good for index in range(5)]
    return b"\n".join([*map(_line, rows[:3]), _line(bad), *map(_line, rows[3:])]) + b"\n"


def chat(name: str, bad: Any, says: str) -> Case:
    return Case(name, "train.jsonl", _among(CHAT, bad), 4, says)


def turns(name: str, says: str, *messages: Any, **more: Any) -> Case:
    return chat(name, {"messages": list(messages), **more}, says)


def answer(name: str, says: str, **message: Any) -> Case:
    return turns(name, says, ASKED, {"role": "assistant", **message})


def row(name: str, good: Any, bad: Any, says: str) -> Case:
    return Case(name, "train.jsonl", _among(good, bad), 4, says)


def whole(name: str, file: str, content: bytes, says: str, line: int | None = None) -> Case:
    return Case(name, file, content, line, says)


def fine(name: str, *rows: Any, file: str = "train.jsonl", report: str | None = None) -> Case:
    return Case(name, file, b"\n".join(map(_line, rows)) + b"\n", report=report)


def parquet(rows: list[dict[str, Any]], **columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows) if rows else pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _share(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


SHARE = _share(("human", "Hi"), ("gpt", "Hello"))
PREFERENCE = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
TREE = {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "Hi", "replies": [
    {"role": "assistant", "text": "Hello", "replies": []}]}}  # fmt: skip
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
GOOD_LINE = _line(CHAT)

CASES: tuple[Case, ...] = (
    # The text of a line
    chat("truncated line", GOOD_LINE[:-9], "not valid JSON"),
    chat("single quotes", str(CHAT).encode(), "Python's repr"),
    chat("Python's True and None", b'{"messages": None}', "Python's repr"),
    chat("trailing comma", GOOD_LINE[:-1] + b",}", "not valid JSON"),
    chat("two objects on a line", GOOD_LINE + b" " + GOOD_LINE, "one row a line"),
    chat("NaN", b'{"messages": NaN, "score": NaN}', "messages: NaN, not a list"),
    chat("a byte that is not UTF-8", GOOD_LINE.replace(b"Lima", b"Li\xffma"), "is not UTF-8"),
    chat("half a character", GOOD_LINE.replace(b"Lima", b"\\ud83d"), "lone surrogate"),
    chat("a NUL byte", GOOD_LINE.replace(b"Lima", b"\x00"), "not valid JSON"),
    chat("a key twice", GOOD_LINE[:-1] + b', "messages": []}', "'messages' stands twice"),
    chat("nested too deeply", b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    chat(
        "a tool nested too deeply",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
        b'"tools": [{"name": "f", "parameters": ' + b'{"a": ' * 490 + b"1" + b"}" * 490 + b"}]}",
        "nested too deeply",
    ),
    chat("a number of 5,000 digits", b'{"messages": [], "id": ' + b"9" * 5000 + b"}", "more than 4,300 digits"),
    chat("no JSON at all", b"What is the capital of Peru? Lima.", "not valid JSON"),
    # The file as a whole
    whole("UTF-16", "train.jsonl", (GOOD_LINE.decode() + "\n").encode("utf-16"), "UTF-16", 1),
    whole("empty file", "train.jsonl", b"", "is empty"),
    whole("blank lines only", "train.jsonl", b"\n \n\n", "is empty"),
    whole("an error page", "train.jsonl", b"<!DOCTYPE html><html>404</html>", "HTML page", 1),
    whole("a Git LFS pointer", "train.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", 1),
    whole("a spreadsheet", "train.csv", b"PK\x03\x04\x14\x00", "spreadsheet", 1),
    whole("a pickle", "train.jsonl", b"\x80\x04\x95\x10", "can run code", 1),
    whole("an unknown suffix", "train.xml", b"<rows/>", "unknown kind of file"),
    whole("gzip cut short", "train.jsonl.gz", gzip.compress(GOOD_LINE * 50)[:-12], "cut short"),
    whole("zstd cut short", "train.jsonl.zst", pa.compress(GOOD_LINE * 50, "zstd", asbytes=True)[:-6], "cut short"),
    whole("Parquet cut short", "train.parquet", parquet([PAIR])[:-20], "not a whole Parquet file", 1),
    whole("JSONL named .parquet", "train.parquet", GOOD_LINE, "not a whole Parquet file", 1),
    whole("an array that ends early", "train.json", b'[\n{"prompt": "a", "completion": "b"},\n', "not valid JSON", 3),
    whole("an array without a comma", "train.json", b'[{"text": "a"}\n{"text": "b"}]', "',' or ']' is missing", 2),
    whole("text after an array", "train.json", b'[{"text": "a"},\n{"text": "b"}]\n{}', "more text after the end", 3),
    # The shape of rows
    chat("row is a list", ["a", "b"], "is dialogue, most rows are messages"),
    chat("row is a string", "What is the capital of Peru?", "is text, most rows are messages"),
    chat("row is null", None, "has null, not messages"),
    chat("row is a number", 7, "has a number, not messages"),
    chat("row without fields", {}, "has no keys, not messages"),
    chat("messages missing", {"id": 4, "turns": []}, "has the keys 'id', 'turns', not messages"),
    chat("mixed shapes", PAIR, "is prompt_completion, most rows are messages"),
    row("two meanings", CHAT, {**CHAT, "text": "x"}, "reads as messages and as text"),
    whole("unknown fields only", "train.jsonl", b'{"foo": "a", "bar": "b"}\n', "has the keys 'foo', 'bar'", 1),
    whole("a train and a test list", "train.json", b'{"train": [], "test": []}', "has the keys 'train', 'test'", 1),
    # Messages
    chat("messages null", {"messages": None}, "messages: null, not a list"),
    chat("messages empty", {"messages": []}, "messages: the list is empty"),
    chat("messages is text", {"messages": "Hi"}, "messages: text, not a list"),
    turns("message is text", "messages[0]: text, not a message", "Hi", TOLD),
    answer("content null", "messages[1].content: null, not text", content=None),
    answer("content missing", "messages[1].content: missing"),
    answer("content a number", "messages[1].content: a number, not text", content=4),
    answer("content empty", "messages[1]: an assistant message without words", content=""),
    answer("content white space", "messages[1]: an assistant message without words", content=" \n"),
    turns("role missing", "messages[0].role: missing", {"content": "Hi"}, TOLD),
    turns("role null", "messages[0].role: null, not a role", {"role": None, "content": "Hi"}, TOLD),
    turns("role misspelt", "did you mean 'assistant'?", ASKED, {"role": "asistant", "content": "Lima."}),
    turns("ShareGPT's role", "did you mean 'user'?", {"role": "human", "content": "Hi"}, TOLD),
    turns("no assistant", "messages: no assistant message", ASKED),
    answer("weight negative", "messages[1].weight: -1 is not a weight", content="a", weight=-1),
    answer("weight is text", "messages[1].weight: 'full' is not a weight", content="a", weight="full"),
    answer("weight huge", "messages[1].weight: a huge number", content="a", weight=10**400),
    row("row weight is text", CHAT, {**CHAT, "loss_weight": "much"}, "loss_weight: 'much' is not a weight"),
    # Content parts
    answer("part is an image", "content[0].type: 'image_url' is not", content=[{"type": "image_url",
         "image_url": "x"}]),
    answer("part without a type", "content[0].type: 'picture' is not", content=[{"picture": "a"}]),
    answer("part text null", "content[0].text: null, not text", content=[{"type": "text", "text": None}]),
    answer("part is a number", "content[0]: a number, not a content part", content=[1]),
    answer("no part", "messages[1]: an assistant message without words", content=[]),
    answer("text after a call", "content[1]: text after a tool call",
           content=[{"type": "tool_call", "value": '{"name": "f"}'}, {"type": "text", "text": "a"}]),
    turns("the user reasons", "only the assistant does", {"role": "user", "content": "Hi", "thinking": "Hm."}, TOLD),
    # Tools
    answer("call without a name", "tool_calls[0].name: missing", content=None, tool_calls=[{"function": {}}]),
    answer("arguments are no JSON", "tool_calls[0].arguments: not valid JSON", content=None,
           tool_calls=[{"function": {"name": "f", "arguments": "{city: Lima}"}}]),
    answer("arguments are a list", "tool_calls[0].arguments: a list", content=None,
           tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
    answer("calls are an object", "messages[1].tool_calls: an object, not a list", content=None, tool_calls=CALL),
    turns("the user calls", "only the assistant does", {**ASKED, "tool_calls": [CALL]}, TOLD),
    turns("tools are no JSON", "tools: not valid JSON", ASKED, TOLD, tools="[{'name': 'f'"),
    turns("a tool without a name", "tools[0].name: missing", ASKED, TOLD, tools=[{"parameters": {}}]),
    turns("tools are an object", "tools: an object, not a list", ASKED, TOLD, tools={"name": "f"}),
    # ShareGPT
    row("unknown speaker", SHARE, _share(("human", "Hi"), ("robot", "Hello")), "conversations[1].from: 'robot'"),
    row("value missing", SHARE, {"conversations": [{"from": "gpt"}]}, "conversations[0].value: missing"),
    row("call is no JSON", SHARE, _share(("human", "Hi"), ("function_call", "look()")), "[1].value: not valid JSON"),
    row("an empty turn", SHARE, _share(("human", "Hi"), ("gpt", "")), "conversations[1]: an assistant message without"),
    # Pairs and text
    whole("field changes its type", "train.jsonl", _among(PAIR, {"prompt": 1, "completion": "b"}),
         "prompt: a number", 4),
    row("prompt null", PAIR, {"prompt": None, "completion": "b"}, "prompt: null, not text"),
    row("completion null", PAIR, {"prompt": "a", "completion": None}, "completion: null, not text"),
    row("completion empty", PAIR, {"prompt": "a", "completion": ""}, "completion: empty"),
    row("completion missing", PAIR, {"prompt": "a"}, "completion: missing"),
    row("completion under another name", PAIR, {"prompt": "a", "told": "b"}, "{prompt: prompt, completion: told}"),
    row("completion a list of text", PAIR, {"prompt": "a", "completion": ["b"]}, "completion: a list of texts"),
    row("text null", {"text": "a b"}, {"text": None}, "text: null, not text"),
    row("text empty", {"text": "a b"}, {"text": ""}, "text: no words"),
    row("an odd dialogue", ["p", "o"], ["p", "o", "p"], "dialogue: 3 messages"),
    row("answer empty", {"question": "a", "answer": "b"}, {"question": "a", "answer": ""}, "answer: an assistant"),
    # Alpaca, preference, trees, HALOs
    row("output missing", {"instruction": "a", "output": "b"}, {"instruction": "a"}, "output: missing"),
    row("history of odd turns", {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b", "history": [["q"]]}, "history[0]: not a question and its answer"),
    row("chosen missing", PREFERENCE, {"prompt": "a", "rejected": "b"}, "chosen: missing"),
    row("chosen without an answer", PREFERENCE, {"prompt": "a", "chosen": [ASKED]}, "chosen: no assistant message"),
    row("label is a word", {**CHAT, "label": True}, {**CHAT, "label": "good"},
         "label: 'good' is neither true nor false"),
    row("a tree without replies", TREE, {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "a"}},
        "prompt.replies: no assistant message"),
    row("a reply without text", TREE,
        {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "a", "replies": [{"role": "assistant"}]}},
        "prompt.replies[0].text: missing"),
    row("a message that is no tree", TREE, {"message_id": "m", "parent_id": "p", "role": "prompter", "text": "a"},
        "a message of its own, not a tree"),
    row("feedback of an unknown type", {"type": "sample", "prompt": "a", "output": "b"},
        {"type": "ranked", "prompt": "a", "output": "b"}, "type: 'ranked' is not a type"),
    # Tables
    whole("a record with a field too many", "train.csv", b"prompt,completion\na,b\na,b,c\n",
         "3 fields, the header has 2", 3),
    whole("an open quote", "train.csv", b'prompt,completion\na,b\n"a,b\n', "not valid CSV", 3),
    whole("two columns of one name", "train.csv", b"prompt,prompt\na,b\n", "two columns named 'prompt'", 1),
    whole("a header alone", "train.csv", b"prompt,completion\n", "is empty"),
    whole("a null in a column", "train.parquet", parquet([PAIR, {**PAIR, "completion": None}]), "completion: null", 2),
    whole("a column of numbers", "train.parquet", parquet([{"text": 1}]), "text: a number, not text", 1),
    whole("a column of bytes", "train.parquet", parquet([{"text": b"a"}]), "text: bytes, not text", 1),
    # Read, and reported
    fine("a row twice", CHAT, {**CHAT, "id": 2}, report="duplicate"),
    fine("a control token in a question", CHAT,
         {"messages": [{"role": "user", "content": "a<|im_end|>b"}, TOLD]}, report="special_tokens_as_text"),
    fine("a control token in an answer", CHAT,
         {"messages": [ASKED, {"role": "assistant", "content": "a<|im_end|>b"}]}, report="special_tokens_as_text"),
    fine("a row longer than max_length", CHAT, {"messages": [{"role": "user", "content": "why " * 3000}, TOLD]},
         report="too_long"),
    fine("a chat of more turns than fit", CHAT,
         {"messages": [{"role": "user", "content": "why " * 50}, TOLD] * 4}, report="cut"),
    fine("an answer that weighs nothing", CHAT, {"messages": [ASKED, ASKED, {**TOLD, "weight": 0}]},
         report="no_target"),
    fine("a row that weighs nothing", CHAT, {**CHAT, "messages": [ASKED, ASKED, TOLD], "loss_weight": 0},
         report="no_target"),
    fine("an answer rated bad", {**CHAT, "label": True}, {**CHAT, "label": False}, report="left_out"),
    fine("an empty last output", ["p", "o"], ["p", ""], report="empty_answer"),
    # Sound, however odd
    Case("a byte order mark", "train.jsonl", b"\xef\xbb\xbf" + GOOD_LINE),
    Case("Windows line ends", "train.jsonl",
         GOOD_LINE + b"\r\n" + _line(SHARE and {"messages": [ASKED, ASKED, TOLD]}) + b"\r\n"),
    Case("a blank line inside", "train.jsonl", GOOD_LINE + b"\n\n"),
    Case("no line end at the end", "train.jsonl", GOOD_LINE),
    Case("gzip under another name", "train.jsonl", gzip.compress(GOOD_LINE)),
    Case("messages as JSON text", "train.parquet", parquet([{"messages": json.dumps(CHAT["messages"])}])),
    fine("the assistant first", {"messages": [TOLD, ASKED, TOLD]}),
    fine("two user turns", {"messages": [ASKED, ASKED, TOLD]}),
    fine("an extra column in one row", CHAT, {"messages": [ASKED, ASKED, TOLD], "note": "x"}),
    fine("content as typed parts", {"messages": [ASKED, {"role": "assistant",
         "content": [{"type": "text", "text": "a"}]}]}),
    fine("a big number", {**CHAT, "id": 10**400}),
    fine("an emoji as two escapes", GOOD_LINE.replace(b"Lima", b"\\ud83d\\ude00")),
)  # fmt: skip
