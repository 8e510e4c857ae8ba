"""A model folder is read, or refused in one line that says what, where and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, build
from safetensors.torch import load_file, save_file

from deft.core.errors import InputError
from deft.model.load import Base, inspect, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build("llama")
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_config_alone_says_what_a_model_is(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"never read")
    assert inspect(str(folder)) == Base(
        path=str(folder),
        model_type="llama",
        vocab_size=VOCABULARY,
        max_positions=64,
        dtype="float32",
        is_tied=False,
        stop_ids=(2, 7),
    )


@pytest.mark.parametrize(
    ("name", "max_positions", "is_tied"), [("gpt2", 64, True), ("bloom", None, True), ("opt", 64, True)]
)
def test_other_configs_name_things_differently(name: str, max_positions: int, is_tied: bool, tmp_path: Path) -> None:
    build(name, torch.bfloat16).save_pretrained(tmp_path)
    base = inspect(str(tmp_path))
    assert (base.vocab_size, base.max_positions, base.is_tied) == (VOCABULARY, max_positions, is_tied)
    assert base.dtype == "bfloat16"
    assert base.stop_ids == (2,)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_comes_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    saved = build(name)
    saved.save_pretrained(tmp_path)
    model = load(inspect(str(tmp_path)), device="cpu", dtype=torch.float32)
    assert not model.training
    loaded = model.state_dict()
    assert loaded.keys() == saved.state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in saved.state_dict().items())


def test_the_dtype_is_the_one_asked_for(folder: Path) -> None:
    model = load(inspect(str(folder)), device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: there is no such folder; name a model folder or a hub id"):
        inspect(str(tmp_path / "nowhere"))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        InputError, match=r"not a model folder: it has no config\.json, but notes\.txt; name the folder"
    ):
        inspect(str(tmp_path))


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled \(pytorch_model\.bin\), and a pickle can run code; save it with"):
        inspect(str(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"it has no weights; save it with"):
        inspect(str(folder))


def test_an_unknown_architecture(folder: Path) -> None:
    edit_config(folder, model_type="llamarama")
    with pytest.raises(InputError, match=r"names no architecture that this transformers knows; upgrade transformers"):
        inspect(str(folder))


def test_a_model_that_brings_its_own_code(folder: Path) -> None:
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(InputError, match=r"it brings its own code, which is not run"):
        inspect(str(folder))


def test_a_model_that_writes_no_text(folder: Path) -> None:
    edit_config(folder, model_type="clip", architectures=["CLIPModel"])
    with pytest.raises(InputError, match=r"clip is not a causal language model"):
        inspect(str(folder))


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"it cannot be loaded: .*config"):
        inspect(str(folder))


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model: it cannot be loaded: .*; check the name, or download"):
        load(inspect(str(folder)), device="cpu", dtype=torch.float32)


def test_missing_weights_are_not_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"1 weights are not in its files, model\.layers\.1\.mlp\.up_proj\.weight first"
    ):
        load(inspect(str(folder)), device="cpu", dtype=torch.float32)


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)
    with pytest.raises(InputError, match=r"model: it cannot be loaded: "):
        load(inspect(str(folder)), device="cpu", dtype=torch.float32)
