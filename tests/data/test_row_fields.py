"""What any row or message may say beside its format: read, refused by name, or told of; the same in each format."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from encoders import chat, row_encoder, source
from readers import Understood
from readers import understand as understood
from test_formats import ANSWER, GOOD, USER
from tiny_tokenizers import CHATML, byte_level

from deft.core.errors import InputError, Problems
from deft.core.types import Conversation, Fate, Message, ToolCall
from deft.data import format as formats
from deft.data import names, row_fields, shapes, sources
from deft.data.format import Choices
from deft.dataset.build import encode, encode_sources
from deft.dataset.source import SourceSpec
from deft.dataset.survey import NAMED_FIELDS, not_read, understand
from deft.encoding.render.template import Refusal
from deft.encoding.rows import EncodedRow

CHAT = {"messages": [USER, ANSWER]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
PICTURE, PAIR = "a.png", {"prompt": "2+2=", "completion": "4"}


def read(*rows: Any, shape: str = "auto", **choices: Any) -> Understood:
    return understood(sources.from_values(rows), "rows", shape, Choices(**choices))


def one(row: Any, **choices: Any) -> Conversation:
    (found,) = read(row, **choices).conversations
    return found


def refusal(row: Any, **choices: Any) -> str:
    """Why a row is refused that stands behind good ones of its shape."""
    try:
        found = read(row, **choices)
    except Problems as error:
        return str(error)
    (problem,) = found.refused
    return str(problem)


def unread(*rows: Any, **choices: Any) -> dict[str, int]:
    (_, found), *_ = understand([SourceSpec("rows", rows=rows, choices=Choices(**choices))])
    return dict(found.unread)


# Contracts: each format and each field


ROWS = {name: next(row for row in GOOD[name] if isinstance(row, dict)) for name in GOOD if name != "dialogue"}
COMMON: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(row_fields.WEIGHTS, (0.5, 0.25)),
    **dict.fromkeys(row_fields.FLAGS, (True, False)),
    **dict.fromkeys(row_fields.MASKS, ("no", "yes")),
    **dict.fromkeys(row_fields.SYSTEM, ("Be brief.", "Be long.")),
    **{key: ([TOOL], [{"name": "sun"}]) for key in row_fields.TOOLS},
    **dict.fromkeys(row_fields.REASONING, ("Easy.", "Hard.")),
    **{key: ({"enable_thinking": True}, {"enable_thinking": False}) for key in row_fields.TEMPLATE_KWARGS},
    **{key: ([PICTURE], ["b.png"]) for key in row_fields.REFUSED},
    **dict.fromkeys(row_fields.CONTEXT, ("It is so.", "It is not so.")),
}


def test_the_contract_names_all_that_is_read_of_every_row() -> None:
    assert set(COMMON) == row_fields.COMMON


@pytest.mark.parametrize("shape", sorted(ROWS))
@pytest.mark.parametrize("key", sorted(COMMON))
def test_what_belongs_to_every_row_changes_it_or_refuses_it(shape: str, key: str) -> None:
    values = [{**ROWS[shape], key: value} for value in COMMON[key]]
    found = [read(GOOD[shape][-1], row, shape=shape) for row in values]
    plain = read(GOOD[shape][-1], ROWS[shape], shape=shape)
    for each in found:
        assert each.refused or each.conversations != plain.conversations or COMMON[key][0] in (True, "no")
        assert all("ignore: [" in str(problem) for problem in each.refused if shape != "alpaca"), each.refused
    if not found[0].refused:
        assert found[0].conversations != found[1].conversations
    if any(key in known for known in formats.load(shape).keys):
        return  # a row of this shape is none without it
    ignored = read(GOOD[shape][-1], *values, shape=shape, ignore=(key,))
    assert [each.weight for each in ignored.conversations] == [1.0] * len(ignored.conversations)
    assert ignored.refused == ()


def message(words: str) -> list[Any]:
    return [{"role": "user", "content": words}, ANSWER]


def shared(words: str) -> list[Any]:
    return [{"from": "human", "value": words}, {"from": "gpt", "value": "Hello"}]


def spoken(words: str) -> list[Any]:
    return [{"role": role, "parts": [{"text": words}]} for role in ("user", "model")]


SAMPLE = {"type": "sample", "prompt": "q", "output": "a"}
SCALAR = {"type": "scalar_feedback", "prompt": "q", "output": "a", "prompt_id": 1}
DUEL = {"type": "pairwise_feedback", "prompt": "q", "output_A": "a", "output_B": "b", "label": 1}
CHOSEN = {"prompt": "q", "chosen": "a", "rejected": "b"}
OWN: dict[str, dict[str, tuple[Any, Any, Any]]] = {
    "text": {"text": ({}, "a", "b")},
    "prompt_completion": {"prompt": (PAIR, "a", "b"), "completion": (PAIR, "a", "b")},
    "messages": {"messages": ({}, message("a"), message("b"))},
    "sharegpt": {"conversations": ({}, shared("a"), shared("b"))},
    "question_answer": {"question": ({"answer": "a"}, "a", "b"), "answer": ({"question": "a"}, "a", "b")},
    "alpaca": {
        "instruction": ({"output": "c"}, "a", "b"),
        **dict.fromkeys(names.UNDER_INSTRUCTION, ({"instruction": "a", "output": "c"}, "a", "b")),
        **dict.fromkeys(names.ANSWER, ({"instruction": "a"}, "a", "b")),
        "history": ({"instruction": "a", "output": "c"}, [["a", "b"]], [["a", "c"]]),
    },
    "instances": {
        "instruction": ({"instances": [{"output": "c"}]}, "a", "b"),
        "instances": ({"instruction": "a"}, [{"output": "a"}], [{"output": "b"}]),
    },
    "function_calls": {
        **dict.fromkeys(names.QUESTION, ({"answers": [{"name": "f"}], "tools": [TOOL]}, "a", "b")),
        "answers": ({"query": "q", "tools": [TOOL]}, [{"name": "f"}], [{"name": "g"}]),
    },
    "gemini": {"contents": ({}, spoken("a"), spoken("b"))},
    "trajectory": {"traj": ({}, message("a"), message("b"))},
    "halos": {
        "type": (SAMPLE, "sample", "binary"),
        "prompt": (SAMPLE, "a", "b"),
        "output": (SAMPLE, "a", "b"),
        "output_A": (DUEL, "a", "c"),
        "output_B": ({**DUEL, "label": 0}, "a", "c"),
        "label": (DUEL, 0, 1),
        "reward": (SCALAR, 0.1, 0.9),
        "reward_A": ({**DUEL, "reward_B": 0.5}, 0.1, 0.9),
        "reward_B": ({**DUEL, "reward_A": 0.5}, 0.1, 0.9),
        "prompt_id": ({**SCALAR, "reward": 0.1}, 1, 2),
        "split": (SAMPLE, "train", "test"),
    },
    "preference": {
        "prompt": (CHOSEN, "a", "b"),
        "chosen": (CHOSEN, "a", "b"),
        "rejected": ({"chosen": "Hi\nAssistant: Yes"}, "Hi\nAssistant: No", "Hello\nAssistant: No"),
        "messages": ({"chosen": "c", "rejected": "d"}, [USER], message("b")[:1]),
        "conversations": ({"chosen": "c", "rejected": "d"}, shared("a")[:1], shared("b")[:1]),
        "question": ({"chosen": "c", "rejected": "d"}, "a", "b"),
        "instruction": ({"chosen": "c", "rejected": "d"}, "a", "b"),
        "input": ({"instruction": "i", "chosen": "c", "rejected": "d"}, "a", "b"),
        "context": ({"instruction": "i", "chosen": "c", "rejected": "d"}, "a", "b"),
        "label": (CHAT, True, False),
        "completion": ({"prompt": "q", "label": True}, "a", "b"),
    },
    "oasst": {"message_tree_id": (ROWS["oasst"], "t", None), "prompt": (ROWS["oasst"], ROWS["oasst"]["prompt"], {})},
}


@pytest.mark.parametrize("shape", sorted(ROWS))
def test_what_a_format_says_that_it_reads_changes_the_row(shape: str) -> None:
    form = formats.load(shape)
    known = set(getattr(formats.registry.load(formats.formats, shape, ""), "READS", ()))
    assert set(OWN[shape]) >= known, "each field that the format names has a case"
    for key, (row, first, second) in OWN[shape].items():
        assert key in formats.own_fields(form, frozenset({*row, key})), key
        other = SCALAR | {"reward": 0.5} if shape == "halos" and row["type"] == "scalar_feedback" else GOOD[shape][-1]
        said = [read(other, {**row, key: value}, shape=shape, split="train") for value in (first, second)]
        is_name = (shape, key) == ("oasst", "message_tree_id")
        assert is_name or said[0] != said[1], key


# How much is learnt


@pytest.mark.parametrize("value", [0, 0.0, False, "0", "0.0", "false", "False", "no", "off"])
@pytest.mark.parametrize("key", [*row_fields.WEIGHTS, *row_fields.FLAGS])
def test_all_spellings_of_not_learnt_mean_the_same(key: str, value: Any) -> None:
    assert one({**CHAT, key: value}).weight == 0
    assert one(chat("Hi", "Hello", **{key: value})).messages[1].weight == 0


@pytest.mark.parametrize("value", [1, True, "true", "1", "YES"])
@pytest.mark.parametrize("key", row_fields.MASKS)
def test_a_mask_says_the_contrary(key: str, value: Any) -> None:
    assert one({**PAIR, key: value}).weight == 0
    assert one(chat("Hi", "Hello", **{key: value})).messages[1].weight == 0


@pytest.mark.parametrize("absent", [None, "", " ", [], float("nan")])
def test_a_weight_that_a_table_left_empty_is_none(absent: Any) -> None:
    assert one({**CHAT, "weight": absent}).weight == 1
    assert one(chat("Hi", "Hello", loss=absent)).messages[1].weight is None


def test_weights_that_agree_are_one_and_those_that_do_not_refuse_the_row() -> None:
    assert one({**CHAT, "weight": 0.5, "train": True, "masked": False}).weight == 0.5
    assert one(chat("Hi", "Hello", weight=0, loss=False)).messages[1].weight == 0
    assert "rows:1: train: contradicts weight" in refusal({**CHAT, "weight": 0.5, "train": False})
    assert "loss_scale: contradicts loss_weight" in refusal({**CHAT, "loss_weight": 1, "loss_scale": 2})
    assert "messages[1].masked: contradicts loss" in refusal(chat("Hi", "Hello", loss=True, masked=1))


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("loss", 1.83, "loss: 1.83 is neither true nor false; say true or false, or say ignore: [loss] of the source"),
        ("mask", "User", "mask: 'User' is neither true nor false"),
        ("weight", "heavy", "weight: 'heavy' is not a weight"),
        ("weight", -1, "weight: -1 is not a weight"),
        ("train_detail", [{"begin_offset": 0}], "train_detail: parts of a message cannot be weighed apart"),
        ("loss_mask", [1], "loss_mask: 1 values for 2 messages"),
        ("loss_mask", [0, "maybe"], "messages[1].loss_mask: 'maybe' is neither true nor false"),
    ],
)
def test_a_weight_that_cannot_be_honoured_refuses_by_name(key: str, value: Any, what: str) -> None:
    assert f"rows:1: {what}" in refusal({**CHAT, key: value})


def test_a_list_at_the_row_has_a_weight_for_each_message() -> None:
    longer = [USER, ANSWER, USER, {"role": "assistant", "content": "Again"}]
    for mask in ([0, 0, 0, 1], "[0, 0, 0, 1]", [None, False, "", True]):
        found = one({"messages": longer, "loss_mask": mask})
        assert [each.weight for each in found.messages][1::2] == [0, 1]
    assert one({"conversations": shared("a"), "train": [False, False]}).messages[1].weight == 0
    assert "contradicts loss of the row" in refusal({"messages": [USER, {**ANSWER, "loss": 1}], "loss": [0, 0]})
    assert "contradicts weight" in refusal({"messages": [USER, {**ANSWER, "weight": 1}], "loss_mask": [0, 0]})
    assert "no one list of messages" in refusal({**PAIR, "loss_mask": [0, 1]})


def test_a_part_of_a_message_is_not_weighed_apart() -> None:
    parts = [{"type": "text", "text": "Hello", "weight": 0}]
    what = "messages[1].content[0].weight: parts of a message cannot be weighed apart"
    assert what in refusal(chat("Hi", parts))


# System prompts, tools, reasoning, template variables


@pytest.mark.parametrize(
    "value",
    [
        "Be brief.",
        [{"text": "Be brief."}],
        [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        {"role": "system", "content": "Be brief."},
        {"role": "system", "parts": [{"text": "Be brief."}]},
        '[{"text": "Be brief."}]',
    ],
)
def test_a_system_prompt_beside_the_messages_comes_first(value: Any) -> None:
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
    assert [(each.role, each.content) for each in one({**CHAT, "system": value}).messages] == expected


def test_a_system_prompt_is_not_said_twice_and_never_two() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}
    assert one({**row, "system_prompt": "Be brief.\n"}) == one(row)
    assert "the messages begin with another system prompt" in refusal({**row, "system": "Be long."})
    assert "system_prompt: contradicts system" in refusal({**CHAT, "system": "a", "system_prompt": "b"})
    assert "a text has no place" in refusal({"text": "a", "system": "b"})
    assert "an object without text" in refusal({**CHAT, "system": {"image": PICTURE}})


def test_tools_stand_at_the_row_or_in_its_system_message() -> None:
    declared = {"messages": [{"role": "system", "content": "Use tools.", "tools": [TOOL]}, USER, ANSWER]}
    assert one(declared).tools == one({**CHAT, "functions": json.dumps([TOOL])}).tools == (TOOL,)
    assert one({**declared, "tools": [TOOL]}).tools == (TOOL,)
    assert "messages[0].tools: contradicts tools" in refusal({**declared, "tools": [{"name": "sun"}]})
    asked = {"messages": [{**USER, "tools": [TOOL]}, ANSWER]}
    assert "messages[0].tools: the user offers tools" in refusal(asked)
    assert "a text has no place for tools" in refusal({"text": "a", "tools": [TOOL]})


def test_reasoning_at_the_row_is_that_of_its_one_answer() -> None:
    assert one({"question": "2+2?", "answer": "4", "reasoning": "Easy."}).messages[1].reasoning == "Easy."
    assert one({**PAIR, "thinking": "Easy."}).messages[1].reasoning == "Easy."
    assert one({**chat("a", "b", reasoning="Easy."), "reasoning": "Easy."}).messages[1].reasoning == "Easy."
    assert "the answer has other reasoning" in refusal({**chat("a", "b", reasoning="Easy."), "reasoning": "Hard."})
    assert "beside 2 answers" in refusal({"messages": [USER, ANSWER] * 2, "reasoning": "Easy."})
    assert "thinking: a list, not text" in refusal({**CHAT, "thinking": ["Easy.", "Hm."]})
    assert "contradicts reasoning_content" in refusal({**CHAT, "reasoning_content": "a", "reasoning": "b"})
    assert "two fields of reasoning that differ" in refusal(chat("a", "b", reasoning="a", thinking="b"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Complex_CoT", "Easy."),
        ("chainOfThought", "Easy."),
        ("rationale", "Easy."),
        ("thinking_trajectories", ["Easy."]),
        ("deepseek_thinking_trajectory", "Easy."),
        ("reasoning_details", [{"type": "reasoning.text", "text": "Ea"}, {"type": "reasoning.text", "text": "sy."}]),
        ("reasoningDetails", [{"type": "reasoning.summary", "summary": "Easy."}]),
    ],
)
def test_reasoning_is_read_under_all_its_names(key: str, value: Any) -> None:
    assert one({"question": "2+2?", "answer": "4", key: value}).messages[1].reasoning == "Easy."
    assert one(chat("2+2?", "4", **{key: value})).messages[1].reasoning == "Easy."


def test_reasoning_that_is_not_there_to_read_refuses_the_row() -> None:
    row = chat("a", "b", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}])
    assert "messages[1].reasoning_details: has a part without text" in refusal(row)
    assert one(row, ignore=("reasoning_details",)).messages[1].reasoning == ""


@pytest.mark.parametrize("key", ["lossWeight", "LossWeight", "LOSS_WEIGHT", "loss-weight"])
def test_a_name_may_be_spelt_in_any_way(key: str) -> None:
    assert one({**CHAT, key: 0.5}).weight == 0.5
    assert one(chat("a", "b", **{key: 0.5})).messages[1].weight == 0.5
    assert one({**CHAT, key: 0.5}, ignore=("loss_weight",)).weight == 1.0
    assert one(chat("a", "b", **{key: 0.5}), ignore=("loss_weight",)).messages[1].weight is None
    assert f"{key}: 'x' is not a weight" in refusal({**CHAT, key: "x"})
    assert unread(CHAT, {**CHAT, "loss_weight": 0.5, key + "_": 0.5}) == {key + "_": 1}


def test_no_two_known_names_differ_by_their_spelling_alone() -> None:
    parts = frozenset[str]().union(*(formats.load(name).parts for name in formats.names()))
    for known in (formats.known_fields(), parts):
        assert len(set(map(names.folded, known))) == len(known)


@pytest.mark.parametrize(("key", "bad", "good"), [("prefix", True, False), ("end_turn", False, True)])
def test_a_turn_that_goes_on_refuses_the_row(key: str, bad: bool, good: bool) -> None:
    assert f"messages[1].{key}: the turn goes on" in refusal(chat("a", "b", **{key: bad}))
    assert unread(chat("a", "b", **{key: good})) == {}


@pytest.mark.parametrize("key", sorted(row_fields.CONTEXT))
def test_a_context_in_a_message_refuses_the_row(key: str) -> None:
    row = {"messages": [{**USER, key: "It is so."}, ANSWER]}
    assert f"messages[0].{key}: " in refusal(row)


def test_axolotls_flag_of_a_turn_and_its_tools_are_read() -> None:
    assert one(chat("a", "b", train_on_turn=False)).messages[1].weight == 0.0
    assert one({**CHAT, "available_tools": [TOOL]}).tools == (TOOL,)
    assert one({**CHAT, "instructions": "Be brief."}).messages[0] == Message("system", "Be brief.")


def test_encode_tells_what_nothing_reads() -> None:
    with pytest.warns(UserWarning, match=r"rows: not read: id \(1 row\)"):
        encode([{**PAIR, "id": 7}], byte_level())


def test_a_row_that_only_tells_whether_there_is_reasoning_is_told_of() -> None:
    nemotron = {"input": [USER], "output": "Hello", "reasoning": "off", "system_prompt": "detailed thinking off"}
    assert one(nemotron).messages[-1] == Message("assistant", "Hello")
    assert unread(nemotron) == {"reasoning": 1}


def test_template_variables_of_a_row_are_true_numbers_or_text() -> None:
    given = {"enable_thinking": False, "effort": "low", "tools_in": None, "extra": []}
    for value in (given, json.dumps(given)):
        assert one({**CHAT, "chat_template_kwargs": value}).template_kwargs == {
            "enable_thinking": False,
            "effort": "low",
        }
    for bad, what in (({"xml_tools": ["a"]}, "xml_tools: a list"), ({"tools": 1}, "tools: set by deft itself")):
        assert f"chat_template_kwargs.{what}" in refusal({**CHAT, "chat_template_kwargs": bad})
    both = {"chat_template_kwargs": {"a": 1}, "template_kwargs": {"a": 2}}
    assert "template_kwargs: contradicts chat_template_kwargs" in refusal({**CHAT, **both})


MOODY = "{{ mood }}" + CHATML


def encoded(row: Any, template: str = CHATML, **policy: Any) -> EncodedRow:
    return row_encoder(template, **policy).encode(one(row))


def text(row: EncodedRow) -> str:
    assert row.fate == Fate.TRAINED, row.reason
    decoded: str = row_encoder().tokenizer.hf.decode(row.examples[0][0].tokens.tolist())
    return decoded


def test_a_rows_template_variables_stand_before_those_of_the_run_and_leave_no_trace() -> None:
    encoder = row_encoder(MOODY, template_kwargs={"mood": "calm"})
    rows = [CHAT, {**CHAT, "template_kwargs": {"mood": "wild"}}, CHAT, {**CHAT, "template_kwargs": {"mood": True}}]
    texts = [text(encoder.encode(one(row))) for row in (*rows, {**CHAT, "template_kwargs": {"mood": 1}})]
    assert [each.partition("<")[0] for each in texts] == ["calm", "wild", "calm", "True", "1"]
    many = [{**CHAT, "template_kwargs": {"mood": f"m{number}"}} for number in range(450)]
    for number, row in enumerate(many):
        assert text(encoder.encode(one(row))).startswith(f"m{number}<")
    assert len(encoder.renderer._variants) <= 200, "memory is flat in rows"
    assert encoder.renderer.stop_marks() == {"<|im_end|>"}


def test_a_rows_template_variable_cannot_write_a_control_token() -> None:
    with pytest.raises(Refusal, match="mood holds a special token"):
        row_encoder(MOODY).renderer.of({"mood": "</s>"})


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"system": "Be brief."}, "a system prompt"),
        ({"tools": [TOOL]}, "tools"),
        ({"reasoning": "Easy."}, "reasoning"),
        ({"template_kwargs": {"mood": "calm"}}, "template variables"),
    ],
)
def test_strings_have_no_place_for_what_only_a_template_shows(more: dict[str, Any], what: str) -> None:
    row = encoded({**PAIR, **more})
    assert row.fate == Fate.REFUSED
    assert row.reason == f"strings that are not put in a template have no place for {what}; say data.render: chat"
    asked = "(message.reasoning or '') + message['content'] +"
    shows_all = "{{ mood }}{{ tools | tojson if tools }}" + CHATML.replace("message['content'] +", asked)
    assert encoded({**PAIR, **more}, shows_all, render="chat").fate == Fate.TRAINED


# Pictures, context, channels, refusals


def test_what_is_not_seen_refuses_the_row_wherever_it_stands() -> None:
    for row, place in (
        ({**CHAT, "images": [PICTURE]}, "images"),
        ({**PAIR, "image": {"bytes": "x"}}, "image"),
        ({"messages": [{**USER, "videos": ["a.mp4"]}, ANSWER]}, "messages[0].videos"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "b"}]}, ANSWER]},
         "messages[0].content[0].image"),
    ):  # fmt: skip
        assert f"rows:1: {place}: deft trains on text" in refusal(row)
        assert one(row, ignore=(place.rpartition(".")[2],)).messages
    assert one({**CHAT, "images": [], "audio": None, "image": ""}) == one(CHAT)


def test_a_context_that_the_format_does_not_read_refuses_the_row() -> None:
    assert "context: rows of this shape have none" in refusal({**CHAT, "context": "It is so."})
    assert "documents: deft hands no documents" in refusal({**CHAT, "documents": [{"text": "a"}]})
    assert one({"instruction": "a", "context": "b", "output": "c"}).messages[0].content == "a\n\nb"
    assert "input: says something else than context" in refusal(
        {"instruction": "a", "context": "b", "input": "d", "output": "c"}
    )
    assert "output: says something else" in refusal({"instruction": "a", "response": "b", "output": "c"})


def harmony(*channels: str, **more: Any) -> dict[str, Any]:
    said = [{"role": "assistant", "content": f"on {channel}", "channel": channel, **more} for channel in channels]
    return {"messages": [USER, *said]}


def test_an_analysis_is_the_reasoning_of_the_final_message_after_it() -> None:
    (_, answer) = one(harmony("analysis", "final")).messages
    assert answer == Message("assistant", "on final", reasoning="on analysis")
    assert one(harmony("final")).messages[1].content == "on final"
    for channels in (("analysis",), ("analysis", "analysis", "final")):
        assert "an analysis without a final message after it" in refusal(harmony(*channels))
    assert "messages[1].channel: 'commentary' of the assistant" in refusal(harmony("commentary", "final"))
    assert "weighs other than its answer" in refusal(
        {"messages": [USER, {**ANSWER, "channel": "analysis", "weight": 0}, {**ANSWER, "channel": "final"}]}
    )


def test_a_refusal_is_the_answer_where_there_is_no_other() -> None:
    refused = {"role": "assistant", "content": None, "refusal": "I cannot."}
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}
    for said in (refused, part, {**refused, "content": ""}):
        assert one({"messages": [USER, said]}).messages[1] == Message("assistant", "I cannot.")
    assert "messages[1].refusal: beside content" in refusal({"messages": [USER, {**refused, "content": "Sure."}]})


WITHOUT_DEVELOPER = CHATML.replace("in messages %}", "in messages if message.role != 'developer' %}")
SYSTEM_ONLY_FIRST = CHATML.replace("in messages %}", "in messages if message.role != 'system' or loop.first %}")


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_developer_is_the_system_where_the_template_has_none(train_on: str) -> None:
    row = {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]}
    own = encoded(row, train_on=train_on)
    assert "<|im_start|>developer" in text(own)
    as_system = encoded(row, WITHOUT_DEVELOPER, train_on=train_on)
    assert text(as_system) == text(own).replace("developer", "system")
    assert as_system.notes == ("developer messages as system messages",)


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("role", ["system", "user", "tool", "developer"])
def test_words_that_the_template_does_not_show_refuse_the_row(role: str, train_on: str) -> None:
    drops = CHATML.replace("in messages %}", f"in messages if message.content != 'Obey {role}' %}}")
    row = {"messages": [USER, {"role": role, "content": f"Obey {role}"}, USER, ANSWER]}
    assert encoded(row, train_on=train_on).fate == Fate.TRAINED
    refused = encoded(row, drops, train_on=train_on)
    assert refused.fate == Fate.REFUSED
    assert f"the template shows nothing of messages[1] ({role})" in refused.reason


# What nothing reads


def test_fields_that_nothing_reads_are_counted_by_row() -> None:
    rows = [
        {"messages": [{**USER, "id": 1}, {**ANSWER, "id": 2}], "score": 0.5, "split": None, "note": ""},
        {"messages": [{**USER, "name": "Ann"}, ANSWER], "score": 0.1, "split": "a", "tags": []},
    ]
    assert unread(*rows) == {"score": 2, "messages[].id": 1, "split": 1}
    assert unread(*rows, ignore=("score", "messages[].id")) == {"split": 1}
    assert unread([{**USER, "id": 1}, ANSWER]) == {"[].id": 1}
    tree = {"message_tree_id": "t", "prompt": ROWS["oasst"]["prompt"], "tree_state": "ready"}
    assert unread(tree) == {"tree_state": 1}
    assert unread({"instruction": "a", "instances": [{"output": "b", "rating": 3}]}) == {"instances[].rating": 1}
    binarized = {
        "prompt": USER["content"],
        "chosen": [USER, ANSWER],
        "rejected": [USER, ANSWER],
        "messages": [USER, ANSWER],
    }
    assert unread(binarized) == {"messages": 1}


def test_counts_add_up_over_chunks_and_their_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**PAIR, "id": number} for number in range(1000)]
    assert unread(*rows) == {"id": 1000}
    monkeypatch.setattr(shapes, "NAMED", 5)
    assert unread(*({**PAIR, f"k{number}": 1} for number in range(9))) == {"...": 4, **{f"k{n}": 1 for n in range(5)}}


def test_what_is_not_read_is_told_in_a_line_and_in_the_ledger() -> None:
    found = source(*[{**PAIR, "id": 7, "score": n} for n in (1, 2)], name="train.jsonl")
    assert not_read([found, source(PAIR)]) == ["train.jsonl: not read: id (2 rows), score (2)"]
    (ledger,) = encode_sources([found], row_encoder()).ledgers
    assert ledger.as_json()["not_read"] == {"id": 2, "score": 2}
    many = source({**PAIR, **{f"k{number:02}": 1 for number in range(NAMED_FIELDS + 3)}})
    assert not_read([many])[0].endswith("k19 (1) and 3 more")


# Columns, ignoring, a user's own format


def test_columns_rename_and_drop_nothing() -> None:
    named = {"prompt": "q", "completion": "a"}
    row = {"q": "2+2=", "a": "4", "loss_weight": 0.5, "id": 7}
    assert one(row, columns=named).weight == 0.5
    assert unread(row, columns=named) == {"id": 1}
    assert one({"q": "2+2=", "a": "4", "w": 0}, columns={**named, "weight": "w"}).weight == 0
    both = {"q": "2+2=", "a": "4", "prompt": "3+3="}
    assert "prompt: stands beside q, which columns calls prompt; say ignore: [prompt]" in refusal(both, columns=named)
    assert one(both, columns=named, ignore=("prompt",)).messages[0].content == "2+2="
    swapped = one({"prompt": "4", "completion": "2+2="}, columns={"prompt": "completion", "completion": "prompt"})
    assert [each.content for each in swapped.messages] == ["2+2=", "4"]


def test_mapped_names_decide_the_shape_where_several_fit() -> None:
    row = {"q": "2+2=", "a": "4", "text": "2+2=4"}
    assert read(row, columns={"prompt": "q", "completion": "a"}).shape == "prompt_completion"
    assert read(row, columns={"text": "text"}).shape == "text"


def test_what_is_ignored_is_neither_read_nor_told_of() -> None:
    row = {"messages": [USER, {**ANSWER, "weight": 0, "id": 3}], "weight": 0.5, "id": 7, "text": "other"}
    found = read(row, ignore=("weight", "id", "text"))
    assert (found.shape, found.conversations[0]) == ("messages", one(CHAT))
    assert unread(row, ignore=("weight", "id", "text")) == {}
    in_text = {"messages": json.dumps([USER, {**ANSWER, "weight": 0}])}
    assert one(in_text, ignore=("weight",)) == one(CHAT)
    offered = {**CHAT, "tools": [{"name": "weather", "id": 3}], "id": 7}
    assert one(offered, ignore=("id",)).tools[0]["function"]["id"] == 3, "tools are not messages"


def test_what_a_users_format_gives_is_read_like_any_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def turn(row):\n    return {'prompt': row['x'], 'completion': row['y'], **row['more']}\n"
    (tmp_path / "my_said_rows.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))

    def turned(more: dict[str, Any], **choices: Any) -> Understood:
        return read({"x": "a", "y": "b", "more": more}, shape="my_said_rows:turn", **choices)

    assert turned({"loss_weight": 0}).conversations[0].weight == 0
    assert turned({"system": "Be brief."}).conversations[0].messages[0].role == "system"
    assert "images: deft trains on text" in str(turned({"images": [PICTURE]}).refused[0])
    assert turned({"images": [PICTURE]}, ignore=("images",)).refused == ()
    (_, found), *_ = understand([SourceSpec("r", "my_said_rows:turn", rows=({"x": "a", "y": "b", "more": {"id": 1}},))])
    assert found.unread == {"id": 1}


# Containers


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def tool(required: list[str], **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": "weather", "parameters": parameters}}


TEXT, NUMBER = {"type": "string"}, {"type": "number"}
TABLE_ROWS = [
    {"messages": [USER, call(city="Oslo"), {"role": "tool", "content": "3C"}, ANSWER],
     "tools": [tool(["city"], city=TEXT)], "system": None},
    {"messages": [USER, call(n=3), {"role": "tool", "content": "4C"}, {**ANSWER, "weight": 0.5}],
     "tools": [tool(["n"], n=NUMBER)], "system": "Be brief."},
]  # fmt: skip


def write(folder: Path, kind: str) -> Path:
    place = folder / f"rows.{kind}"
    table = pa.Table.from_pylist(TABLE_ROWS)
    if kind == "parquet":
        pq.write_table(table, place)
    elif kind == "arrow":
        with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif kind == "jsonl":
        place.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif kind == "json":
        place.write_text(json.dumps(table.to_pylist()))
    else:
        cells = io.StringIO()
        writer_of_cells = csv.DictWriter(cells, ["messages", "tools", "system"])
        writer_of_cells.writeheader()
        for row in table.to_pylist():
            listed = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
            writer_of_cells.writerow(listed)
        place.write_text(cells.getvalue())
    return place


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "json", "csv"])
def test_the_same_rows_are_the_same_conversations_whatever_the_container(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    plain = read(*TABLE_ROWS).conversations
    found = understood(sources.read(str(path)), str(path))
    assert found.refused == ()
    for expected, each in zip(plain, found.conversations, strict=True):
        assert (each.messages, each.tools, each.weight) == (expected.messages, expected.tools, expected.weight)
    ((spec, survey),) = understand([SourceSpec(str(path))])
    assert survey.unread == {}, spec


def test_rows_of_a_data_set_in_memory_are_read_without_their_padding() -> None:
    held = pa.Table.from_pylist(TABLE_ROWS).to_pylist()
    assert held[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo", "n": None}
    assert [each.messages for each in read(*held).conversations] == [
        each.messages for each in read(*TABLE_ROWS).conversations
    ]


def test_a_null_argument_stays_where_its_schema_requires_it_or_where_it_is_text() -> None:
    def arguments(given: Any, required: list[str]) -> Any:
        asked = call()
        asked["tool_calls"][0]["function"]["arguments"] = given
        row = {"messages": [USER, asked], "tools": [tool(required, unit=TEXT)]}
        return one(row).messages[1].tool_calls[0].arguments

    assert arguments({"city": "Oslo", "unit": None}, ["city"]) == {"city": "Oslo"}
    assert arguments({"city": "Oslo", "unit": None}, ["city", "unit"]) == {"city": "Oslo", "unit": None}
    assert arguments({"days": [{"unit": None, "n": 1}]}, []) == {"days": [{"n": 1}]}
    assert arguments('{"unit": null}', []) == '{"unit": null}'


def test_a_null_or_empty_column_is_no_column_and_decides_no_shape() -> None:
    alpaca = {"instruction": "a", "output": "b"}
    for absent in (None, "", float("nan")):
        assert read({**alpaca, "conversations": absent, "text": absent}).shape == "alpaca"
    assert read({**CHAT, "label": None}).shape == "messages"
    assert read({**CHAT, "label": True}, {**CHAT, "label": None}).refused[0].where == "rows:2"
    assert read({"prompt": "", "completion": "4"}).shape == "prompt_completion", "an empty prompt is a prompt"
    padded_pair = {"from": "human", "value": "Hi", "role": None, "content": None}
    answer = {"from": None, "value": None, "role": "assistant", "content": "Hello"}
    assert [m.role for m in one({"conversations": [padded_pair, answer]}).messages] == ["user", "assistant"]


def test_a_turn_of_sharegpt_says_all_that_a_message_may() -> None:
    turn = {"from": "gpt", "value": "I look.", "tool_calls": [{"function": {"name": "f"}}], "reasoning": "Hm."}
    found = one({"conversations": [*shared("a")[:1], turn]}).messages[1]
    assert found == Message("assistant", "I look.", None, "Hm.", (ToolCall("f", {}),))
    called = {"from": "function_call", "value": '{"name": "f"}', "loss": False, "reasoning": "Hm."}
    assert one({"conversations": [*shared("a")[:1], called]}).messages[1].reasoning == "Hm."


def test_an_unknown_setting_beside_ignore_is_still_an_error() -> None:
    with pytest.raises(InputError):
        understand([SourceSpec("no-such-file.jsonl", choices=Choices(ignore=("id",)))])


@pytest.mark.parametrize("key", sorted(row_fields.LEARNT))
@pytest.mark.parametrize("value", [False, 0, True])
def test_a_part_that_is_weighed_apart_refuses_the_row(key: str, value: Any) -> None:
    parts = [{"type": "text", "text": "Hel", key: value}, {"type": "text", "text": "lo"}]
    assert f"{key}: parts of a message cannot be weighed apart" in refusal(
        {"messages": [USER, {"role": "assistant", "content": parts}]}
    )


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("train", False), ("system", "S"), ("reasoning", "R")])
def test_what_belongs_to_a_row_refuses_it_where_one_of_its_instances_says_it(key: str, value: Any) -> None:
    row = {"instruction": "i", "instances": [{"input": "a", "output": "b", key: value}]}
    assert f"instances[0].{key}: it belongs to the row" in refusal(row)
