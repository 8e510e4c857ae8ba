"""`export.dtype`: what final/ is written in, whatever base and precision are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import folder, settings
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deft.core.errors import InputError, Problems
from deft.run import config
from deft.run.reading import Session
from deft.run.train import Run, train
from deft.training.masters import decompose

__all__ = ["folder"]


def short(folder: Path, output: str, **more: Any) -> Run:
    return train(config.make(settings(folder, output, **{"steps": 2, "epochs": 1, "evaluate__prompts": (), **more})))


def rounded(master: torch.Tensor) -> torch.Tensor:
    """A master as its bf16 copy has it: ties go away from zero, where torch's own cast has them go to even."""
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    decompose(master.clone(), weight, torch.empty_like(master, dtype=torch.int16))
    return weight


@pytest.mark.parametrize(
    ("adapter", "precision", "dtype", "name"),
    [
        (None, "bf16", "fp16", "float16"),
        ({"r": 4}, "fp32", "bf16", "bfloat16"),
        ({"r": 4}, "bf16", "fp32", "float32"),
        (None, "bf16", "auto", "float32"),
    ],
)
def test_final_is_written_in_it(folder: Path, adapter: Any, precision: str, dtype: str, name: str) -> None:
    run = short(folder, "run", adapter=adapter, precision=precision, export__dtype=dtype)
    weights = load_file(run.folder / "final" / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {getattr(torch, name)}
    assert json.loads((run.folder / "final" / "config.json").read_text())["dtype"] == name
    assert AutoModelForCausalLM.from_pretrained(run.folder / "final").dtype == getattr(torch, name)


def test_masters_of_a_run_in_bf16_are_whole_in_fp32(folder: Path) -> None:
    run = short(folder, "run", precision="bf16", export__dtype="fp32")
    weights = load_file(run.folder / "final" / "model.safetensors")
    assert any(not torch.equal(each, each.bfloat16().float()) for each in weights.values())
    half = short(folder, "half", precision="bf16", export__dtype="bf16")
    for name, each in load_file(half.folder / "final" / "model.safetensors").items():
        assert torch.equal(each, rounded(weights[name]))


def test_what_is_lost_in_bf16_names_the_way_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype, says in (("bf16", True), ("fp32", False)):
        made = config.make(settings(folder, dtype, adapter={"r": 4}, steps=2, epochs=1, export__dtype=dtype))
        train(made, Session(console=Console(width=400)))
        out = capsys.readouterr().out
        assert "of that is lost" in out
        assert ("(export.dtype=fp32 keeps it)" in out) == says


def test_a_finished_run_is_exported_anew(folder: Path) -> None:
    short(folder, "run")
    with pytest.raises(Problems, match=r"to export it anew: mv .*/final .*/final-2, and run this again[\s\S]*export"):
        short(folder, "run", export__dtype="bf16")
    (folder / "run" / "final").rename(folder / "run" / "final-2")
    run = short(folder, "run", export__dtype="bf16")
    before, after = (load_file(run.folder / name / "model.safetensors") for name in ("final-2", "final"))
    assert all(torch.equal(rounded(each), after[name]) for name, each in before.items())
    (folder / "run" / "report.html").unlink()  # ended between final/ and the report, and asked otherwise then
    short(folder, "run", export__dtype="fp16")
    assert {each.dtype for each in load_file(run.folder / "final" / "model.safetensors").values()} == {torch.float16}


def test_what_fp16_cannot_hold_is_named(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.norm.weight.data *= 1e5
    model.save_pretrained(folder / "model")
    with pytest.raises(InputError, match=r"export.dtype: model.norm.weight .*65504.*export.dtype=bf16"):
        short(folder, "run", export__dtype="fp16")
    assert not (folder / "run" / "final").exists()


def test_what_vanishes_in_fp16_is_told_and_a_whole_tensor_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    up = model.model.layers[0].mlp.up_proj.weight
    up.data[:5] = 1e-9
    model.save_pretrained(folder / "model")
    asked: dict[str, Any] = {"export__dtype": "fp16", "optimizer__lr": 1e-13}
    made = settings(folder, "run", steps=2, epochs=1, evaluate__prompts=(), **asked)
    train(config.make(made), Session(console=Console(width=400)))
    lost = f"{5 * up.shape[1]} of {up.numel():,} of model.layers.0.mlp.up_proj.weight"
    assert f"warning: values that are 0 in float16: {lost}; export.dtype=fp32 keeps them" in capsys.readouterr().out
    up.data[:] = 1e-9
    model.save_pretrained(folder / "model")
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj.weight is 0 altogether .*6.0e-08 .*export.dtype=bf16"):
        short(folder, "other", **asked)
    assert not (folder / "other" / "final").exists()
    assert (folder / "other" / "checkpoints" / "step-000002").is_dir()
    short(folder, "other", **{**asked, "export__dtype": "bf16"})
