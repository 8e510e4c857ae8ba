"""deft from Python: what it takes in place of files, how Ctrl-C ends it, what it leaves of the process, and what
`deft.encode` gives to other trainers."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from resumed_runs import ROWS, differences, folder
from tiny_models import write_llama
from tiny_tokenizers import CHATML
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import deft
from deft.core.errors import InputError
from deft.model import selftest
from deft.plan import loader
from deft.plan.order import Batching
from deft.run.quiet import hub, logging, quiet
from deft.tracking.tracker import Trackers
from deft.training import checkpoint as checkpoints
from deft.training import objectives, resuming
from deft.training.optim.adamw import AdamW

__all__ = ["folder"]

PAIRS = [{"prompt": f"What is {n} + 2?", "completion": f" It is {n + 2}."} for n in range(8)]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", chat_template=CHATML)


def train(folder: Path, output: str, **more: Any) -> deft.Run:
    """Eight steps, the held-out loss and an answer before the first and after the last; dropout on."""
    asked = {"eval_prompts": ["What is 1 + 1?"], "evaluate__generate": {"max_new_tokens": 4}, "data__eval": 0.1}
    given = {**asked, "epochs": 2, "batch": 6, "lr": 1e-2, "dropout": "config", "device": "cpu", **more}
    return deft.train(folder / "model", folder / "train.jsonl", output=folder / output, **given)


# Ctrl-C


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def pressing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *calls: int) -> None:
    """Ctrl-C at the beginning of the given calls of a function."""
    plain, count = getattr(owner, name), iter(range(1, sys.maxsize))

    def called(*given: Any, **named: Any) -> Any:
        if next(count) in calls:
            press()
        return plain(*given, **named)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize("where", ["in an update", "between two steps"])
def test_ctrl_c_waits_for_the_step_saves_it_and_the_next_start_goes_on_to_the_same_bits(
    where: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an update as well: broken off there, it would leave nothing that can be saved."""
    with monkeypatch.context() as patch:
        updates = [0]
        plain = AdamW._update
        patch.setattr(AdamW, "_update", lambda *given: (updates.append(1), plain(*given))[1])
        steps = len(train(folder, "whole").metrics)
        a_step = (len(updates) - 1) // steps
    with monkeypatch.context() as patch:
        if where == "in an update":
            pressing(patch, AdamW, "_update", 3 * a_step + 2)
        else:
            pressing(patch, Trackers, "write", 2 + 4)
        with pytest.raises(KeyboardInterrupt):
            train(folder, "cut")
    assert checkpoints.steps(folder / "cut" / "checkpoints") == [4]
    assert "saved step 4, run it again" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(folder, "cut")
    assert f"resumed step 4 of {steps}" in capsys.readouterr().out
    assert differences(folder, "whole", "cut") == []


def test_a_second_ctrl_c_comes_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []

    def rest(state: Any, *given: Any) -> Any:
        press()
        saved.append(state.step)

    pressing(monkeypatch, Trackers, "write", 2)
    monkeypatch.setattr(resuming, "save_rest", rest)
    with pytest.raises(KeyboardInterrupt):
        train(folder, "cut")
    assert saved == [], "it does not wait for what the first one has begun"


def test_a_caller_s_own_handler_stays_in_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        pressing(monkeypatch, Trackers, "write", 2)
        assert len(train(folder, "run", steps=3).metrics) == 3
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT]


def test_in_another_thread_it_trains_and_says_that_ctrl_c_does_not_reach_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[deft.Run] = []
    thread = threading.Thread(target=lambda: found.append(train(folder, "run", steps=2)))
    thread.start()
    thread.join()
    assert len(found[0].metrics) == 2
    assert "Ctrl-C does not reach it" in capsys.readouterr().out
    train(folder, "main", steps=1)
    assert "Ctrl-C" not in capsys.readouterr().out


def test_a_run_without_output_says_what_goes_on_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    run = deft.train(folder / "model", folder / "train.jsonl", steps=1, device="cpu")
    assert f"output={run.folder} goes on with this run" in capsys.readouterr().out


# What stands in place of a file


class DataFrame:
    """As pandas and polars have them: iterated, it gives the names of its columns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.table = pa.Table.from_pylist(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.column_names)

    def __arrow_c_stream__(self, schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(schema)


KINDS = {
    "a list": lambda: PAIRS,
    "a tuple": lambda: tuple(PAIRS),
    "a generator": lambda: (row for row in PAIRS),
    "an iterator": lambda: iter(PAIRS),
    "a table of pyarrow": lambda: pa.Table.from_pylist(PAIRS),
    "a data frame": lambda: DataFrame(PAIRS),
    "pandas": lambda: pytest.importorskip("pandas").DataFrame(PAIRS, index=range(1, 9)),
    "polars": lambda: pytest.importorskip("polars").DataFrame(PAIRS),
    "datasets": lambda: pytest.importorskip("datasets").Dataset.from_list(PAIRS),
    "datasets, as a stream": lambda: pytest.importorskip("datasets").Dataset.from_list(PAIRS).to_iterable_dataset(),
}


@pytest.fixture
def expected(model: Path, tmp_path: Path) -> Mapping[str, Any]:
    return deft.train(model, samples=PAIRS, steps=1, output=tmp_path / "expected", device="cpu").metrics[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_memory_are_data(kind: str, model: Path, expected: Mapping[str, Any], tmp_path: Path) -> None:
    run = deft.train(model, KINDS[kind](), steps=1, output=tmp_path / "run", device="cpu")
    assert [run.metrics[0][name] for name in ("loss", "tokens")] == [expected[name] for name in ("loss", "tokens")]


def test_so_they_are_to_be_held_out(model: Path, expected: Mapping[str, Any], tmp_path: Path) -> None:
    held_out = pa.Table.from_pylist(PAIRS[:2])
    run = deft.train(model, PAIRS, data__eval=held_out, steps=1, output=tmp_path / "run", device="cpu")
    assert run.metrics[0]["tokens"] < expected["tokens"], "what is held out is not trained"
    assert len((run.folder / "eval.jsonl").read_text().splitlines()) == 2


def test_rows_in_memory_have_what_a_source_has(model: Path, tmp_path: Path) -> None:
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in PAIRS]
    source = {"path": rows, "columns": {"prompt": "q", "completion": "a"}, "times": 2}
    run = deft.train(model, {"train": [source]}, epochs=1, batch=16, output=tmp_path / "run", device="cpu")
    assert len(run.metrics) == 1
    again = deft.train(model, {"train": [source]}, epochs=1, batch=16, output=tmp_path / "run", device="cpu")
    assert again.folder == run.folder


NO_ROWS = [
    ("Once upon a time", "text, not a list of rows; a text to learn: put it in a list"),
    (PAIRS[0], "one row, not a list of rows; put it in a list"),
    (MESSAGES, "the messages of one conversation, not a list of rows; put it in a list: [messages]"),
    ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "the messages of one conversation"),
    ([], "no rows"),
    (3, "int, not a list of rows"),
    (b"{}", "bytes, not a list of rows"),
    (pa.table([[1], [2]], names=["a", "a"]), "two columns named 'a'"),
    (Path(__file__), "is a path, not a list of rows"),
    (__file__, "is a path, not a list of rows"),
]


@pytest.mark.parametrize(("value", "said"), NO_ROWS, ids=[said[:30] for _, said in NO_ROWS])
def test_what_is_no_list_of_rows_is_refused_with_the_fix(value: Any, said: str, model: Path) -> None:
    with pytest.raises(InputError) as refused:
        deft.encode(value, model)
    assert f"rows: {said}" in str(refused.value) or said in str(refused.value)
    with pytest.raises(InputError) as refused:
        deft.train(model, samples=value)
    assert str(refused.value).startswith("samples: ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": PAIRS[0]}, "data: one row, not a list of rows; put it in a list: [row]"),
        ({"data": MESSAGES}, "data: the messages of one conversation"),
        ({"data": ["Once upon a time", "The end."]}, "rows that are text: samples="),
        ({"data": {"train": PAIRS, "test": PAIRS}}, "data.test: unknown key; deft calls it data__eval"),
        ({"data": PAIRS, "tokenizer": object()}, "deft calls it model (the tokenizer is the one in its folder"),
        ({"data": PAIRS, "learning_rate": 1e-5}, "learning_rate: unknown key; deft calls it optimizer__lr"),
        ({"data": PAIRS, "metrics_fn": print}, "metrics_fn: unknown key; did you mean 'metric_fn'?"),
        ({"data": PAIRS, "optimizer__lrr": 1e-5}, "optimizer.lrr: unknown key; did you mean 'optimizer__lr'?"),
        ({"dataset": PAIRS}, "dataset: unknown key; deft calls it data__train"),
        ({}, "data: missing; give data=..."),
        ({"data": PAIRS, "stop_sequences": "END"}, "evaluate.stop_sequences: should be a valid tuple, not 'END'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_train_cannot_take_is_named_with_the_fix(given: dict[str, Any], said: str, model: Path) -> None:
    with pytest.raises(InputError) as refused:
        deft.train(model, **given)
    assert said in str(refused.value)


def test_a_model_in_memory_is_refused_with_what_to_give(model: Path) -> None:
    with pytest.raises(InputError) as refused:
        deft.train(AutoModelForCausalLM.from_pretrained(model), PAIRS)  # type: ignore[arg-type]
    for word in ("LlamaForCausalLM", str(model), "model.save_pretrained(folder)"):
        assert word in str(refused.value)


# The process and the package


def bars() -> list[Any]:
    levels = [logging.get_verbosity(), hub.logging.get_verbosity()]
    return [*levels, logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()]


@pytest.mark.parametrize("hub_is_quiet", [False, True])
def test_transformers_shows_nothing_of_its_own_and_is_afterwards_as_before(
    hub_is_quiet: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    if hub_is_quiet:
        hub.disable_progress_bars()
    before = bars()
    assert before[2], "transformers shows bars here"
    capsys.readouterr()
    try:
        deft.train(model, PAIRS, steps=1, output=tmp_path / "run", device="cpu")
        assert capsys.readouterr().err == ""
        assert bars() == before
    finally:
        hub.enable_progress_bars()


def test_what_a_user_wants_to_see_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    before = bars()
    with quiet():
        assert bars() == before


def test_the_package_says_what_it_has() -> None:
    assert dir(deft) == ["Run", "__version__", "collator", "encode", "train"]
    assert all(getattr(deft, name) for name in dir(deft))
    assert deft.__version__[0].isdigit()
    assert (Path(deft.__file__).parent / "py.typed").is_file()
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'deft = ["py.typed"]' in declared
    assert f'version = "{deft.__version__}"' in declared


def test_a_run_is_shown_in_a_line(model: Path, tmp_path: Path) -> None:
    run = deft.train(model, PAIRS, steps=3, output=tmp_path / "run", device="cpu")
    assert repr(run) == f"Run(folder={str(run.folder)!r}, steps=3, loss={run.metrics[-1]['loss']:.4f})"
    assert repr(deft.Run(Path("r"), ())) == "Run(folder='r', steps=0)"


# deft.encode for other trainers


def test_what_encode_gives_is_what_models_take(model: Path) -> None:
    batch = deft.encode(ROWS, model)
    row = batch[0]
    assert dict(row) == {
        "input_ids": row.tokens.tolist(),
        "attention_mask": [1] * len(row.tokens),
        "labels": row.labels.tolist(),
    }
    assert batch.to_list() == [dict(each) for each in batch]
    assert repr(batch) == "EncodedRows(26 rows, 0 refused)"
    assert [dict(each) for each in pickle.loads(pickle.dumps(batch))] == batch.to_list()
    pytest.importorskip("datasets").Dataset.from_list(batch.to_list())


def test_its_batches_give_deft_s_own_loss_and_train_a_model(model: Path) -> None:
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    rows = deft.encode(ROWS, tokenizer)
    (batch,) = DataLoader(rows, batch_size=len(rows), collate_fn=deft.collator(tokenizer))  # type: ignore[arg-type, var-annotated]
    assert batch["input_ids"].shape == batch["labels"].shape == (26, max(len(row.tokens) for row in rows))
    padded = batch["attention_mask"] == 0
    assert padded.any()
    assert set(batch["input_ids"][padded].tolist()) == {tokenizer.pad_token_id}
    assert set(batch["labels"][padded].tolist()) == {-100}
    losses = []
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(2):
        loss = plain(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(own_loss(model, rows), rel=1e-5)
    assert losses[1] < losses[0]


def own_loss(model: Path, rows: Any) -> float:
    causal_lm = selftest.choose(AutoModelForCausalLM.from_pretrained(model).eval())
    examples = [(row,) for row in rows]
    planned = loader.make(examples, Batching(examples=100), epochs=1, seed=0, microbatch_tokens=256)
    (step,) = planned.step_batches(0)
    tallies = [causal_lm(each, objectives.load("nll")) for each in step.micro_batches]
    return sum(each.nll_sum.item() for each in tallies) / sum(each.weight_sum.item() for each in tallies)


def test_transformers_trainer_takes_it_as_it_is(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = deft.encode(ROWS, model)
    shown = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(model),
        TrainingArguments(str(tmp_path / "out"), max_steps=2, **shown),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=deft.collator(model),
    )
    assert trainer.train().global_step == 2


def test_a_tokenizer_without_a_pad_token_pads_with_eos_or_says_that_it_cannot(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    collate = deft.collator(tokenizer)
    rows = [
        {"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 1]},
        {"input_ids": [7], "labels": [7], "attention_mask": [1]},
    ]
    assert collate(rows)["input_ids"].tolist() == [[5, 6], [7, tokenizer.eos_token_id]]
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a pad token nor EOS"):
        deft.collator(tokenizer)


def test_weights_that_labels_cannot_say_are_told(model: Path) -> None:
    chats = [{"messages": [MESSAGES[0], {**MESSAGES[1], "weight": weight}]} for weight in (1, 0.5, 2)]
    with pytest.warns(UserWarning, match=r"rows:2 has weights other than 0 and 1 \(of 2 such rows the first\)"):
        batch = deft.encode(chats, model)
    assert [set(row.weights.tolist()) for row in batch] == [{0.0, 1.0}, {0.0, 0.5}, {0.0, 2.0}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_on": "asistant"}, "train_on: 'asistant' is not there; did you mean 'assistant'?"),
        ({"render": "raws"}, "render: 'raws' is not there; did you mean 'raw'?"),
        ({"overflow": None}, "overflow: None is not there; there is"),
        ({"truncation_side": "top"}, "truncation_side: 'top' is not there"),
        ({"reasoning": "x"}, "reasoning: 'x' is not there"),
        ({"max_length": 1}, "max_length: 1 is no length"),
        ({"max_length": "2k"}, "max_length: '2k' is no length"),
    ],
)
def test_encode_takes_no_value_that_it_does_not_know(given: dict[str, Any], said: str, model: Path) -> None:
    with pytest.raises(InputError) as refused:
        deft.encode(ROWS, model, **given)
    assert said in str(refused.value)
