"""What a run has written is set aside and never removed, used as it was verified, and leads nowhere outside."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import write_llama
from tiny_tokenizers import CHATML

from deft.commands.chat import run_generate
from deft.core import lock
from deft.core.errors import DamagedError, DiskError, InputError, NumbersError, Problems
from deft.run import build, config
from deft.run import folder as run_folder
from deft.run.reading import Session
from deft.run.train import Run
from deft.run.train import train as run_config
from deft.tracking import report
from deft.tracking.jsonl import Logs
from deft.training import checkpoint

PAIRS = [{"prompt": f"What is {n} + 2?", "completion": f" It is {n + 2}."} for n in range(8)]


def train(settings: dict[str, Any], **more: Any) -> tuple[Run, str]:
    said = io.StringIO()
    made = config.make(config.nested({**settings, **more}))
    return run_config(made, Session(console=Console(file=said, width=300))), said.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a run of two steps, each saved, and its settings."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    settings = {
        "model": str(write_llama(folder / "model")),
        "data": str(folder / "train.jsonl"),
        "epochs": 1,
        "batch": {"examples": 4},
        "checkpoint": {"every": 1},
        "device": "cpu",
        "precision": "fp32",
    }
    train(settings, output=str(folder / "run"))
    return folder, settings


@pytest.fixture
def given(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """The settings, and a copy of the run to do with as one likes."""
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    return {**finished[1], "output": str(tmp_path / "run")}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# Set aside, never removed


def test_a_run_in_a_folder_with_another_s_end_sets_it_aside(given: dict[str, Any], tmp_path: Path) -> None:
    run, left = tmp_path / "run", weights(tmp_path / "run" / "final")
    for path in run.iterdir():
        if path.name not in ("final", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = (run / "metrics.jsonl").read_text()
    _, said = train(given, seed=5, optimizer__lr=1e-3)
    assert "final as final.aside, metrics.jsonl as metrics.jsonl.aside; this run begins anew" in said
    assert all(torch.equal(tensor, left[key]) for key, tensor in weights(run / "final.aside").items())
    assert (run / "metrics.jsonl.aside").read_text() == log
    assert any(not torch.equal(tensor, left[key]) for key, tensor in weights(run / "final").items())
    assert "finished at step 2" in train(given, seed=5, optimizer__lr=1e-3)[1]


def test_a_longer_run_sets_the_end_before_aside_when_it_goes_on(given: dict[str, Any], tmp_path: Path) -> None:
    run, left = tmp_path / "run", weights(tmp_path / "run" / "final")
    (run / "report.html").unlink()
    _, said = train(given, epochs=2)
    assert "final: is of an earlier end, and is set aside as final.aside" in said
    assert all(torch.equal(tensor, left[key]) for key, tensor in weights(run / "final.aside").items())
    assert json.loads((run / "final" / "manifest.json").read_text())["about"]["step"] == 4


def test_an_end_that_was_whole_is_used_and_a_damaged_one_is_written_again(
    given: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "report.html").unlink()
    inode = (run / "final" / "model.safetensors").stat().st_ino
    assert "aside" not in train(given)[1]
    assert (run / "final" / "model.safetensors").stat().st_ino == inode
    (run / "report.html").unlink()
    flip(run / "final" / "model.safetensors")
    assert "final: is not what this run makes, and is set aside as final.aside" in train(given)[1]
    assert "finished at step 2" in train(given)[1]


def test_the_beginnings_of_this_very_run_stay_and_a_user_s_own_file_is_set_aside(tmp_path: Path) -> None:
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / name).write_text("epochs: 1\n")
    assert run_folder.begin_anew(tmp_path, "epochs: 1\n") == []
    (said,) = run_folder.begin_anew(tmp_path, "epochs: 2\n")
    assert "config.yaml as config.yaml.aside, manifest.json as manifest.json.aside" in said
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml.aside", "manifest.json.aside"}


def test_a_run_that_goes_back_keeps_the_logs_of_what_came_after(given: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    log = (run / "metrics.jsonl").read_text()
    shutil.move(run / "final", run / "final-2")
    train(given, resume="step-000001")
    assert (run / "metrics.jsonl.aside").read_text() == log
    assert (run / "checkpoints" / "step-000002.aside").is_dir()


# Another's folder


def test_a_run_whose_folder_another_has_made_anew_ends_and_writes_nothing(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain = tmp_path / "new", Logs.write

    def write(logs: Logs, kind: str, record: Any) -> None:
        if kind == "step" and record["step"] == 1:
            run.rename(tmp_path / "moved")
            run.mkdir()
            (run / lock.NAME).write_text('{"pid": 1}')
        plain(logs, kind, record)

    monkeypatch.setattr(Logs, "write", write)
    with pytest.raises(DiskError, match="new: was removed or replaced while the run went on"):
        train({**given, "output": str(run)})
    assert {path.name: path.read_text() for path in run.iterdir()} == {lock.NAME: '{"pid": 1}'}


# Links


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "checkpoints", "final", "config.yaml"])
def test_a_link_in_the_place_of_a_file_of_the_run_s_is_refused_by_name(
    name: str, given: dict[str, Any], tmp_path: Path
) -> None:
    outside, run = tmp_path / "outside", tmp_path / "new"
    run.mkdir()
    outside.mkdir() if name in run_folder.FOLDERS else outside.write_text("mine")
    (run / name).symlink_to("../outside")
    with pytest.raises(InputError, match=rf"new/{name}: is a link, and the run has its own there"):
        train({**given, "output": str(run)})
    assert outside.is_dir() or outside.read_text() == "mine"
    assert [path.name for path in run.iterdir()] == [name]


def test_a_model_folder_whose_link_leads_out_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    model = shutil.copytree(given["model"], tmp_path / "model")
    (tmp_path / "secret").write_text("{}")
    (model / "preprocessor_config.json").symlink_to("../secret")
    with pytest.raises(Problems, match=r"preprocessor_config\.json: is a link that leads out of the model's folder"):
        train({**given, "model": str(model), "output": str(tmp_path / "new")})


# Used as verified


def test_a_finished_run_says_so_of_what_is_as_it_was_written(given: dict[str, Any], tmp_path: Path) -> None:
    final = tmp_path / "run" / "final"
    (final / "README.md").write_text("a model card of mine")
    run, said = train(given)
    assert "finished at step 2" in said
    flip(final / "model.safetensors")
    uses: tuple[Callable[[], Any], ...] = (
        lambda: train(given),
        lambda: run.save_pretrained(tmp_path / "copy"),
        lambda: run.model,
        lambda: run.tokenizer,
        lambda: run_generate(final, ["hi"], generate={"max_new_tokens": 1}),
        lambda: train({**given, "model": str(final), "output": str(tmp_path / "next")}),
    )
    for use in uses:
        with pytest.raises(DamagedError, match=r"model\.safetensors: checksum differs"):
            use()
    assert not (tmp_path / "copy").exists()
    (final / "manifest.json").unlink()
    run_generate(final, ["hi"], generate={"max_new_tokens": 1})


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "special_tokens_map.json", "pytorch_model.bin", "additional_chat_templates/a.jinja"]
)
def test_a_file_that_was_put_into_final_since_is_named(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    final = tmp_path / "run" / "final"
    (final / "notes").write_text("mine")
    assert "finished at step 2" in train(given)[1]
    (final / name).parent.mkdir(exist_ok=True)
    (final / name).write_text("{}")
    for use in (lambda: train(given), lambda: run_generate(final, ["hi"], generate={"max_new_tokens": 1})):
        with pytest.raises(DamagedError, match=rf"final/{name}: was not there when deft wrote the folder"):
            use()


def test_a_byte_of_a_checkpoint_that_changes_before_it_is_used_changes_nothing(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is one block, which has been read."""
    run, plain, honest = tmp_path / "run", checkpoint.find, weights(tmp_path / "run" / "final")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000002")

    def find(*asked: Any) -> Any:
        found = plain(*asked)
        for part in ("model", "optimizer"):
            flip(run / "checkpoints" / "step-000001" / f"{part}-00001.safetensors")
        return found

    monkeypatch.setattr(checkpoint, "find", find)
    train(given)
    assert all(torch.equal(tensor, honest[key]) for key, tensor in weights(run / "final").items())


def test_any_byte_of_the_base_that_has_changed_since_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    model = shutil.copytree(given["model"], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "more": torch.zeros(2**20)}, model / "model.safetensors", {"format": "pt"})
    asked = {**given, "model": str(model), "output": str(tmp_path / "new"), "adapter": {"r": 2}}
    train(asked)
    shutil.rmtree(tmp_path / "new" / "final")
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(bytes(2**20)) + 2**20 + 100_001] = 1
    path.write_bytes(data)
    with pytest.raises(Problems, match="model: its files changed since step 2"):
        train(asked)


def test_a_base_that_changes_while_the_run_goes_on_is_not_carried_on(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = shutil.copytree(given["model"], tmp_path / "model"), Logs.write
    asked = {**given, "model": str(model), "output": str(tmp_path / "new")}
    text = (model / "config.json").read_text()

    def write(logs: Logs, kind: str, record: Any) -> None:
        (model / "config.json").write_text(text.replace('"max_position_embeddings": ', '"max_position_embeddings": 1'))
        plain(logs, kind, record)

    monkeypatch.setattr(Logs, "write", write)
    with pytest.raises(InputError, match=r"model/config\.json: is another file than when the run began; put it back"):
        train(asked)
    monkeypatch.undo()
    assert not (tmp_path / "new" / "final").exists()
    (model / "config.json").write_text(text)
    assert "resumed step 2 of 2" in train(asked)[1]
    assert (tmp_path / "new" / "final").is_dir()


def test_a_run_does_not_begin_with_what_it_would_set_aside(given: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Problems, match="run/final lies where this run would write its own; name another output="):
        train({**given, "model": str(run / "final")})
    assert (run / "final").is_dir()


@pytest.mark.parametrize("adapter", [None, {"r": 2}])
def test_fp32_weights_among_others_in_bf16_keep_their_bits(
    adapter: dict[str, Any] | None, given: dict[str, Any], tmp_path: Path
) -> None:
    model = shutil.copytree(given["model"], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors = {
        name: each.bfloat16() if "proj" in name else each + 2**-20 * torch.rand(each.shape)
        for name, each in tensors.items()
    }
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    asked = {**given, "model": str(model), "output": str(tmp_path / "new"), "adapter": adapter}
    train(asked, optimizer__lr=1e-30, precision="bf16", export={"dtype": "fp32"})
    found = weights(tmp_path / "new" / "final")
    assert all(torch.equal(found[name], each.float()) for name, each in tensors.items())


def test_losses_of_other_held_out_rows_do_not_compare(given: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "new"
    for name, completion in (("easy.jsonl", " It is 2."), ("hard.jsonl", "zq#@!" * 9)):
        (tmp_path / name).write_text(json.dumps({"prompt": "What is 1 + 2?", "completion": completion}) + "\n")
    asked = {**given, "output": str(run), "checkpoint": {"every": 1, "keep": 1, "keep_best": 1}}
    train(asked, data__eval=str(tmp_path / "easy.jsonl"))
    before = checkpoint.losses(run / "checkpoints")
    shutil.rmtree(run / "final")
    _, said = train(asked, data__eval=str(tmp_path / "hard.jsonl"), epochs=2)
    assert "the held-out rows are others than before" in said
    after = checkpoint.losses(run / "checkpoints")
    assert max(filter(None, before.values())) < min(filter(None, after.values()))
    assert json.loads((run / "final" / "manifest.json").read_text())["about"]["step"] == min(
        after, key=after.__getitem__
    )
    assert [json.loads(line)["step"] for line in (run / "eval.jsonl").read_text().splitlines()] == [3, 4]
    assert (run / "eval.jsonl.aside").is_file()


def test_all_that_a_finished_run_leaves_is_there_and_whole(given: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "new"
    asked = {**given, "output": str(run), "adapter": {"r": 2}}
    train(asked)
    shutil.rmtree(run / "adapter")
    assert "resumed step 2 of 2" in train(asked)[1]
    assert "finished at step 2" in train(asked)[1]
    flip(run / "adapter" / "adapter_model.safetensors")
    with pytest.raises(DamagedError, match=r"adapter/adapter_model\.safetensors: checksum differs"):
        train(asked)
    for each in ("checkpoints", "adapter"):
        shutil.rmtree(run / each)
    with pytest.raises(DamagedError, match=r"adapter/manifest\.json: cannot be read .*; no checkpoint is left"):
        train(asked)
    assert (run / "final").is_dir()


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (
            {"adapter": {"r": 2}},
            {"adapter": {"r": 4, "alpha": 1024.0}},
            ["adapter.r: 2 -> 4", "adapter.alpha: 32.0 -> 10"],
        ),
        (
            {"adapter": {"r": 2}},
            {"adapter": {"r": 2, "target": ["q_proj"]}},
            ["adapter.target: all-linear -> ['q_proj']"],
        ),
        ({"adapter": {"r": 2}}, {"adapter": None, "optimizer": {"lr": 2e-4}}, ["adapter: lora -> None"]),
        ({"freeze": {"unfrozen_layers": 1}}, {"freeze": {"unfrozen_layers": 2}}, ["freeze.unfrozen_layers: 1 -> 2"]),
        ({}, {"freeze": {"names": ["mlp"]}}, ["freeze.names: [] -> ['mlp']"]),
    ],
)
def test_another_set_of_what_is_trained_is_refused_before_the_model_is_loaded(
    first: dict[str, Any],
    then: dict[str, Any],
    said: list[str],
    given: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {**given, "output": str(tmp_path / "new")}
    train(asked, **first)
    monkeypatch.setattr(build, "load", lambda *given, **more: pytest.fail("the model was loaded"))
    with pytest.raises(Problems) as finished:
        train(asked, **{**then, "epochs": 2})
    assert "to train on from step" not in str(finished.value)
    shutil.rmtree(tmp_path / "new" / "final")
    with pytest.raises(Problems) as refused:
        train(asked, **{**then, "epochs": 2})
    assert [str(each) for each in refused.value.problems if not any(str(each).startswith(text) for text in said)] == []
    assert len(refused.value.problems) == len(said)


def test_where_an_adapter_to_go_on_from_lies_is_nothing_and_what_it_holds_all(
    given: dict[str, Any], tmp_path: Path
) -> None:
    train(given, output=str(tmp_path / "first"), adapter={"r": 2})
    start = shutil.copytree(tmp_path / "first" / "adapter", tmp_path / "start")
    asked = {**given, "output": str(tmp_path / "new")}
    train(asked, adapter={"start": str(start)})
    moved = start.rename(tmp_path / "moved")
    assert "finished at step 2" in train(asked, adapter={"start": str(moved)})[1]
    shutil.rmtree(tmp_path / "new" / "final")
    assert "adapter.start" not in train(asked, adapter={"start": str(moved)})[1]
    train(given, output=str(tmp_path / "second"), adapter={"r": 2}, seed=5)
    with pytest.raises(Problems, match=r"model: adapter.start .*moved -> .*second/adapter changed since"):
        train(asked, adapter={"start": str(tmp_path / "second" / "adapter")})


def test_the_best_checkpoint_is_told_by_what_is_sealed(given: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "new"
    (tmp_path / "held.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    asked = {**given, "output": str(run), "checkpoint": {"every": 1, "keep_best": 1}, "optimizer": {"lr": 1e-2}}
    asked["data"] = {"train": given["data"], "eval": str(tmp_path / "held.jsonl")}
    train(asked)
    losses = checkpoint.losses(run / "checkpoints")
    worst = max(losses, key=losses.__getitem__)
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    changed = [each | {"loss": 0.001} if each["step"] == worst else each for each in lines]
    (run / "eval.jsonl").write_text("".join(json.dumps(each) + "\n" for each in changed))
    shutil.rmtree(run / "final")
    train(asked)
    assert json.loads((run / "final" / "manifest.json").read_text())["about"]["step"] != worst


# Never saved broken


@pytest.mark.parametrize("every", [1, None])
def test_an_update_that_leaves_weights_not_finite_is_named_and_not_saved(
    every: int | None, given: dict[str, Any], tmp_path: Path
) -> None:
    """Each number is finite, and their product is not."""
    run = tmp_path / "new"
    wild = {"optimizer__lr": 1e20, "optimizer__weight_decay": 1e30, "schedule__name": "constant", "epochs": 2}
    asked = {**given, "checkpoint": {"every": every}, "output": str(run), **wild}
    with pytest.raises(
        NumbersError, match=r"the update of step 1 .*not finite: model\.\S+.* and \d+ more; none of them"
    ):
        train(asked)
    assert checkpoint.steps(run / "checkpoints") == []
    assert not (run / "final").exists()
    train(asked, optimizer__lr=1e-5, optimizer__weight_decay=0.0)
    assert (run / "final").is_dir()


def test_the_checkpoint_before_is_named_and_gone_on_from(given: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run / "final")
    wild = {"epochs": 2, "optimizer__lr": 1e20, "optimizer__weight_decay": 1e30, "schedule__name": "constant"}
    with pytest.raises(NumbersError, match=r"step 3 .*step-000002 is the one before, and the same command goes on"):
        train(given, **wild)
    assert checkpoint.steps(run / "checkpoints") == [1, 2]


# What a result depends on


TEMPLATE = "{{ 'Today is ' + strftime_now('%d %B %Y') + '.' }}" + CHATML


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Two time zones that lie 26 hours apart never have the same date."""

    def change(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield change
    monkeypatch.undo()
    time.tzset()


def test_a_run_has_one_date(finished: tuple[Path, dict[str, Any]], tmp_path: Path, zone: Callable[[str], None]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(4)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dated.jinja").write_text(TEMPLATE)
    run = tmp_path / "run"
    asked = {**finished[1], "data": str(tmp_path / "chat.jsonl"), "template": str(tmp_path / "dated.jinja")}
    asked |= {"output": str(run), "batch": {"examples": 2}}
    zone("AAA+12")
    _, said = train(asked)
    assert "it reads the date, and is told 2025-01-01" in said
    honest = weights(run / "final")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    zone("BBB-14")
    _, said = train(asked)
    assert "it reads the date, and is told 2025-01-01" in said
    assert all(torch.equal(tensor, honest[key]) for key, tensor in weights(run / "final").items())


def test_another_number_of_threads_is_told(given: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        _, said = train(given)
    finally:
        torch.set_num_threads(before)
    assert f"threads {before} -> {before + 1} applies: results may differ in their last bits" in said


# No end for trifles


def test_lines_of_a_user_s_in_the_logs_end_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "report.html").unlink()
    for name, line in (("metrics", {"step": 1, "mine": "\u2028"}), ("samples", {"step": 2}), ("eval", {"step": True})):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n[]\nnothing\n")
    (run / "ledger.json").write_text("[")
    train(given)
    assert "2 steps in" in (run / "report.html").read_text()
    assert "finished at step 2" in train(given)[1]


def test_a_report_names_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "nan", "seconds": "x", "tokens": 1}\n')
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "\\ud800", "output": ""}\n')
    text = report.write(tmp_path).read_text()
    for name in ("metrics.jsonl", "ledger.json", "config.yaml"):
        assert f"{name} cannot be read" in text
    assert "\\ud800" in text
