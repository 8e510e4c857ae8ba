"""Several sources in one training set: passes, weights, caps, duplicates, and nothing trained that is evaluated."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readers
import yaml
from tiny_tokenizers import CHATML, byte_level

import deft
from deft.core.errors import Problems
from deft.core.types import (
    Conversation,
    Message,
    Origin,
    ToolCall,
)
from deft.data import sources
from deft.data.format import Control
from deft.dataset import build, examples
from deft.dataset.build import Dataset
from deft.dataset.cache import Cache
from deft.dataset.examples import digest
from deft.dataset.source import SourceSpec
from deft.dataset.splits import ContentIndex, SplitRule, assign_splits, passes_of
from deft.dataset.store import Store
from deft.dataset.survey import Execution, understand
from deft.encoding.render.template import choose
from deft.encoding.rows import Policy, RowEncoder
from deft.encoding.tokenizer import wrap
from deft.run import config
from deft.run.reading import source_spec


@pytest.fixture(scope="module")
def row_encoder() -> RowEncoder:
    tokenizer = wrap(byte_level()).with_template(CHATML)
    return examples.encoder(tokenizer, choose("auto", CHATML, False), Policy(max_length=512))


def pairs(count: int, name: str = "p") -> tuple[dict[str, Any], ...]:
    return tuple({"prompt": f"{name}{number}", "completion": f" {number}"} for number in range(count))


def encoded(
    row_encoder: RowEncoder, *sources: SourceSpec, held_out: tuple[SourceSpec, ...] = (), **more: Any
) -> Dataset:
    return build.encode_sources(understand(sources), row_encoder, held_out=understand(held_out), **more)


def learnt(data: Dataset) -> Counter[tuple[str, int]]:
    """How often each row is learnt in an epoch."""
    return Counter((example[0].origin.source, example[0].origin.line) for example in data.train)


@pytest.mark.parametrize("times", [0.25, 1.0, 1.5, 3.0])
def test_rows_are_learnt_times_an_epoch_and_the_share_is_drawn_by_seed(row_encoder: RowEncoder, times: float) -> None:
    source = SourceSpec("a", rows=pairs(40), times=times)
    counts = learnt(encoded(row_encoder, source, seed=7))
    assert counts.total() == round(40 * times)
    assert set(counts.values()) <= {int(times), int(times) + 1}
    assert counts == learnt(encoded(row_encoder, source, seed=7))
    if times % 1:
        assert counts != learnt(encoded(row_encoder, source, seed=8))


def test_rows_that_times_does_not_draw_are_left_out_by_name(row_encoder: RowEncoder) -> None:
    data = encoded(row_encoder, SourceSpec("a", rows=pairs(8), times=0.25))
    (ledger,) = data.ledgers
    assert (ledger.rows, ledger.fates["trained"], ledger.fates["left_out"]) == (8, 2, 6)
    assert ledger.lost[0][2] == "not among the 0.25 of the source's rows that seed 0 draws"


def test_equal_sources_draw_apart() -> None:
    first, second = (passes_of(100, 0.5, seed=0, source=number) for number in (0, 1))
    assert (first.sum(), second.sum()) == (50, 50)
    assert first.tolist() != second.tolist()


def test_weights_of_source_and_row_multiply(row_encoder: RowEncoder) -> None:
    half = {**pairs(1)[0], "loss_weight": 0.5}
    plain, weighted = (
        encoded(row_encoder, SourceSpec("a", rows=rows, loss_weight=weight)).train[0][0]
        for rows, weight in ((pairs(1), 1.0), ((half,), 3.0))
    )
    assert plain.weights.max() == 1.0
    np.testing.assert_array_equal(weighted.weights, plain.weights * 1.5)
    assert weighted.weights.dtype == np.float32


def test_max_rows_reads_no_further(row_encoder: RowEncoder, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(3)) + "broken\n")
    (ledger,) = encoded(row_encoder, SourceSpec(str(path), max_rows=2)).ledgers
    assert (ledger.rows, ledger.fates["trained"]) == (2, 2)


def test_a_row_that_is_evaluated_is_never_trained(row_encoder: RowEncoder) -> None:
    train, held_out = SourceSpec("train", rows=pairs(5)), SourceSpec("eval", rows=pairs(2)[::-1])
    data = encoded(row_encoder, train, held_out=(held_out,))
    assert set(learnt(data)) == {("train", 3), ("train", 4), ("train", 5)}
    ledger, _ = data.ledgers
    assert ledger.fates["held_out"] == 2
    assert ledger.lost[0] == ("train:1", "held_out", "stands in the evaluation data too: eval:2")
    assert {example[0].origin.source for example in data.held_out} == {"eval"}


def store_of(way_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_encoder: RowEncoder) -> Store:
    """The same 40 rows, read from a file, from memory or from standard input, or mapped from the cache."""
    lines = "".join(json.dumps(row) + "\n" for row in pairs(40))
    (tmp_path / "rows.jsonl").write_text(lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(lines.encode()))))
    rows = {"samples": SourceSpec("samples", rows=pairs(40)), "stdin": SourceSpec("-")}
    spec = rows.get(way_in, SourceSpec(str(tmp_path / "rows.jsonl")))
    execution = Execution(Cache(tmp_path / "cache") if way_in == "cache" else None)
    for _ in range(2 if way_in == "cache" else 1):
        ((source, survey),) = understand([spec], execution)
        found = build.store(source, survey, row_encoder, execution)
    return found


WAYS_IN = ("file", "samples", "stdin", "cache")


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_a_row_has_one_digest_whichever_way_it_comes_in(
    row_encoder: RowEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way_in: str
) -> None:
    store = store_of(way_in, tmp_path, monkeypatch, row_encoder)
    read = readers.understand(sources.from_values(pairs(40)), "rows")
    assert store.column("digest").dtype == np.uint64
    assert store.column("digest").tolist() == [digest(row) for row in read.rows()]
    for other in WAYS_IN:
        evaluated = ContentIndex.of([store_of(other, tmp_path, monkeypatch, row_encoder)])
        assert evaluated.digests.dtype == np.uint64
        split = assign_splits(store, SplitRule(), evaluated, np.zeros(40, bool))
        assert len(split.train().index) == 0, f"{way_in} is trained, and {other} evaluates it"


def test_a_share_holds_out_all_copies_of_a_row_and_all_conversations_of_one(row_encoder: RowEncoder) -> None:
    cases = [{"input": f"{number}", "output": "yes"} for number in range(3)]
    tasks = tuple({"instruction": f"task {number}", "instances": cases} for number in range(20))
    data = encoded(row_encoder, SourceSpec("a", rows=pairs(50) * 2), SourceSpec("b", rows=tasks), share=0.4)
    kept, apart = ({part[0].origin for part in side} for side in (data.train, data.held_out))
    assert len(kept) > 20
    assert len(apart) > 20
    assert not kept & apart
    of_kept, of_apart = ({(o.line - 1) % 50 for o in side if o.source == "a"} for side in (kept, apart))
    assert of_kept.isdisjoint(of_apart)


def test_duplicates_are_counted_across_sources_and_named(row_encoder: RowEncoder) -> None:
    data = encoded(row_encoder, SourceSpec("a", rows=pairs(3)), SourceSpec("b", rows=(*pairs(2), *pairs(1, "q"))))
    assert [ledger.count("duplicate") for ledger in data.ledgers] == [0, 2]
    assert [seen.first for seen in data.ledgers[1].warnings if seen.name == "duplicate"] == [("b:1", "b:2")]
    assert len(data.train) == 6


def test_a_row_of_several_conversations_has_one_fate(row_encoder: RowEncoder) -> None:
    long = "why " * 400
    cases = [{"input": "", "output": "yes"}, {"input": long, "output": "no"}]
    rows = ({"instruction": "a", "instances": cases}, {"instruction": "b", "instances": cases[:1] * 2})
    (ledger,) = encoded(row_encoder, SourceSpec("a", rows=rows)).ledgers
    assert (ledger.rows, ledger.fates["cut"], ledger.fates["trained"], ledger.examples) == (2, 1, 1, 3)
    assert ledger.lost[0][2].startswith("1 of its 2 conversations are not trained: ")


def test_the_fates_of_every_source_add_up_to_its_rows(row_encoder: RowEncoder) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = tuple({**chat, "label": label} for label in (True, False, None))
    (ledger,) = encoded(row_encoder, SourceSpec("a", rows=rows)).ledgers
    assert (ledger.rows, ledger.fates["trained"], ledger.fates["left_out"], ledger.fates["refused"]) == (3, 1, 1, 1)


def test_words_decide_the_digest_and_nothing_else() -> None:
    def of(line: int, message: Message, **more: Any) -> int:
        return digest([Conversation(Origin("a", line), "chat", (message,), **more)])

    plain = Message("assistant", "Hi")
    assert of(1, plain) == of(2, Message("assistant", "Hi", weight=0.5)) == of(1, plain, weight=2.0)
    others = [
        Message("user", "Hi"),
        Message("assistant", "Hi "),
        Message("assistant", "Hi", reasoning="Hm"),
        Message("assistant", "Hi", tool_calls=(ToolCall("f", {}),)),
        Message("assistant", "Hi", tool_calls=(ToolCall("f", {"a": 1}),)),
    ]
    digests = [of(1, each) for each in (plain, *others)] + [of(1, plain, tools=({"name": "f"},))]
    assert len(set(digests)) == len(digests)


def test_a_source_of_the_configuration_has_all_its_settings() -> None:
    made = config.make({"model": "m", "data": {
        "train": [{"path": "a.jsonl", "columns": {"prompt": "q"}, "control": {"good": "+", "bad": "-"},
                   "answers": "best", "times": 2, "loss_weight": 0.5, "max_rows": 10, "subset": "main",
                   "format": "halos"}],
        "eval": "b.jsonl"}})  # fmt: skip
    train = source_spec(made.data.train[0], "train")
    assert train.choices.control == Control("+", "-")
    assert (train.choices.split, train.times, train.loss_weight, train.max_rows) == ("train", 2.0, 0.5, 10)
    assert (train.format, train.subset, train.choices.answers) == ("halos", "main", "best")
    assert train.choices.columns == {"prompt": "q"}
    assert config.make(yaml.safe_load(config.as_yaml(made))) == made


@pytest.mark.parametrize(
    "setting",
    [{"times": 0}, {"loss_weight": -1}, {"max_rows": 0}, {"answers": "some"}, {"control": {"god": "+"}}, {"time": 1}],
)
def test_a_wrong_setting_of_a_source_is_named(setting: dict[str, Any]) -> None:
    with pytest.raises(Problems, match=r"data\.train.*" + next(iter(setting))):
        config.make({"model": "m", "data": {"train": [{"path": "a.jsonl", **setting}]}})


def test_encode_takes_rows_of_several_conversations_and_names_what_is_left_out() -> None:
    tokenizer = byte_level()
    task = {"instruction": "a", "instances": [{"input": "", "output": "b"}, {"input": "c", "output": "d"}]}
    batch = deft.encode([task], tokenizer, template="chatml")
    assert [item.origin.line for item in batch] == [1, 1]
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rated = deft.encode([{**chat, "label": label} for label in (True, False)], tokenizer, template="chatml")
    assert len(rated) == 1
    assert rated.refused == ((Origin("rows", 2), "label: false, a bad answer"),)


# Weights in fp32


def test_a_row_whose_weight_is_0_in_fp32_is_refused(row_encoder: RowEncoder) -> None:
    rows = ({**pairs(1)[0], "loss_weight": 1e-50}, *pairs(2, "q"))
    data = encoded(row_encoder, SourceSpec("a", rows=rows))
    assert [fate for _, fate, _ in data.ledgers[0].lost] == ["refused"]
    assert "1e-50 of the row times 1 of a message is not 0, and no number of fp32" in data.ledgers[0].lost[0][2]
    assert len(data.train) == 2


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_the_weights_of_source_row_and_message_multiply_in_fp32(row_encoder: RowEncoder, name: str) -> None:
    def chat(weight: float, row: float) -> dict[str, Any]:
        learnt = {"role": "assistant", "content": "b", "weight": weight}
        return {"messages": [{"role": "user", "content": f"{weight} {row}"}, learnt], "loss_weight": row}

    kept = [chat(1e-10, 1.0), chat(1e-10, 1e-10), chat(1e6, 1e6), chat(1, 0), chat(0, 1)]
    lost = [chat(1e-10, 1e-20), chat(1e-30, 1.0), chat(1.0, 1e-30)]
    spec = SourceSpec("a", rows=(*kept, *lost), loss_weight=1e-15)
    of = understand([spec])
    data = build.encode_sources(of if name == "train" else [], row_encoder, held_out=of if name == "held_out" else ())
    (found,) = data.ledgers
    assert (found.fates["refused"], found.fates["no_target"]) == (3, 2)
    assert "1e-15 of its source times its own weights" in found.lost[-1][2]
    for (part,) in (*data.train, *data.held_out):
        assert part.weights.max() >= np.finfo(np.float32).tiny


def test_one_small_weight_of_several_refuses_its_row(row_encoder: RowEncoder) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1e-30}]
    row = {"messages": [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    found = [encoded(row_encoder, SourceSpec("a", rows=(row,), loss_weight=weight)) for weight in (1.0, 1e-9)]
    assert [data.ledgers[0].fates["refused"] for data in found] == [0, 1]


def test_weights_of_a_user_s_format_are_finite_and_not_negative(row_encoder: RowEncoder) -> None:
    for weight in (1e39, float("inf"), float("nan"), -1.0):
        row = row_encoder.encode(Conversation(Origin("a", 1), "text", (Message("output", "Hi"),), weight=weight))
        assert row.reason.startswith("loss_weight:"), weight
