"""The main job from end to end: a run folder, a model that loads anywhere, and every refusal before the model loads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import write_llama
from tiny_tokenizers import CHATML
from transformers import AutoModelForCausalLM, AutoTokenizer

import deft
from deft.core import hardware
from deft.core.errors import (
    DeftError,
    InputError,
    NumbersError,
    Problems,
)
from deft.run import config
from deft.run.reading import Session
from deft.run.train import Run
from deft.run.train import train as run_config

PAIRS = [{"prompt": f"What is {n} + 2?", "completion": f" It is {n + 2}."} for n in range(24)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"].strip()},
        ]
    }
    for row in PAIRS
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def rows(tmp_path: Path, values: list[Any], name: str = "train.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def train(tmp_path: Path, model: Path, data: Any, **settings: Any) -> Run:
    given = {"epochs": 4, "batch": 8, "lr": 5e-3, "output": str(tmp_path / "run"), **settings}
    return deft.train(model, data, **given)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_what_design_says(tmp_path: Path, model: Path) -> None:
    run = train(tmp_path, model, rows(tmp_path, PAIRS))
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "config.yaml", "manifest.json", "ledger.json", "metrics.jsonl", "checkpoints", "final", "report.html",
    }  # fmt: skip
    metrics = lines(run.folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert [line["epoch"] for line in metrics] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert all(line["grad_norm"] > 0 and line["tokens"] > line["target_tokens"] > 0 for line in metrics)
    assert tuple(metrics) == run.metrics
    (ledger,) = json.loads((run.folder / "ledger.json").read_text())
    assert (ledger["rows"], ledger["fates"]["trained"]) == (24, 24)
    resolved = config.load(str(run.folder / "config.yaml"))
    precision = "bf16" if hardware.has_bf16(torch.device("cpu")) else "fp32"
    assert (resolved.max_length, resolved.device, resolved.precision) == (128, "cpu", precision)


def test_the_export_is_an_ordinary_model_that_answers_as_the_run_s_own(tmp_path: Path, model: Path) -> None:
    run = train(tmp_path, model, rows(tmp_path, PAIRS), epochs=30, lr=1e-2)
    loaded = AutoModelForCausalLM.from_pretrained(run.folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "final")
    prompt = tokenizer(PAIRS[3]["prompt"], return_tensors="pt")
    ids = loaded.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert re.fullmatch(r" It is \d+\.", text), "it learnt how to answer, and where to stop"
    command = [
        sys.executable,
        "-m",
        "deft",
        "generate",
        str(run.folder / "final"),
        PAIRS[3]["prompt"],
        "--set",
        "max_new_tokens=16",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.strip("\n") == text


def test_a_base_model_gets_the_plain_template_and_keeps_it(tmp_path: Path, model: Path) -> None:
    run = train(tmp_path, model, rows(tmp_path, CHATS))
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "final")
    text = tokenizer.apply_chat_template(CHATS[0]["messages"], tokenize=False)
    assert text == "<s>user: What is 0 + 2?\nassistant: It is 2.</s>\n"


def test_a_chat_s_stop_mark_ends_generation_in_the_export(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", chat_template=CHATML)
    run = train(tmp_path, model, rows(tmp_path, CHATS), epochs=1)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "final")
    generation = json.loads((run.folder / "final" / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation["eos_token_id"]
    assert tokenizer.eos_token_id in generation["eos_token_id"]


def test_trlx_s_call(tmp_path: Path, model: Path) -> None:
    seen: list[dict[str, Any]] = []

    def metric(samples: list[str], prompts: list[str], outputs: list[str], goal: list[int]) -> dict[str, list[float]]:
        seen.append({"outputs": outputs, "goal": goal})
        assert samples == [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
        return {"length": [float(len(output)) for output in outputs]}

    run = deft.train(
        model,
        samples=[["What is 2 + 2?", " It is 4."], ["And 3 + 3?", " It is 6.", " And 1 + 1?", " It is 2."]] * 4,
        eval_prompts=[{"prompt": "What is 2 + 2?", "goal": 4}, {"prompt": "And 3 + 3?", "goal": 6}],
        metric_fn=metric,
        stop_sequences=["."],
        evaluate__every=2,
        evaluate__generate={"max_new_tokens": 6, "temperature": [0.5, 1.0]},
        batch=4,
        epochs=2,
        output=str(tmp_path / "run"),
    )
    found = lines(run.folder / "eval.jsonl")
    assert [line["step"] for line in found] == [0, 2, 4]
    assert set(found[0]) == {"step", "metrics/length@temperature=0.5", "metrics/length@temperature=1.0"}
    assert len(lines(run.folder / "samples.jsonl")) == 3 * 2 * 2
    assert seen[0]["goal"] == [4, 6]
    assert all("." not in output for each in seen for output in each["outputs"])


def test_eos_is_learnt_where_it_is_also_the_pad_token(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    for row in (PAIRS[0], CHATS[0], "the cat"):
        (example,) = deft.encode([row], str(folder))
        assert example.labels[-1] == tokenizer.pad_token_id == tokenizer.eos_token_id
    run = train(tmp_path, folder, rows(tmp_path, PAIRS), epochs=1)
    assert sum(line["target_tokens"] for line in run.metrics) == sum(
        int((e.labels != -100).sum()) for e in deft.encode(PAIRS, str(folder))
    )


def test_a_model_that_cannot_be_loaded_leaves_no_folder(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"broken")
    assert "is cut off inside its header" in refusal(tmp_path, model, rows(tmp_path, PAIRS))
    assert not (tmp_path / "run").exists()


def test_plain_text_is_learnt_to_the_last_token(tmp_path: Path, model: Path) -> None:
    run = deft.train(
        model, samples=["the cat sat on the mat", "What is the capital of France? " * 40], output=str(tmp_path / "r")
    )
    (ledger,) = json.loads((run.folder / "ledger.json").read_text())
    assert ledger["examples"] > 2, "a text longer than the context becomes windows"
    assert ledger["longest"] == 128
    overlaps = ledger["examples"] - 2
    assert ledger["target_tokens"] == ledger["tokens"] - 2 - overlaps, "all but two BOS, and one token a window"


def test_held_out_rows_are_measured_and_never_trained(tmp_path: Path, model: Path) -> None:
    run = train(tmp_path, model, rows(tmp_path, PAIRS), data__eval=0.3, evaluate__every=4, batch=4)
    (ledger,) = json.loads((run.folder / "ledger.json").read_text())
    assert 0 < ledger["fates"]["held_out"] < 15
    assert ledger["fates"]["held_out"] + ledger["fates"]["trained"] == 24
    assert sum(line["tokens"] for line in run.metrics[: (len(run.metrics) // 4)]) < ledger["tokens"]
    losses = [line["loss"] for line in lines(run.folder / "eval.jsonl")]
    assert losses[-1] < losses[0]


def test_weights_of_zero_and_two_change_what_is_learnt(tmp_path: Path, model: Path) -> None:
    def chat(weight: float) -> dict[str, Any]:
        user, answer = CHATS[0]["messages"]
        return {"messages": [user, {**answer, "weight": weight}]}

    once, twice = (
        train(tmp_path, model, rows(tmp_path, [chat(w), *CHATS[1:3]]), epochs=1, output=str(tmp_path / str(w)))
        for w in (1, 2)
    )
    assert once.metrics[0]["loss"] != twice.metrics[0]["loss"]
    none = train(tmp_path, model, rows(tmp_path, [chat(0), *CHATS[1:3]]), epochs=1, output=str(tmp_path / "none"))
    assert json.loads((none.folder / "ledger.json").read_text())[0]["fates"]["no_target"] == 1


def test_the_same_seed_gives_the_same_bits(tmp_path: Path, model: Path) -> None:
    data = rows(tmp_path, PAIRS)
    runs = [train(tmp_path, model, data, output=str(tmp_path / name), dropout="config") for name in "ab"]
    assert [line["loss"] for line in runs[0].metrics] == [line["loss"] for line in runs[1].metrics]
    other = train(tmp_path, model, data, output=str(tmp_path / "c"))
    assert [line["loss"] for line in other.metrics] != [line["loss"] for line in runs[0].metrics], "dropout is on above"


def test_dropout_is_off_unless_it_is_asked_for(tmp_path: Path, model: Path) -> None:
    """The model's configuration names dropout; another model is the same without it."""
    other = shutil.copytree(model, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.0}))
    assert settings["attention_dropout"] > 0

    def losses(name: str, folder: Path, **given: Any) -> list[float]:
        run = train(tmp_path, folder, rows(tmp_path, PAIRS), epochs=1, output=str(tmp_path / name), **given)
        return [line["loss"] for line in run.metrics]

    without = losses("a", other)
    assert losses("b", model) == without
    assert losses("c", model, dropout="config") != without


def test_bf16_compute_trains_the_fp32_masters(tmp_path: Path, model: Path) -> None:
    run = train(tmp_path, model, rows(tmp_path, PAIRS), precision="bf16")
    exported = AutoModelForCausalLM.from_pretrained(run.folder / "final")
    assert next(exported.parameters()).dtype == torch.float32, "in the base's dtype"
    assert run.metrics[-1]["loss"] < 0.8 * run.metrics[0]["loss"]


def test_a_bf16_base_gives_a_bf16_model(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "half", dtype=torch.bfloat16)
    run = train(tmp_path, model, rows(tmp_path, PAIRS), epochs=1)
    assert json.loads((run.folder / "final" / "config.json").read_text())["dtype"] == "bfloat16"


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_rows(tmp_path: Path, model: Path) -> None:
    with pytest.raises(
        NumbersError, match=r"not finite at step 2, rows .*train\.jsonl:\d+.*weights unchanged; replay: deft replay"
    ) as error:
        train(tmp_path, model, rows(tmp_path, PAIRS), lr=1e30, optimizer__clip=None)
    assert error.value.exit_code == 5


def refusal(tmp_path: Path, model: Any, data: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        train(tmp_path, model, data, **settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    return str(error.value)


def test_refused_rows_stop_the_run_unless_their_number_is_allowed(tmp_path: Path, model: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "Hi"}]}
    data = rows(tmp_path, [*CHATS, bad])
    assert re.search(
        r"allow_refused=1.*\n.*train\.jsonl:25: messages: no assistant message", refusal(tmp_path, model, data)
    )
    run = train(tmp_path, model, data, data__allow_refused=1)
    assert json.loads((run.folder / "ledger.json").read_text())[0]["fates"]["refused"] == 1


def test_everything_wrong_comes_at_once(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.txt").write_text("x")
    message = refusal(tmp_path, "no/such/model", "no.jsonl", output=str(tmp_path / "full"), loss__name="nil")
    for part in ("no/such/model", "no.jsonl: no such file", "not empty", "did you mean 'nll'"):
        assert part in message, message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 4096}, "max_length: 4096 is more than the model's 128 positions"),
        ({"device": "cuda:7"}, "device: 'cuda:7' is not on this machine"),
        ({"evaluate__prompts": [3]}, "evaluate.prompts"),
        ({"evaluate__generate": {"temprature": 1}}, "temperature"),
        ({"overflow": "error", "max_length": 8}, "24 rows are too long"),
        ({"overflow": "drop", "max_length": 8}, "no row is left"),
        ({"template": "nothing.jinja"}, "no chat template there"),
    ],
)
def test_what_cannot_work_is_said_before_the_model_loads(
    tmp_path: Path, model: Path, settings: dict[str, Any], message: str
) -> None:
    assert message in refusal(tmp_path, model, rows(tmp_path, PAIRS), **settings)


def test_rows_without_a_learnt_token_stop_a_run_only_when_none_is_left(tmp_path: Path, model: Path) -> None:
    silent = {"messages": [CHATS[0]["messages"][0], {**CHATS[0]["messages"][1], "weight": 0}]}
    assert "no learnt token" in refusal(tmp_path, model, rows(tmp_path, [silent]))


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refusal(tmp_path, model, rows(tmp_path, PAIRS), output=str(tmp_path / "file" / "run"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "deft", *arguments], capture_output=True, text=True, check=False)


def test_the_command_prints_one_message_and_exits_2(tmp_path: Path, model: Path) -> None:
    done = command("train", f"model={model}", f"data={tmp_path / 'none.jsonl'}", f"output={tmp_path / 'run'}")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "none.jsonl: no such file" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_trains_and_a_yaml_file_does_the_same(tmp_path: Path, model: Path) -> None:
    data = rows(tmp_path, PAIRS)
    settings = {"model": str(model), "data": data, "epochs": 1, "output": str(tmp_path / "a")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    first = command("train", str(tmp_path / "run.yaml"))
    assert first.returncode == 0, first.stderr
    second = command("train", f"model={model}", f"data.train={data}", "epochs=1", f"output={tmp_path / 'b'}")
    assert second.returncode == 0, second.stderr
    a, b = (lines(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert [line["loss"] for line in a] == [line["loss"] for line in b]
    assert "prompt_completion, 24 rows" in second.stdout
    assert "step 1/1" in second.stdout, "plain lines where there is no terminal"
    assert "Loading weights" not in second.stderr


@pytest.mark.parametrize(("data", "code"), [("train.jsonl", 0), ("none.jsonl", 2)])
@pytest.mark.parametrize("where", ["a pipe without a reader", "a full disk"])
def test_a_run_outlives_what_its_words_go_to(where: str, data: str, code: int, tmp_path: Path, model: Path) -> None:
    rows(tmp_path, PAIRS)
    line = [sys.executable, "-m", "deft", "train", f"model={model}", f"data={tmp_path / data}", "epochs=1"]
    line.append(f"output={tmp_path / 'run'}")
    if where == "a full disk":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        with open("/dev/full", "w") as full:
            done = subprocess.run(line, stdout=full, stderr=full, check=False)
            assert done.returncode == code
    else:
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
            assert process.wait(timeout=600) == code
    assert (tmp_path / "run" / "final").is_dir() == (code == 0)


def test_data_and_samples_are_not_given_together(model: Path) -> None:
    with pytest.raises(DeftError, match="data or samples"):
        deft.train(model, "a.jsonl", samples=["a"])


def test_a_caller_s_console_gets_what_is_said(tmp_path: Path, model: Path) -> None:
    from io import StringIO

    from rich.console import Console

    said = StringIO()
    made = config.make(
        {"model": str(model), "data": rows(tmp_path, CHATS), "epochs": 1, "output": str(tmp_path / "run")}
    )
    run_config(made, Session(console=Console(file=said, width=200)))
    for part in (
        "messages, 24 rows (24 trained)",
        "deft's plain template",
        "step 1/1",
        "reloaded by plain transformers",
    ):
        assert part in said.getvalue()
    assert isinstance(Problems("x", []), InputError)


def test_the_model_of_a_run_answers_without_dropout(tmp_path: Path, model: Path) -> None:
    run = train(tmp_path, model, rows(tmp_path, PAIRS), dropout="config", epochs=1)
    assert not run.model.training
