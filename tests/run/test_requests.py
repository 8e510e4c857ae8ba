"""A request is done, or refused with the way to it: finished runs, keys and values, paths, evaluation, refused rows."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import write_llama
from tiny_tokenizers import CHATML

import deft
from deft.core.config import as_meant
from deft.core.errors import InputError, Problem, Problems, grouped
from deft.run import config, prepare
from deft.run.other_names import NO_KEY, OTHER_NAMES, OTHER_VALUES, TAKES
from deft.run.reading import Session
from deft.run.train import Run
from deft.run.train import train as run_config

PAIRS = [{"prompt": f"What is {n} + 2?", "completion": f" It is {n + 2}."} for n in range(12)]
MINIMAL = ["model=m", "data=a.jsonl"]


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """What a run needs."""
    return {
        "model": str(write_llama(tmp_path / "model")),
        "data": written(tmp_path / "train.jsonl", PAIRS),
        "output": str(tmp_path / "run"),
        "epochs": 1,
        "batch": {"examples": 6},
        "device": "cpu",
    }


def train(settings: dict[str, Any], **more: Any) -> tuple[Run, str]:
    """A run and what it said."""
    said = io.StringIO()
    run = run_config(made(settings, **more), Session(console=Console(file=said, width=200)))
    return run, said.getvalue()


def made(settings: dict[str, Any], **more: Any) -> config.Config:
    return config.make(config.nested({**settings, **more}))


def refusal(settings: dict[str, Any], **more: Any) -> str:
    with pytest.raises(InputError) as error:
        train(settings, **more)
    return str(error.value)


# A finished run


def test_a_finished_run_is_there_for_its_own_request_alone(given: dict[str, Any], tmp_path: Path) -> None:
    run, _ = train(given)
    weights = (run.folder / "final" / "model.safetensors").read_bytes()
    again, said = train(given, microbatch_tokens=512, checkpoint__every=1)
    assert again.metrics == run.metrics
    assert "finished at step 2; name another output= to train again" in said

    other = write_llama(tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    message = refusal(given, model=str(other), seed=5, optimizer__lr=1e-2)
    assert "finished at step 2, and this asks for something else; name another output=" in message
    for line in ("seed: 0 -> 5", "optimizer.lr: 1e-05 -> 0.01", f"model: {given['model']} -> {other} changed"):
        assert f"  {line}" in message
    assert "model=" in message.splitlines()[0], "what is trained in another way begins anew"

    again, _ = train(given, data=os.path.join(tmp_path, ".", "train.jsonl"))
    assert again.metrics == run.metrics, "a path that is written otherwise is no other request"
    written(tmp_path / "train.jsonl", [*PAIRS[:-1], {"prompt": "a", "completion": "b"}])
    assert f"  {given['data']}: " in refusal(given)
    assert (run.folder / "final" / "model.safetensors").read_bytes() == weights


def test_the_same_files_in_other_places_are_another_request(given: dict[str, Any], tmp_path: Path) -> None:
    other = written(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    train(given, data={"train": given["data"], "eval": other})
    message = refusal(given, data={"train": other, "eval": given["data"]})
    assert f"  data: {given['data']}, {other} -> {other}, {given['data']}" in message
    assert "mv " not in message


def test_more_epochs_of_a_finished_run_come_with_the_command_that_trains_on(given: dict[str, Any]) -> None:
    run, _ = train(given)
    message = refusal(given, epochs=2)
    assert "  epochs: 1 -> 2" in message
    assert f"mv {run.folder}/final {run.folder}/final-2, and run this again" in message
    (run.folder / "final").rename(run.folder / "final-2")
    longer, said = train(given, epochs=2)
    assert len(longer.metrics) == 4
    assert "resumed step 2 of 4" in said
    assert (run.folder / "final" / "config.json").is_file()


def test_rows_in_memory_and_prompts_of_a_file_count_as_well(given: dict[str, Any], tmp_path: Path) -> None:
    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
    usual = {key: given[key] for key in ("output", "epochs", "device")}
    asked = {**usual, "eval_prompts": prompts, "evaluate__generate": {"max_new_tokens": 2}}
    samples = [["p", "o"], ["q", "r"]]
    deft.train(given["model"], samples=samples, **asked)
    deft.train(given["model"], samples=samples, **asked)
    with pytest.raises(Problems, match="rows: "):
        deft.train(given["model"], samples=[*samples, ["s", "t"]], **asked)
    written(tmp_path / "prompts.jsonl", [{"prompt": "Hello"}])
    with pytest.raises(Problems, match="prompts: "):
        deft.train(given["model"], samples=samples, **asked)


# The best checkpoint


def test_keep_best_exports_the_best_checkpoint_and_says_which(given: dict[str, Any], tmp_path: Path) -> None:
    other = [{"prompt": f"z{n}", "completion": f" quite another thing {n}"} for n in range(4)]
    data = {"train": given["data"], "eval": written(tmp_path / "eval.jsonl", other)}
    best = {"checkpoint__every": 2, "checkpoint__keep_best": 1}
    asked = {**given, "data": data, "epochs": 6, "optimizer__lr": 5e-2, "schedule__name": "constant"}
    run, said = train({**asked, **best, "checkpoint__keep": 1, "precision": "fp32"})
    losses = {line["step"]: line["loss"] for line in map(json.loads, (run.folder / "eval.jsonl").open())}
    saved = {step: loss for step, loss in losses.items() if step}
    step = min(saved, key=saved.__getitem__)
    assert step < 12, "the last step is not the best here"
    assert f"final: step {step} of 12, the best checkpoint by held-out loss: {losses[step]:.4f}" in said
    weights = load_file(run.folder / "final" / "model.safetensors")
    kept = load_file(run.folder / "checkpoints" / f"step-{step:06d}" / "model-00001.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, kept[f"weight.{name}"]), name
    assert f"step {step} of 12" in (run.folder / "final" / "README.md").read_text()
    assert json.loads((run.folder / "final" / "manifest.json").read_text())["about"]["step"] == step
    assert torch.equal(run.model.get_input_embeddings().weight, weights["model.embed_tokens.weight"])


def test_a_model_of_any_kept_step_can_be_had(given: dict[str, Any]) -> None:
    run, _ = train(given, checkpoint__every=1)
    with pytest.raises(InputError, match=r"is a checkpoint of a run, not a model; .*resume=step-000001 steps=1"):
        train(given, model=str(run.folder / "checkpoints" / "step-000001"))
    (run.folder / "final").rename(run.folder / "final-2")
    first, said = train(given, checkpoint__every=1, resume="step-000001", steps=1)
    assert "resumed step 1 of 1" in said
    assert len(first.metrics) == 1
    assert (run.folder / "final" / "config.json").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "no row is held out; set data.eval"),
        ({"data__eval": 1e-6}, "no row is held out by data.eval=1e-06; raise it"),
        ({"checkpoint__every": None}, "keep_best: the best is one of the checkpoints"),
    ],
)
def test_a_best_checkpoint_needs_evaluation_and_checkpoints(given: dict[str, Any], more: Any, said: str) -> None:
    share = more.pop("data__eval", 0.0)
    data = {"train": given["data"], "eval": share}
    assert said in refusal({**given, "data": data}, checkpoint__keep_best=1, **more)


# What has no effect


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data": {"eval": 1e-6}}, "data.eval=1e-06 holds out none of 12 rows"),
        ({"steps": 100}, "steps=100, and epochs=1 has 2: the run ends there; epochs=50 has them all"),
        ({"schedule__warmup": 10}, "schedule.warmup=10 steps, and the run has 2"),
        ({"evaluate__every": 5}, "evaluate.every=5, and there is nothing to evaluate"),
        ({"checkpoint__every": 2, "checkpoint__keep_every": 3}, "checkpoint.keep_every=3 keeps none"),
        ({"template": "chatml"}, "template has no effect: no row goes through a chat template"),
        ({"truncation_side": "left"}, "truncation_side has no effect: overflow is turns, not cut"),
        ({"schedule__decay": 0.5}, "schedule.decay has no effect: schedule.name is cosine"),
        ({"evaluate__generate": {"top_p": 0.5, "do_sample": True}}, "evaluate.generate has no effect"),
    ],
)
def test_a_setting_without_an_effect_is_a_warning(given: dict[str, Any], more: Any, said: str) -> None:
    if "data" in more:
        more = {"data": {"train": given["data"], **more["data"]}}
    told = io.StringIO()
    prepare.prepare(made(given, **more), Session(console=Console(file=told, width=200)))
    assert f"warning: {said}" in told.getvalue()


def test_what_lies_in_a_folder_and_is_not_read_is_named(given: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl.bak", "c.zip", "README.md"):
        written(folder / name, PAIRS)
    told = io.StringIO()
    prepare.prepare(made(given, data=str(folder)), Session(console=Console(file=told, width=200)))
    assert f"warning: {folder}: 2 of what lies there is not read: b.jsonl.bak, c.zip; " in told.getvalue()


def test_a_run_without_such_settings_is_told_nothing(given: dict[str, Any]) -> None:
    told = io.StringIO()
    prepare.prepare(made(given), Session(console=Console(file=told, width=200)))
    assert "warning" not in told.getvalue()


def test_a_share_that_holds_out_all_rows_is_the_reason(given: dict[str, Any]) -> None:
    message = refusal(given, data={"train": given["data"], "eval": 0.9999999})
    assert "data.eval=0.9999999 holds out all 12 rows; a smaller share does not" in message
    assert len(message.splitlines()) == 1


# Keys and values


def problems(*overrides: str) -> list[str]:
    with pytest.raises(Problems) as error:
        config.load(None, [*MINIMAL, *overrides])
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("dropout=off", "dropout", "off"),
        ("dropout=false", "dropout", "off"),
        ("dropout=no", "dropout", "off"),
        ("optimizer.clip=0", "optimizer.clip", None),
        ("optimizer.clip=off", "optimizer.clip", None),
        ("optimizer.clip=none", "optimizer.clip", None),
        ("checkpoint.every=0", "checkpoint.every", None),
        ("evaluate.every=off", "evaluate.every", None),
        ("checkpoint.keep_best=off", "checkpoint.keep_best", 0),
        ("resume=false", "resume", "never"),
        ("resume=on", "resume", "auto"),
        ("steps=1e3", "steps", 1000),
        ("steps=None", "steps", None),
        ("data.eval=2%", "data.eval", 0.02),
        ("data.eval=off", "data.eval", 0.0),
        ("data.eval=null", "data.eval", 0.0),
        ("schedule.warmup=3%", "schedule.warmup", 0.03),
        ("output=None", "output", None),
        ("data.learn_reasoning=off", "data.learn_reasoning", False),
    ],
)
def test_a_value_is_taken_as_it_is_meant_from_a_line_and_a_file(
    override: str, key: str, value: Any, tmp_path: Path
) -> None:
    head, _, last = key.rpartition(".")
    text = override.partition("=")[2]
    file = tmp_path / "run.yaml"
    section = (
        "data: {train: a.jsonl, " if head == "data" else f"data: a.jsonl\n{head}: {{" if head else "data: a.jsonl\n"
    )
    file.write_text(f"model: m\n{section}{last}: {text}{'}' if head else ''}\n")
    for found in (config.load(None, [*MINIMAL, override]), config.load(str(file))):
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("optimizer.clip=-1", "null: no clipping"),
        ("epochs=0.5", "steps=..., or times: 0.5 of a source"),
        ("epochs=-1", "a whole number from 1 on"),
        ("epochs=true", "should be a number, not True"),
        ("evaluate.every=yes", "should be a number, not True"),
        ("steps=-1", "null: as many as the epochs have"),
        ("seed=null", "leave it out for 0"),
        ("resume=checkpoint-500", "auto, never, or step-000400"),
        ("schedule.name=constant_with_warmup", "name: constant, with schedule.warmup"),
        ("schedule=5", "a mapping such as {name: cosine"),
        ("batch=32", "a mapping such as {examples: 32}"),
        ("precision=fp16", "bf16 or fp32"),
        ("max_length=off", "null: 2048, or what the model can take"),
        ("output=[a]", "in quotes where it looks like a number or a date"),
        ("data.eval=200", "a share such as 0.02 or 2%"),
        ("optimizer__lr=1", "did you mean 'optimizer.lr'?"),
        ("learnig_rate=1", "did you mean 'optimizer.lr'?"),
        ("per-device-train-batch-size=1", "deft calls it batch.examples"),
        ("gradient_checkpointing=true", "leave it out"),
        ("lora_r=16", "deft calls it adapter.r"),
    ],
)
def test_what_is_not_taken_comes_with_the_way_out(override: str, way_out: str) -> None:
    (problem,) = problems(override)
    assert way_out in problem


def test_every_name_in_the_tables_leads_to_a_key_of_ours_or_has_a_reason() -> None:
    known = {*config.keys()}
    assert {ours.partition(" (")[0] for ours in OTHER_NAMES.values()} <= known
    assert {*TAKES, *OTHER_VALUES} <= known
    assert not NO_KEY.keys() & {*OTHER_NAMES, *known}
    assert all(NO_KEY.values())


def test_a_number_is_no_switch() -> None:
    assert as_meant("1e3", int | None) == 1000
    assert as_meant("1.5", int) == "1.5"
    with pytest.raises(ValueError, match="a number"):
        as_meant("on", float | None)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run.yaml", "model: m\noptimizer:\n  lr: 1\n  eps: 1\n  lr: 2\n", "'lr' stands twice, in lines 3 and 5"),
        ("run.yaml", "data: a\nmodel: m\ndata: b\n", "'data' stands twice, in lines 1 and 3"),
        (
            "run.toml",
            "[loss]\nname = 'a'\n[optimizer]\nname = 'b'\nname = 'c'\n",
            "'name' stands twice, in lines 4 and 5",
        ),
        ("run.toml", "model = 'm'\n[loss]\n[loss]\n", "'[loss]' stands twice, in lines 2 and 3"),
        ("run.toml", "model = 'm'\nmodel = 'n'", "'model' stands twice, in lines 1 and 2"),
    ],
)
def test_a_key_twice_in_a_file_is_an_error_with_both_lines(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: the key .*{said.partition(' ')[2]}") as error:
        config.load(str(tmp_path / name))
    assert said in str(error.value)


def test_a_merged_key_of_yaml_is_no_key_twice(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: m\ndata: {train: [&a {path: a, times: 2}, {<<: *a, path: b}]}\nbatch: {examples: 4}\n"
    )
    assert [each.times for each in config.load(str(tmp_path / "run.yaml")).data.train] == [2, 2]


def test_a_key_twice_on_the_command_line_is_refused_for_lists_and_told_elsewhere() -> None:
    told: list[str] = []
    found = config.load(None, [*MINIMAL, "epochs=1", "epochs=3"], told.append)
    assert found.epochs == 3
    assert told == ["epochs: given twice, 1 and 3; the last is taken"]
    for settings in (["data.train=b"], ["data={train: b}"], ["data=b"], ["data.train=[b]", "data.train=c"]):
        with pytest.raises(InputError, match=r"data\.train: given twice, 'a\.jsonl' and .*\[a, b\] is a list"):
            config.load(None, [*MINIMAL, *settings])
    with pytest.raises(InputError, match=r"optimizer\.lr: given twice, 1 and 2"):
        config.load(None, [*MINIMAL, "optimizer={lr: 1}", "optimizer.lr=2"])
    found = config.load(None, ["model=m", "data.eval=0.1", "data=a.jsonl"])
    assert (found.data.train[0].path, found.data.eval) == ("a.jsonl", 0.1), "the order of keys does not matter"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "x"], "--output: no such option; write output=x"),
        (["--epochs=3"], "--epochs=3: no such option; write epochs=3"),
        (["--learning-rate", "1e-5"], "settings are written key=value; deft calls it optimizer.lr"),
        (["output", "=", "x"], "write it without spaces"),
    ],
)
def test_an_option_of_another_command_line_is_told_how_it_is_written(arguments: list[str], said: str) -> None:
    from deft.commands import cli

    with pytest.raises(InputError) as error:
        cli._config(["model=m", "data=a.jsonl", *arguments])
    assert said in str(error.value)


def test_such_an_option_does_not_end_in_the_parser() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deft", "train", "a.jsonl", "model=m", "--output", "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "deft: --output: no such option; write output=x\n")


# Paths


def test_the_users_folder_is_meant_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = config.make(
        {
            "model": "~/m",
            "data": {"train": ["~/a.jsonl", {"path": "~/b"}], "eval": "~/c"},
            "template": "~/t.jinja",
            "output": Path("~/run"),
            "evaluate": {"prompts": "~/p.jsonl"},
        }
    )
    named = [found.model, *(source.path for source in (*found.data.train, *found.data.eval))]  # type: ignore[misc]
    named += [found.template, str(found.output), str(found.evaluate.prompts)]
    inside = ["m", "a.jsonl", "b", "c", "t.jinja", "run", "p.jsonl"]
    assert named == [os.path.join(tmp_path, name) for name in inside]
    assert config.load(None, ["model=~/m", "data=~/a"]).data.train[0].path == f"{tmp_path}/a"


# Refused rows


REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(number: int, *before: dict[str, str]) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": f"It is {number}."}]
    return {"messages": [*before, *turns]}


def test_rows_that_a_template_refuses_name_the_setting_that_lets_them_pass(tmp_path: Path, given: Any) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [chat(n) if n % 2 else chat(n, system) for n in range(240)]
    rows[201]["messages"][1]["role"] = "asistant"
    given |= {"data": written(tmp_path / "chats.jsonl", rows)}
    given["model"] = str(write_llama(tmp_path / "chat", chat_template=REFUSES_SYSTEM))
    heading, refused, misspelt = refusal(given).splitlines()
    assert heading == "121 rows are refused (data.allow_refused=121 trains without them):"
    assert "chats.jsonl:1: the chat template refuses this conversation: no system message here" in refused
    assert "; template=chatml or data.render=raw lets it pass (and 119 more: " in refused
    assert "chats.jsonl:202: messages[1].role: 'asistant' is not a role" in misspelt
    _, said = train(given, data={"train": given["data"], "allow_refused": 1}, template="chatml", steps=1)
    assert "239 trained" in said


def test_rows_that_are_too_long_name_the_length_or_the_overflow(tmp_path: Path, given: Any) -> None:
    given |= {"data": written(tmp_path / "chats.jsonl", [chat(n) for n in range(8)])}
    given["model"] = str(write_llama(tmp_path / "chat", chat_template=CHATML))
    heading, long = refusal(given, max_length=12, overflow="error").splitlines()
    assert heading == "8 rows are too long (overflow: error):"
    setting = long.partition("; ")[2].partition(" ")[0]
    key, _, value = setting.partition("=")
    assert key == "max_length"
    assert "(and 7 more: " in long
    prepare.prepare(made(given, max_length=int(value), overflow="error"), Session(console=Console(quiet=True)))


def test_a_problem_of_many_rows_is_one_line_and_keys_stay_apart() -> None:
    same = [Problem(f"a.jsonl:{line}", f"messages[{line}]: 'so {line} it is' is dropped") for line in range(1, 1001)]
    (found,) = grouped(same)
    assert (found.where, found.others) == ("a.jsonl:1", 999)
    assert str(Problems("bad:", same)).count("\n") == 1
    apart = [Problem("lora_r", "unknown key"), Problem("lora_alpha", "unknown key"), Problem("a.jsonl:3", "other")]
    assert grouped(apart) == apart
    roles = [Problem("a.jsonl:1", "'asistant' is not a role"), Problem("a.jsonl:2", "'robot' is not a role")]
    assert grouped(roles) == roles
