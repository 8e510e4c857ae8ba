"""Every format: found by looking, read right, and refused by field where a row is wrong."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from readers import Understood
from readers import understand as understood

from deft.core.errors import DeftError, InputError, Problems
from deft.core.types import Message, ToolCall
from deft.data import format as formats
from deft.data import shapes, sources
from deft.data.chunks import HeldRows
from deft.data.format import Choices, Control

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}

GOOD: dict[str, list[Any]] = {
    "text": ["Once upon a time", {"text": "Once upon a time"}],
    "prompt_completion": [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": "", "completion": "4"},
        {"input": "2+2=", "output": "4"},
        {"inputs": "2+2=", "targets": "4"},
    ],
    "dialogue": [["p", "o"], ["p", "o", "q", ""]],
    "messages": [{"messages": [USER, ANSWER]}, {"messages": [ANSWER], "id": 7}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
    "question_answer": [{"question": "2+2?", "answer": "4"}],
    "alpaca": [
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Add 2 and 2.", "context": "", "response": "4", "category": "sums"},
        {"instruction": "And 3?", "output": "3", "system": "Be brief.", "history": [["2+2?", "4"]]},
    ],
    "instances": [{"instruction": "Add.", "instances": [{"input": "2 and 2", "output": "4"}]}],
    "gemini": [
        {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Hello"}]}]},
    ],
    "function_calls": [{"query": "Hi", "answers": [{"name": "f", "arguments": {}}], "tools": [{"name": "f"}]}],
    "trajectory": [{"traj": [USER, ANSWER], "reward": 1.0}],
    "halos": [
        {"type": "sample", "prompt": [USER], "output": "Hello", "prompt_id": 0, "sample_id": 0},
        {"type": "binary_feedback", "prompt": [USER], "output": [ANSWER], "label": 1, "reward": 0.5, "prompt_id": 1},
        {"type": "pairwise_feedback", "prompt": [USER], "output_A": [ANSWER], "output_B": "No", "label": 1},
    ],
    "preference": [
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER], "score_chosen": 9.0},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"}},
        {"messages": [USER, ANSWER], "label": True},
        {"prompt": "2+2=", "completion": "4", "label": 1},
        {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"},
        {"instruction": "Add.", "input": "2 and 2", "chosen": "4", "rejected": "5"},
        {"chosen": "Human: Hi\n\nAssistant: Hello", "rejected": "Human: Hi\n\nAssistant: Bye"},
        {"input": "2+2=", "chosen": "4", "rejected": "5"},
        {"query": "2+2?", "response": "4", "label": 1},
    ],
    "oasst": [
        {
            "message_tree_id": "t",
            "prompt": {
                "role": "prompter",
                "text": "Hi",
                "replies": [{"role": "assistant", "text": "Hello", "rank": 0}],
            },
        }
    ],
}

BAD: list[tuple[str, Any, str]] = [
    ("text", {"text": None}, "text: null, not text"),
    ("text", {"text": " "}, "no words"),
    ("prompt_completion", {"prompt": "a"}, "completion: missing"),
    ("prompt_completion", {"prompt": "a", "completion": ""}, "completion: empty"),
    ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "prompt: a list of texts, not text or messages"),
    ("prompt_completion", {"prompt": 1, "completion": "b"}, "prompt: a number, not text"),
    ("prompt_completion", {"prompt": [USER], "completion": [USER]}, "completion: no assistant message"),
    ("prompt_completion", {"prompt": "a", "told": "b"}, "columns: {prompt: prompt, completion: told}"),
    ("prompt_completion", {"prompt": "a", "response": "b", "output": "c"}, "response: says something else than output"),
    ("prompt_completion", {"input": "a", "output": ""}, "output: empty"),
    ("gemini", {"contents": [{"role": "user", "text": "a"}]}, r"contents\[0\].parts: missing"),
    ("gemini", {"contents": [{"role": "user", "parts": [{"inlineData": {}}]}]}, "'inlineData' is not text"),
    ("function_calls", {"query": "a", "answers": "[]", "tools": "[]"}, "answers: no call"),
    ("function_calls", {"query": "a", "answers": "b", "tools": "[]"}, "answers: not valid JSON"),
    ("dialogue", ["a", "b", "c"], "3 messages"),
    ("dialogue", ["a", 2], r"\[1\]: a number, not text"),
    ("messages", {"messages": []}, "the list is empty"),
    ("messages", {"messages": [USER]}, "no assistant message"),
    ("messages", {"messages": [USER, {"role": "asistant", "content": "x"}]}, "did you mean 'assistant'"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": " "}]}, r"messages\[1\]: an assistant message"),
    ("messages", {"messages": [USER, {**ANSWER, "weight": -1}]}, "-1 is not a weight"),
    ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "'robot' is not a role"),
    ("sharegpt", {"conversations": [{"from": "gpt"}]}, r"conversations\[0\].value: missing"),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": None}]},
        r"messages\[1\].content: null, not text",
    ),
    ("messages", {"messages": [{"role": "user", "content": None}, ANSWER]}, r"messages\[0\].content: null"),
    ("messages", {"messages": [USER, {"role": "gpt", "content": "x"}]}, "did you mean 'assistant'"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "'image_url' is not"),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        r"calls\[0\].name: missing",
    ),
    ("messages", {"messages": [USER, ANSWER], "tools": "[{"}, "tools: not valid JSON"),
    ("messages", {"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, r"tools\[0\].name: missing"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(1)"}]}, r"\[0\].value: not valid JSON"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "no assistant message"),
    ("question_answer", {"question": "a"}, "answer: missing"),
    ("question_answer", {"question": "a", "answer": " "}, "answer: an assistant message without words"),
    ("alpaca", {"instruction": "a", "input": "b"}, "output: missing"),
    ("alpaca", {"instruction": "a", "output": ""}, "output: empty"),
    ("alpaca", {"instruction": "", "input": " ", "output": "x"}, "instruction: no words"),
    ("alpaca", {"instruction": "a", "output": "x", "history": [["q"]]}, r"history\[0\]: not a question and its answer"),
    ("instances", {"instruction": "a", "instances": []}, "instances: the list is empty"),
    ("instances", {"instruction": "a", "instances": [{"input": "b"}]}, r"instances\[0\].output: missing"),
    ("trajectory", {"traj": [USER]}, "traj: no assistant message"),
    ("halos", {"type": "binary", "prompt": [USER], "output": "a"}, "'binary' is not a type of HALOs'"),
    ("halos", {"type": "binary_feedback", "prompt": [USER], "output": "a"}, "label: missing"),
    ("halos", {"type": "pairwise_feedback", "prompt": [USER], "output_A": "a"}, "output_B: missing"),
    ("halos", {"type": "scalar_feedback", "prompt": [USER], "output": "a"}, "reward: missing"),
    ("preference", {"prompt": "a", "rejected": "b"}, "chosen: missing"),
    ("preference", {"prompt": "a", "chosen": None}, "chosen: missing"),
    ("preference", {"messages": [USER, ANSWER], "label": "good"}, "label: 'good' is neither true nor false"),
    ("preference", {"chosen": "abc", "rejected": "xyz"}, "no `Assistant:`"),
    ("preference", {"prompt": "a", "question": "b", "chosen": "c"}, "prompt: says something else than question"),
    ("oasst", {"message_id": "m", "parent_id": None, "role": "prompter", "text": "Hi"}, "not a tree"),
    ("oasst", {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "Hi"}}, "no assistant message"),
]


def understand(rows: list[Any], shape: str = "auto", **choices: Any) -> Understood:
    return understood(sources.from_values(rows), "rows", shape, Choices(**choices))


def said(known: Understood) -> list[list[tuple[str, str]]]:
    return [[(message.role, message.content) for message in each.messages] for each in known.conversations]


def left_out(known: Understood) -> dict[int, str]:
    return {origin.line: reason for origin, reason in known.left_out}


def test_every_format_of_the_folder_has_good_and_bad_rows_here() -> None:
    assert set(formats.names()) == set(GOOD) == {shape for shape, _, _ in BAD}


@pytest.mark.parametrize("shape", sorted(GOOD))
def test_a_shape_is_found_by_looking(shape: str) -> None:
    known = understand(GOOD[shape])
    assert (known.shape, len(known.conversations), known.refused) == (shape, len(GOOD[shape]), ())
    assert known.left_out == ()


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


def test_the_refused_are_named_in_the_order_of_their_rows() -> None:
    good = GOOD["prompt_completion"][:2]
    known = understand([{"prompt": "waits"}, *good, {"prompt": 1, "completion": "b"}, {"prompt": "x"}])
    assert [problem.where for problem in known.refused] == ["rows:1", "rows:4", "rows:5"]


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


def test_reasoning_and_tool_calls_are_read_from_keys_and_from_parts() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    by_keys = {"role": "assistant", "content": None, "reasoning_content": "Easy.", "tool_calls": [call]}
    by_parts = {"role": "assistant", "content": [{"type": "reasoning", "value": "Easy."},
        {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'}]}  # fmt: skip
    result = {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"}
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"messages": [USER, asked, result, ANSWER], "tools": tools} for asked in (by_keys, by_parts)]
    keys, parts = understand(rows).conversations
    assert keys.messages[1] == Message("assistant", "", None, "Easy.", (ToolCall("add", '{"a": 2}', "c1"),))
    assert parts.messages[1] == Message("assistant", "", None, "Easy.", (ToolCall("add", {"a": 2}),))
    assert keys.messages[2] == Message("tool", "2", name="add", tool_call_id="c1")
    assert keys.tools == tuple(tools)


def test_sharegpt_calls_are_the_assistants_and_observations_a_tools() -> None:
    turns = [("human", "Hi"), ("gpt", "Wait."), ("function_call", '[{"name": "f"}, {"name": "g"}]'),
             ("observation", "1"), ("gpt", "Done.")]  # fmt: skip
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": '[{"name": "f"}]'}
    (chat,) = understand([row]).conversations
    assert [m.role for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1].tool_calls == (ToolCall("f", {}), ToolCall("g", {}))
    assert chat.tools == ({"type": "function", "function": {"name": "f"}},)


def test_the_order_of_parts_is_never_changed_in_silence() -> None:
    parts = [{"type": "tool_call", "value": '{"name": "f"}'}, {"type": "text", "text": "after"}]
    known = understand([{"messages": [USER, ANSWER]}, {"messages": [USER, {"role": "assistant", "content": parts}]}])
    assert "text after a tool call" in str(known.refused[0])


def test_only_the_completion_of_message_lists_is_learnt() -> None:
    earlier = [USER, {"role": "assistant", "content": "Hello"}, USER]
    row = {"prompt": earlier, "completion": [{"role": "assistant", "content": "Again"}]}
    (chat,) = understand([row]).conversations
    assert [message.weight for message in chat.messages] == [None, 0.0, None, None]


def test_of_a_preference_pair_the_chosen_answer_is_learnt_and_of_rated_chats_the_good_ones() -> None:
    known = understand(GOOD["preference"])
    assert all(each.messages[-1].content.strip() in ("4", "Hello") for each in known.conversations)
    assert said(known)[2] == [("user", "Hi"), ("assistant", "Hello")]
    rated = understand([{"messages": [USER, ANSWER], "label": label} for label in (True, False, "true", 0)])
    assert (len(rated.conversations), sorted(left_out(rated))) == (2, [2, 4])
    assert left_out(rated)[2] == "label: false, a bad answer"


def test_control_text_stands_before_good_and_bad_answers_and_rows_are_not_changed() -> None:
    rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}]
    both = Control("<|good|>", "<|bad|>")
    for _ in range(2):
        assert [texts[1][1] for texts in said(understand(rows, control=both))] == ["<|good|>4", "<|bad|>5"]
    assert rows == [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}]
    assert [texts[1][1] for texts in said(understand(rows, control=Control("+ ")))] == ["+ 4"]
    kto = understand([{"messages": [USER, ANSWER], "label": label} for label in (True, False)], control=both)
    assert [each.messages[-1].content for each in kto.conversations] == ["<|good|>Hello", "<|bad|>Hello"]


def test_a_choice_without_a_meaning_for_the_shape_is_an_error() -> None:
    with pytest.raises(Problems, match="control has no meaning for rows of shape messages; only for halos, preference"):
        understand(GOOD["messages"], control=Control("+"))


def feedback(prompt_id: int, output: str, label: int, reward: float | None = None, **more: Any) -> dict[str, Any]:
    row = {"type": "binary_feedback", "prompt_id": prompt_id, "prompt": [USER], "output": output, "label": label}
    return row | ({} if reward is None else {"reward": reward}) | more


def test_halos_good_answers_are_learnt_and_the_best_one_where_only_that_is_wanted() -> None:
    rows = [feedback(0, "bad", 0, 0.1), feedback(0, "good", 1, 0.2), feedback(0, "best", 1, 0.9),
            feedback(1, "worst", 0, 0.1), feedback(1, "least bad", 0, 0.2), feedback(2, "alone", 0)]  # fmt: skip
    known = understand(rows)
    assert [each.messages[-1].content for each in known.conversations] == ["good", "best", "least bad"]
    assert left_out(known)[1] == "a worse answer than that of rows:3"
    assert left_out(known)[6] == "label: false, and no answer to its prompt has a reward"
    best = understand(rows, answers="best")
    assert [each.messages[-1].content for each in best.conversations] == ["best", "least bad"]
    both = understand(rows, control=Control("+", "-"))
    assert [each.messages[-1].content for each in both.conversations][:3] == ["-bad", "+good", "+best"]


def test_halos_rows_of_another_split_are_left_out() -> None:
    rows = [feedback(0, "a", 1, split="train"), feedback(1, "b", 1, split="test"), feedback(2, "c", 1)]
    known = understand(rows, split="train")
    assert [each.messages[-1].content for each in known.conversations] == ["a", "c"]
    assert left_out(known) == {2: "split: 'test', the source reads 'train'"}


def test_halos_own_files_are_read_as_halos_reads_them(corpus: Path) -> None:
    files = json.loads((corpus / "golden" / "seeds.json").read_text())["halos_files"]
    answers = {
        name: [each.messages[-1].content for each in understand(rows).conversations] for name, rows in files.items()
    }
    assert answers == {
        "binary": [f"a{i}good" for i in range(6)],
        "pairwise": ["B0", "B1", "B2", "A3", "A4", "A5"],  # the higher reward, as HALOs, not the label
        "sample": ["s0-0", "s0-1", "s1-0", "s1-1", "s2-0", "s2-1"],
        "scalar": ["o0"],  # HALOs takes the last one, its defect 15
    }


def reply(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), **more}


TREE = {"message_tree_id": "t", "prompt": reply(
    "prompter", "q",
    reply("assistant", "b", rank=1),
    reply("assistant", "a", reply("prompter", "r", reply("assistant", "c", rank=0), reply("assistant", "d", rank=1)),
          reply("prompter", "unanswered"), rank=0),
    reply("assistant", "gone", rank=-1, deleted=True),
)}  # fmt: skip


def test_an_oasst_tree_gives_its_best_path_or_all_with_each_reply_learnt_once() -> None:
    assert [text for _, text in said(understand([TREE]))[0]] == ["q", "a", "r", "c"]
    every = understand([TREE], answers="all")
    assert [[text for _, text in path] for path in said(every)] == [
        ["q", "a", "r", "c"],
        ["q", "a", "r", "d"],
        ["q", "b"],
    ]
    learnt = [
        m.content for each in every.conversations for m in each.messages if m.role == "assistant" and m.weight is None
    ]
    assert sorted(learnt) == ["a", "b", "c", "d"]


def test_each_instance_is_a_conversation_with_the_origin_of_its_row() -> None:
    row = {"instruction": "Add.", "instances": [{"input": "1", "output": "a"}, {"input": "2", "output": "b"}]}
    known = understand([row])
    assert [each.messages[0].content for each in known.conversations] == ["Add.\n\n1", "Add.\n\n2"]
    assert {each.origin.line for each in known.conversations} == {1}


def test_columns_are_mapped_and_errors_name_the_rows_own() -> None:
    rows = [{"my_q": "2+2=", "my_a": "4", "text": "other"}, {"my_q": "2+2=", "my_a": 5}]
    known = understand(rows, columns={"prompt": "my_q", "completion": "my_a"})
    assert said(known) == [[("prompt", "2+2="), ("output", "4")]]
    assert str(known.refused[0]) == "rows:2: my_a: a number, not text; give text, or remove the row"
    dialog = understand([{"dialog": [USER, ANSWER]}], columns={"messages": "dialog"})
    assert dialog.shape == "messages"
    with pytest.raises(Problems, match="no row can be read"):
        understand([{"a": "b"}], columns={"prompt": "q", "completion": "c"})


def test_a_users_own_function_is_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """def turn(row):
    if row["n"] == 2:
        return None
    return {"prompt": row["q"], "completion": str(4 // row["n"])}
"""
    (tmp_path / "my_own_format.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = understand([{"q": "a", "n": n} for n in (1, 2, 0)], "my_own_format:turn")
    assert said(known) == [[("prompt", "a"), ("output", "4")]]
    assert left_out(known) == {2: "my_own_format:turn gave None"}
    assert "rows:3: my_own_format:turn raised ZeroDivisionError" in str(known.refused[0])
    for name, what in (("no_such_module:f", "cannot be imported"), ("my_own_format:no", "has no function 'no'")):
        with pytest.raises(InputError, match=what):
            understand([{"q": "a"}], name)


def test_a_row_may_carry_its_own_loss_weight() -> None:
    known = understand([{"prompt": "a", "completion": "b", "loss_weight": 0.5}, GOOD["prompt_completion"][0]])
    assert [each.weight for each in known.conversations] == [0.5, 1.0]


def test_of_two_formats_the_one_that_reads_more_of_a_row_wins() -> None:
    rows = {
        "alpaca": {"instruction": "a", "input": "b", "output": "c"},
        "messages": {"prompt": "a", "prompt_id": "1", "messages": [USER, ANSWER]},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c", "messages": [USER]},
    }
    assert {shape: understand([row]).shape for shape, row in rows.items()} == {shape: shape for shape in rows}


def test_every_corpus_file_is_understood_or_refused_with_the_right_reason(corpus: Path) -> None:
    table = {}
    for file in sorted((corpus / "data").iterdir()):
        known = understood(sources.read(str(file)), file.name)
        table[file.name] = (known.shape, len(known.conversations), len(known.refused), len(known.left_out))
    assert table == CORPUS
    (missing,) = understood(sources.read(str(corpus / "data" / MISSING_TURN)), "x").refused
    assert missing.what == "conversations[1]: an assistant message without words"


MISSING_TURN = "axolotl_conversation_missingturns.json"
CORPUS = {
    "axolotl_conversation.json": ("sharegpt", 1, 0, 0),
    MISSING_TURN: ("sharegpt", 0, 1, 0),
    "dpo_en_demo.json": ("preference", 300, 0, 0),
    "fastchat_dummy_conversation.json": ("sharegpt", 500, 0, 0),
    "glaive_toolcall_en_demo.json": ("sharegpt", 300, 0, 0),
    "gsm8k_train.jsonl": ("question_answer", 7473, 0, 0),
    "identity.json": ("alpaca", 91, 0, 0),
    "kto_en_demo.json": ("preference", 150, 0, 150),
    "oasst_en_100_tree.jsonl": ("oasst", 100, 0, 0),
    "reason_tool_use_demo_50.jsonl": ("messages", 50, 0, 0),
    "tau_gpt4o_airline_trajectories.json": ("trajectory", 200, 0, 0),
    "tinker_conversations.jsonl": ("messages", 128, 0, 0),
    "tiny_shakespeare.txt": ("text", 1, 0, 0),
    "tinystories_1000.json": ("text", 1000, 0, 0),
    "user_oriented_instructions.jsonl": ("instances", 252, 0, 0),
    "v1_sft_demo.jsonl": ("messages", 500, 0, 0),
}
"""File -> (shape, conversations, rows refused, rows left out)."""


ACCEPTED = {
    "UTF-8 BOM", "CRLF", "blank line inside", "assistant first", "two user turns", "system not first",
    "control token in user text", "control token in answer", "pad token in answer", "2 MB row",
    "prompt fills max_length", "every row duplicate", "content list of parts", "gzip named .jsonl",
    "extra column in one row", "unknown columns only", "huge integer",
}  # fmt: skip
"""Sound rows; "unknown columns only" holds question and answer, which deft reads."""


def test_the_corpus_of_bad_inputs_is_refused_by_line(corpus: Path, tmp_path: Path) -> None:
    cases = json.loads((corpus / "bad_inputs.json").read_text())
    accepted = set()
    for case in cases:
        path = tmp_path / "train.jsonl"
        path.write_bytes(base64.b64decode(case["jsonl_base64"]))
        try:
            refused = understood(sources.read(str(path)), str(path)).refused
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


PAIR = {"prompt": "q", "completion": "a"}


def test_a_split_that_was_named_needs_rows_that_have_splits() -> None:
    said = "split 'test' has no meaning for rows of shape prompt_completion; only for halos, data sets of the Hub"
    with pytest.raises(Problems, match=said):
        understand([PAIR], split="test", names_split=True)
    assert understand([PAIR], split="test").shape == "prompt_completion", "the default asks for nothing"
    rated = [{"type": "sample", "prompt": "q", "output": "a", "split": split} for split in ("train", "test")]
    assert len(understand(rated, split="test", names_split=True).conversations) == 1


def test_a_split_of_a_data_set_of_the_hub_may_be_named() -> None:
    chunk = HeldRows("me/rows", tuple(sources.from_values([PAIR], "me/rows")))
    choices = Choices(split="test", names_split=True)
    found = shapes.survey([shapes.counter(("me/rows", "auto", choices))(chunk)], "me/rows", "auto", choices)
    assert found.shape == "prompt_completion"
