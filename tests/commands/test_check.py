"""`deft check`: what a run would do and what is wrong, without weights and without an output folder."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import chat
from rich.console import Console
from tiny_models import write_llama
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoConfig, AutoModelForCausalLM

from deft.commands import check
from deft.commands.check import Checkup, stop_findings
from deft.core.errors import Problems
from deft.encoding import tokenizer as edge
from deft.plan.order import Epoch
from deft.plan.summary import summarise
from deft.run import config
from deft.run.prepare import prepare
from deft.run.reading import Session

ROWS = [chat(f"What is {n}?", "It is " + "very " * n + "big.") for n in range(20)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", chat_template=CHATML)


def data(tmp_path: Path, *values: Any, name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def checked(model: Path, train: str, **settings: Any) -> tuple[Checkup, str]:
    console = Console(file=io.StringIO(), width=200)
    made = config.make(config.nested({"model": str(model), "data__train": train, **settings}))
    return check.run(made, console=console), console.file.getvalue()  # type: ignore[attr-defined]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "deft", "check", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=cwd)


def names(found: Checkup) -> list[str]:
    return [finding.what for finding in found.findings]


# The command


def test_it_needs_no_weights_writes_nothing_and_exits_0(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    rows = data(tmp_path, *ROWS)
    done = command(rows, f"model={model}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Nothing keeps this run from starting.\n")
    assert "warning:" in done.stdout
    assert f"{model} has no weights; deft train needs its *.safetensors files" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl"}


def test_refused_rows_are_shown_in_the_table_and_then_named_with_exit_code_2(tmp_path: Path, model: Path) -> None:
    rows = data(tmp_path, *ROWS, {"messages": [{"role": "user", "content": "Hi"}]})
    done = command(rows, f"model={model}", "--json", "found.json", cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "refused" in done.stdout.splitlines()[0]
    assert "rows.jsonl:21: messages: no assistant message" in done.stderr
    (source,) = json.loads((tmp_path / "found.json").read_text())["sources"]
    assert (source["rows"], source["fates"]["refused"], source["fates"]["trained"]) == (21, 1, 20)
    allowed = command(rows, f"model={model}", "data.allow_refused=1", cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr


def test_weights_that_are_there_are_looked_at(tmp_path: Path, model: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    checked(model, data(tmp_path, *ROWS))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(Problems, match="it is cut or damaged"):
        checked(model, data(tmp_path, *ROWS))


def test_all_that_needs_no_row_comes_in_one_error(tmp_path: Path) -> None:
    done = command("none.jsonl", "model=no/such/model", "loss.name=nil", cwd=tmp_path)
    assert done.returncode == 2
    for part in ("none.jsonl: no such file", "no/such/model", "did you mean 'nll'"):
        assert part in done.stderr
    assert done.stdout == ""


def test_no_row_is_left(tmp_path: Path, model: Path) -> None:
    done = command(data(tmp_path, chat("Hi", "Hello", weight=0)), f"model={model}", cwd=tmp_path)
    assert done.returncode == 2
    assert "no row is left to train on" in done.stdout
    assert "no learnt token" in done.stderr


# What it says


def test_its_table_has_a_line_per_source_and_its_json_is_the_run_s_ledger(tmp_path: Path, model: Path) -> None:
    sources = [data(tmp_path, *ROWS), data(tmp_path, *ROWS[:3], ROWS[4], name="more.jsonl")]
    made = config.make({"model": str(model), "data": {"train": sources, "eval": 0.2}, "output": str(tmp_path / "run")})
    found = check.run(made, str(tmp_path / "found.json"), Console(file=io.StringIO(), width=200))
    ledgers = [each.as_json() for each in prepare(made, Session(console=Console(quiet=True))).data.ledgers]
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["sources"] == json.loads(json.dumps(ledgers)) == [each.as_json() for each in found.ledgers]
    assert all(sum(source["fates"].values()) == source["rows"] for source in ledgers)
    assert {"model", "plan", "findings"} < set(written)


def test_the_numbers_of_the_plan_are_those_of_the_steps(tmp_path: Path, model: Path) -> None:
    rows = data(tmp_path, *ROWS)
    settings = {"batch__examples": 6, "epochs": 2, "microbatch_tokens": 100, "max_length": 128}
    found, said = checked(model, rows, **settings)
    made = config.make(config.nested({"model": str(model), "data__train": rows, **settings}))
    planned = prepare(made, Session(console=Console(quiet=True))).fit.planned
    works = [planned.step(step) for step in range(planned.epochs[0].steps)]
    assert found.plan is not None
    assert (found.plan.steps, found.plan.epochs, found.plan.examples) == (planned.steps, 2, 20)
    assert (found.plan.steps_per_epoch.least, found.plan.steps_per_epoch.most) == (4, 4)
    assert found.plan.tokens_per_step.mean == np.mean([work.tokens for work in works])
    assert found.plan.targets_per_step.mean == np.mean([work.target_tokens for work in works])
    assert found.plan.packs_per_step.most == max(len(work.micro_batches) for work in works)
    assert "plan      8 steps: 2 epochs of 4 steps over 20 examples" in said


def test_the_plan_of_texts_longer_than_a_micro_batch_is_no_fuller_than_full() -> None:
    epoch = Epoch(np.array([0, 1]), np.array([0, 2]))
    found = summarise([epoch], 1, lambda index: [[30], [4, 3]][index], lambda index: 1, budget=10)
    assert (found.packs_per_step.mean, found.fill) == (2, (30 + 7) / (30 + 10))
    assert found.targets_per_step.mean == 2


def test_the_model_is_told_from_its_config(tmp_path: Path, model: Path) -> None:
    found, said = checked(model, data(tmp_path, *ROWS))
    real = AutoModelForCausalLM.from_pretrained(model)
    assert found.model.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert found.model.against_packing == ""
    assert "llama" in said
    assert "128 positions" in said


def test_a_tokenizer_of_another_model_is_found_by_its_rows(tmp_path: Path, model: Path) -> None:
    rows = data(tmp_path, *ROWS)
    checked(model, rows)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "vocab_size": 300}))
    (model / "model.safetensors").unlink()
    with pytest.raises(Problems, match=r"rows.jsonl:1: token \d+ .* is past the model's 300; tokenizer and model must"):
        checked(model, rows)


# What it warns of: a case that has it, and one that has not


def test_rows_that_are_cut_or_left_out_by_max_length(tmp_path: Path, model: Path) -> None:
    turns = {"messages": [*ROWS[9]["messages"], *ROWS[1]["messages"]]}
    rows = data(tmp_path, turns, chat("Hi", "very " * 90), *ROWS)
    found, _ = checked(model, rows, max_length=40, overflow="turns")
    lost = [finding for finding in found.findings if "as longer than 40 tokens" in finding.what]
    assert [finding.what.split(",")[0] for finding in lost] == ["cut", "left out"]
    assert lost[0].rows[0].endswith("rows.jsonl:1")
    assert lost[1].rows[0].endswith("rows.jsonl:2")
    whole, _ = checked(model, data(tmp_path, *ROWS[:3]))
    assert not any("as longer than" in what for what in names(whole))


def test_learning_what_users_say_is_noted(tmp_path: Path, model: Path) -> None:
    rows = data(tmp_path, *ROWS)
    everything, _ = checked(model, rows, data__train_on="all")
    assert any("what users and tools say is learnt" in what for what in names(everything))
    assert not any("what users and tools say" in what for what in names(checked(model, rows)[0]))


def test_symptoms_of_rows_are_findings(tmp_path: Path, model: Path) -> None:
    found, said = checked(model, data(tmp_path, *ROWS, chat("What is </s>?", "A mark.")))
    assert "1 row has special tokens in a message" in names(found)
    assert "note: 1 row has special tokens in a message (" in said
    assert not any("special tokens" in what for what in names(checked(model, data(tmp_path, *ROWS))[0]))


def stops(*stop_ids: str, marks: tuple[str, ...] = (), **changes: Any) -> list[str]:
    """What is found of the byte-level tokenizer (EOS </s>, pad <pad>), with a generation_config that has `stop_ids`."""
    hf = copy.deepcopy(byte_level())
    for name, value in changes.items():
        setattr(hf, name, value)
    found = stop_findings(edge.wrap(hf), hf.convert_tokens_to_ids(list(stop_ids)), frozenset(marks))
    return [f"{finding.level}: {finding.what}" for finding in found]


def test_where_all_agree_on_what_stops_nothing_is_said() -> None:
    assert stops("</s>") == []
    assert stops("</s>", "<|im_end|>", marks=("<|im_end|>", "</s>")) == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            lambda: stops("<s>"),
            "warning: the tokenizer's EOS '</s>' is not among the stop tokens of generation_config (<s>)",
        ),
        (lambda: stops("</s>", eos_token=None), "warning: the tokenizer has no EOS token"),
        (lambda: stops("</s>", pad_token="</s>"), "note: padding and EOS are the same token '</s>'"),
        (
            lambda: stops("</s>", marks=("<|im_end|>",)),
            "note: the chat template ends turns with '<|im_end|>', which is not yet",
        ),
        (
            lambda: stops("</s>", marks=("<|eot|>",)),
            "warning: the chat template ends turns with '<|eot|>', which is no token",
        ),
    ],
)
def test_disagreements_on_what_stops_are_found(found: Any, expected: str) -> None:
    (said,) = found()
    assert said.startswith(expected)


def test_the_template_s_stop_mark_is_found_in_a_run(tmp_path: Path, model: Path) -> None:
    found, _ = checked(model, data(tmp_path, *ROWS))
    assert any("'<|im_end|>', which is not yet a stop token" in what for what in names(found))
    settings = json.loads((model / "generation_config.json").read_text())
    mark = byte_level().convert_tokens_to_ids("<|im_end|>")
    eos = byte_level().eos_token_id
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [eos, mark]}))
    assert not any("stop token" in what for what in names(checked(model, data(tmp_path, *ROWS))[0]))


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "numpy", "pydantic", "rich.table"]
    code = f"import sys; import deft.commands.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
