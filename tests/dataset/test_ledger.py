"""The ledger: each row has one fate, they add up, and what may be wrong with a row is counted, its first rows named."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from encoders import chat, row_encoder, source
from readers import understand
from tiny_tokenizers import CHATML, byte_level, letters
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from deft.core.types import Fate
from deft.data import sources
from deft.dataset import build, data_warnings, ledger
from deft.dataset.data_warnings import WARNINGS
from deft.dataset.ledger import SourceLedger
from deft.encoding.rows import RowEncoder

WITHOUT_EARLIER = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages if message['role'] != 'assistant' or message == messages[-1] %}",
)
WITH_REASONING = CHATML.replace(
    "message['content'] +",
    "('<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '') + message['content'] +",
)
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


WITH_CALLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML.replace(
    "message['content'] +", "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +"
)
CALLING = chat("Oslo?", "", tool_calls=[{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}])


def account(encoder: RowEncoder, *rows: Any, **settings: Any) -> SourceLedger:
    return build.encode_sources([source(*rows)], encoder, **settings).ledgers[0]


def without_eos() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.eos_token = None
    return tokenizer


def test_every_row_has_one_fate_and_they_add_up() -> None:
    rows = [
        chat("Hi", "Hello"),
        chat("Hi", "Hello " * 100),
        chat("Hi", "Hello", weight=0),
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [*chat("q", "b " * 20)["messages"], *chat("c", "d " * 30)["messages"]]},
        *(chat(f"What is {n}?", "It is.") for n in range(20)),
    ]
    found = account(row_encoder(max_length=100), *rows, share=0.3)
    expected = {"too_long": 1, "no_target": 1, "refused": 1, "cut": 1}
    assert {fate: found.fates[fate] for fate in expected} == expected
    assert found.fates["held_out"] > 1
    assert sum(found.fates.values()) == found.rows == len(rows)
    assert set(found.fates) == set(Fate)


def test_fates_that_do_not_add_up_are_our_own_bug() -> None:
    found = account(row_encoder(), chat("Hi", "Hello"))
    with pytest.raises(AssertionError, match="are not 2 rows"):
        replace(found, rows=2)


def test_it_counts_what_the_rows_hold() -> None:
    encoder = row_encoder()
    data = build.encode_sources([source(chat("Hi", "Hello"), chat("What?", "the cat sat on the mat " * 4))], encoder)
    (found,), lengths = data.ledgers, [len(example[0].tokens) for example in data.train]
    assert (found.examples, found.tokens, found.longest) == (2, sum(lengths), max(lengths))
    assert found.target_tokens == sum(int((example[0].weights > 0).sum()) for example in data.train)
    assert found.longest_rows == (("rows.jsonl:2", lengths[1]), ("rows.jsonl:1", lengths[0]))
    assert sum(count for _, count in found.lengths) == 2


def test_the_longest_rows_are_named_in_their_order_equal_ones_by_line() -> None:
    rows = [chat("Hi", "a" * n) for n in (3, 9, 1, 9, 7, 2, 8)]
    found = account(row_encoder(), *rows)
    assert [row for row, _ in found.longest_rows] == [f"rows.jsonl:{line}" for line in (2, 4, 7, 5, 1)]


def test_its_json_says_the_same() -> None:
    found = account(row_encoder(), chat("Hi", "a <|im_end|> b"), {"messages": [{"role": "user", "content": "Hi"}]})
    said = json.loads(json.dumps(found.as_json()))
    assert (said["rows"], sum(said["fates"].values()), said["fates"]["refused"]) == (2, 2, 1)
    assert said["symptoms"]["special_tokens_as_text"] == {"rows": 1, "first": ["rows.jsonl:1"]}
    assert said["lost"][0]["row"] == "rows.jsonl:2"
    assert said["target_share"] == pytest.approx(found.target_tokens / found.tokens, abs=1e-4)


CASES: dict[str, tuple[tuple[RowEncoder, Any], tuple[RowEncoder, Any]]] = {
    "no_stop": (
        (row_encoder(tokenizer=without_eos()), ["Hi", "Hello"]),
        (row_encoder(), ["Hi", "Hello"]),
    ),
    "double_bos": (
        (row_encoder("{{ bos_token + bos_token }}" + CHATML), chat("Hi", "Hello")),
        (row_encoder("{{ bos_token }}" + CHATML), chat("Hi", "Hello")),
    ),
    "empty_answer": (
        (row_encoder(), ["Hi", ""]),
        (row_encoder(), ["Hi", "Hello"]),
    ),
    "special_tokens_as_text": (
        (row_encoder(), chat("What is </s>?", "A mark")),
        (row_encoder(), chat("What is it?", "A mark")),
    ),
    "rendered_as_text": (
        (row_encoder(), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"),
        (row_encoder(), "What is <|im_start|>?"),
    ),
    "begins_otherwise": (
        (row_encoder(render="rendered"), "<|im_start|>judge\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"),
        (row_encoder(render="rendered"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"),
    ),
    "lost_characters": (
        (row_encoder(tokenizer=letters()), ["hi", "hello 日"]),
        (row_encoder(tokenizer=letters()), ["hi", "hello"]),
    ),
    "changed_characters": (
        (row_encoder(tokenizer=letters(normalizers.Lowercase())), ["hi", "Hello"]),
        (row_encoder(tokenizer=letters(normalizers.Lowercase())), ["Hi", "hello"]),
    ),
    "encoded_apart": (
        (
            row_encoder("{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"),
            chat("th", "e cat"),
        ),
        (row_encoder(), chat("th", "e cat")),
    ),
    "undeclared_tools": (
        (row_encoder(WITH_CALLS), {**CALLING, "tools": [{"name": "sun"}]}),
        (row_encoder(WITH_CALLS), {**CALLING, "tools": [{"name": "sun"}, TOOL]}),
    ),
    "marks_of_media": (
        (row_encoder(), chat("What is <|image_pad|>?", "A cat")),
        (row_encoder(), chat("What is <imagine>?", "A cat")),
    ),
    "contrary_rating": (
        (row_encoder(), {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 3}),
        (row_encoder(), {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 3}),
    ),
    "dropped_content": (
        (
            row_encoder(WITHOUT_EARLIER),
            {"messages": [*chat("a", "earlier", weight=0)["messages"], *chat("c", "d")["messages"]]},
        ),
        (row_encoder(), {"messages": [*chat("a", "earlier", weight=0)["messages"], *chat("c", "d")["messages"]]}),
    ),
    "dropped_reasoning": (
        (
            row_encoder(),
            {"messages": [*chat("a", "b", reasoning="because", weight=0)["messages"], *chat("c", "d")["messages"]]},
        ),
        (
            row_encoder(WITH_REASONING),
            {"messages": [*chat("a", "b", reasoning="because", weight=0)["messages"], *chat("c", "d")["messages"]]},
        ),
    ),
    "dropped_tools": (
        (row_encoder(), {**chat("Hi", "Hello"), "tools": [TOOL]}),
        (row_encoder(WITH_TOOLS), {**chat("Hi", "Hello"), "tools": [TOOL]}),
    ),
    "dropped_kwargs": (
        (row_encoder(), {**chat("Hi", "Hello"), "template_kwargs": {"mood": "calm"}}),
        (row_encoder("{{ mood }}" + CHATML), {**chat("Hi", "Hello"), "template_kwargs": {"mood": "calm"}}),
    ),
    "dropped_weight": (
        (
            row_encoder(),
            {"messages": [{"role": "user", "content": "Hi", "weight": 1}, *chat("", "Hello")["messages"][1:]]},
        ),
        (
            row_encoder(),
            {"messages": [{"role": "user", "content": "Hi", "weight": 0}, *chat("", "Hello")["messages"][1:]]},
        ),
    ),
    "dropped_name": (
        (
            row_encoder(),
            {
                "messages": [
                    {"role": "user", "content": "Hi", "name": "Natalia"},
                    {"role": "assistant", "content": "Hello"},
                ]
            },
        ),
        (
            row_encoder(CHATML.replace("message['role'] +", "message['role'] + (message.name or '') +")),
            {
                "messages": [
                    {"role": "user", "content": "Hi", "name": "Natalia"},
                    {"role": "assistant", "content": "Hello"},
                ]
            },
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_warning_is_found_where_it_is_and_only_there(name: str) -> None:
    (ill, ill_row), (well, well_row) = CASES[name]
    found = account(ill, ill_row)
    assert found.fates["trained"] == 1, found.lost
    assert found.count(name) == 1, found.warnings
    healthy = account(well, well_row)
    assert (healthy.fates["trained"], healthy.count(name)) == (1, 0), (healthy.lost, healthy.warnings)


def test_tool_calls_that_the_template_drops_in_history_are_seen() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    asked = chat("a", "Wait.", tool_calls=[call], weight=0)["messages"]
    row = {"messages": [*asked, {"role": "tool", "content": "21"}, *chat("c", "d")["messages"]]}
    assert account(row_encoder(), row).count("dropped_tool_calls") == 1
    shown = CHATML.replace(
        "message['content'] +", "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +"
    )
    assert account(row_encoder(shown), row).count("dropped_tool_calls") == 0


@pytest.mark.parametrize("mark", ["<image>", "<audio>", "<video>", "<start_of_image>", "[IMG]", "<|image_1|>", "<IMG>"])
def test_marks_of_pictures_and_sounds_are_seen_in_any_text(mark: str) -> None:
    assert (
        account(row_encoder(), chat(f"{mark}\nWhat is it?", "A cat"), chat("Hi", "Hello")).count("marks_of_media") == 1
    )


def test_every_warning_is_told_and_has_a_case() -> None:
    elsewhere = {"dropped_tool_calls", "duplicate", "in_evaluation"}
    elsewhere |= {"empty_reasoning", "thinking_off", "moved_reasoning", "empty_block", "reasoning_as_text"}
    assert set(CASES) | elsewhere == set(WARNINGS)


def test_repeated_rows_are_seen_and_so_are_rows_of_the_evaluation_data() -> None:
    a, b, c = (chat("Hi", answer) for answer in "abc")
    evaluated = [source(c, name="eval.jsonl")]
    found = account(row_encoder(), a, b, a, c, held_out=evaluated)
    assert [(seen.name, seen.first) for seen in found.warnings] == [
        ("duplicate", ("rows.jsonl:3",)),
        ("in_evaluation", ("rows.jsonl:4",)),
    ]
    assert account(row_encoder(), a, b).warnings == ()


def test_rows_are_decoded_until_fifty_of_their_kind_are_whole_and_to_the_end_where_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longer = {"messages": [*chat("a", "earlier", weight=0)["messages"], *chat("c", "d")["messages"]]}
    dropping, keeping = row_encoder(WITHOUT_EARLIER), row_encoder()
    assert account(dropping, *[longer] * 60).count("dropped_content") == 60
    known = understand(sources.from_values([longer] * 60), "rows")
    decoded: list[Any] = []
    dropped = data_warnings._dropped
    monkeypatch.setattr(data_warnings, "_dropped", lambda *each: decoded.append(each) or dropped(*each))
    data_warnings.check(keeping, keeping.encode_many(known.conversations))
    assert len(decoded) == 50


def test_a_message_after_the_last_learnt_one_is_not_called_dropped() -> None:
    row = {"messages": [*chat("Hi", "Hello")["messages"], {"role": "user", "content": "Thank you so much"}]}
    assert account(row_encoder(), row).count("dropped_content") == 0


def test_a_cut_answer_is_no_missing_stop() -> None:
    found = account(row_encoder(max_length=20, overflow="cut"), ["What is the capital?", " the cat sat on the mat" * 9])
    assert (found.fates["cut"], found.count("no_stop")) == (1, 0)


def test_only_the_last_window_of_a_text_ends_with_a_stop() -> None:
    text = "the cat sat on the mat " * 30
    assert account(row_encoder(max_length=32), text).examples > 3
    assert account(row_encoder(max_length=32), text).count("no_stop") == 0
    assert account(row_encoder(tokenizer=without_eos(), max_length=32), text).count("no_stop") == 1


def test_white_space_learnt_after_the_stop_is_no_missing_stop() -> None:
    (mark,) = byte_level().convert_tokens_to_ids(["<|im_end|>"])
    learning_all = row_encoder(train_on="all", stop_ids=(mark,))
    assert account(learning_all, chat("Hi", "Hello")).count("no_stop") == 0
    assert account(row_encoder(train_on="all"), chat("Hi", "Hello")).count("no_stop") == 1, "no row ends with a stop"


def test_a_finding_is_one_line_that_says_what_where_and_what_to_do() -> None:
    found = account(row_encoder(), *(["Hi", ""] for _ in range(7)), ["Hi", "Hello"])
    (finding,) = (each for each in ledger.findings([found]) if "without words" in each.what)
    assert str(finding) == (
        "warning: 7 rows have an answer without words: only stopping is learnt there (rows.jsonl:1, rows.jsonl:2, "
        "rows.jsonl:3, rows.jsonl:4, rows.jsonl:5, ...); fill it in, or remove the row"
    )
    assert all("\n" not in str(each) for each in ledger.findings([found]))


def test_findings_of_several_sources_are_one() -> None:
    each = account(row_encoder(), ["Hi", ""])
    (finding,) = ledger.findings([each, each])
    assert (finding.what.split()[0], finding.rows) == ("2", ("rows.jsonl:1", "rows.jsonl:1"))
    assert ledger.findings([account(row_encoder(), ["Hi", "Hello"])]) == []


def test_what_a_format_refused_is_counted_with_its_reason() -> None:
    broken = {"messages": [{"role": "usr", "content": "Hi"}]}
    found = account(row_encoder(), chat("Hi", "Hello"), broken)
    ((row, fate, reason),) = found.lost
    assert (found.rows, row, fate) == (2, "rows.jsonl:2", "refused")
    assert reason.startswith("messages[0].role: 'usr' is not a role")
    assert reason.endswith("; did you mean 'user'?")
