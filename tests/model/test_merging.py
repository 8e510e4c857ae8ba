"""Adapters that others have trained: gone on from, merged into their base, or refused with the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from resumed_runs import folder, settings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deft.core.errors import InputError, Problems
from deft.evaluation import generate
from deft.model import load as models
from deft.run import config
from deft.run.train import Run, train

__all__ = ["folder"]
TOKENS = torch.arange(5, 40)[None]
BRIEF = {"epochs": 1, "steps": 1, "precision": "fp32", "evaluate__prompts": ()}


def foreign(folder: Path, name: str = "foreign", **more: Any) -> tuple[Path, torch.Tensor]:
    """An adapter that peft alone has made, and the logits of the base with it."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    kind = more.pop("kind", peft.LoraConfig)
    chosen = {"r": 4, "target_modules": ["q_proj"]} if kind is peft.LoraConfig else {}
    adapted = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", **{**chosen, **more}))
    for key, parameter in adapted.named_parameters():
        if parameter.requires_grad and "embedding" not in key:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / name)
    with torch.no_grad():
        return folder / name, adapted.eval()(input_ids=TOKENS).logits


def untie(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 0.01)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)


def brief(folder: Path, output: str, **more: Any) -> Run:
    """A run whose only step changes nothing that shows: final/ is what it began with."""
    return train(config.make(settings(folder, output, **{**BRIEF, "optimizer__lr": 1e-12, **more})))


def error_of(run: Run, meant: torch.Tensor) -> float:
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(run.folder / "final")(input_ids=TOKENS).logits
    return float((found - meant).norm() / meant.norm())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["norm"]},
        {"kind": peft.IA3Config, "target_modules": ["q_proj"], "feedforward_modules": []},
    ],
    ids=["lora", "dora", "pissa", "olora", "modules_to_save", "ia3"],
)
def test_an_adapter_of_any_kind_is_merged_and_all_weights_are_trained(folder: Path, more: dict[str, Any]) -> None:
    path, meant = foreign(folder, **more)
    run = brief(folder, "run", model=str(path), merge="true")
    assert error_of(run, meant) < 1e-5
    assert error_of(brief(folder, "base"), meant) > 1e-4
    made = config.load(str(run.folder / "config.yaml"))
    assert (made.model, made.merge, made.adapter) == (str(folder / "model"), str(path), None)
    stored = load_file(run.folder / "checkpoints" / "step-000001" / "model-00001.safetensors")
    assert {"weight.model.norm.weight", "weight.model.layers.0.self_attn.q_proj.weight"} <= stored.keys()


@pytest.mark.parametrize("target", [["embed_tokens", "q_proj"], ["lm_head"]])
@pytest.mark.parametrize("is_own", [True, False])
def test_an_adapter_of_embeddings_or_head_is_merged(target: list[str], is_own: bool, folder: Path) -> None:
    """peft puts the base weights of these layers into its files, deft does not. Over tied ones it is no merge."""
    tied, _ = foreign(folder, "tied", target_modules=target)
    if target == ["lm_head"]:
        with pytest.raises(InputError, match=r"merged it gives other logits than beside its base"):
            brief(folder, "never", model=str(tied), merge="true")
    untie(folder / "model")
    path, meant = foreign(folder, target_modules=target)
    if is_own:
        path = brief(folder, "first", model=str(path)).folder / "adapter"
    assert error_of(brief(folder, "run", model=str(path), merge="true"), meant) < 1e-5


def test_a_new_adapter_over_a_merged_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(folder / "model")
    path, meant = foreign(folder)
    more = {"model": str(path), "merge": True, "adapter": {"r": 2}, "precision": "bf16", "export__dtype": "fp32"}
    run = brief(folder, "run", **more)
    assert error_of(run, meant) < 1e-5  # its masters are whole
    assert not (run.folder / "adapter").exists()
    assert "adapter: not written" in capsys.readouterr().out.replace("\n", "")
    base, final = (load_file(each / "model.safetensors") for each in (folder / "model", run.folder / "final"))
    assert torch.equal(base["model.embed_tokens.weight"].float(), final["model.embed_tokens.weight"])


def test_what_is_merged_is_part_of_what_a_run_begins_with(folder: Path) -> None:
    path, _ = foreign(folder)
    brief(folder, "run", merge=str(path))
    other, _ = foreign(folder, "other", r=2)
    with pytest.raises(Problems, match=r"model: .*changed since"):
        brief(folder, "run", merge=str(other))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"kind": peft.IA3Config, "target_modules": ["q_proj"], "feedforward_modules": []},
            r"peft_type: 'IA3' is not trained.*merge=true",
        ),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\] is not trained.*merge=true"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: 'pissa' is not trained.*merge=true"),
    ],
)
def test_what_is_not_gone_on_from_is_named(folder: Path, more: dict[str, Any], says: str) -> None:
    path, _ = foreign(folder, **more)
    with pytest.raises(InputError, match=says):
        config.make(settings(folder, "run", model=str(path)))


def test_what_cannot_be_merged_is_named(folder: Path) -> None:
    path, _ = foreign(folder, "niter", init_lora_weights="pissa_niter_4")
    with pytest.raises(InputError, match=r"pissa_niter_4.*does not hold"):
        brief(folder, "run", merge=str(path))
    path, _ = foreign(folder, kind=peft.PromptTuningConfig, num_virtual_tokens=3)
    with pytest.raises(InputError, match=r"merge: .* holds virtual tokens, which cannot be merged"):
        brief(folder, "run", merge=str(path))
    path, _ = foreign(folder, "head", modules_to_save=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(folder / "tied")
    for each in (folder / "model").glob("token*"):
        shutil.copy(each, folder / "tied")
    with pytest.raises(InputError, match="which its base ties"):
        brief(folder, "run", model=str(folder / "tied"), merge=str(path))
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="has no adapter_model"):
        brief(folder, "run", merge=str(path))
    with pytest.raises(InputError, match=r"merge: .* is no adapter in peft's form"):
        brief(folder, "run", merge=str(folder / "model"))
    with pytest.raises(InputError, match=r"merge: .* is no adapter; name one: merge=FOLDER"):
        config.make(settings(folder, "run", merge="on"))


def test_a_base_that_it_does_not_fit(folder: Path) -> None:
    path, _ = foreign(folder)
    stored = load_file(path / "adapter_model.safetensors")
    save_file({name: each[..., :3].contiguous() for name, each in stored.items()}, path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"merge: .*cannot be added to .*size mismatch"):
        brief(folder, "run", merge=str(path))
    save_file({name: each for name, each in stored.items() if "layers.0" in name}, path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"merge: .*layers.1.* is not what this base model"):
        brief(folder, "run", merge=str(path))


def test_the_base_is_found_by_its_path_or_named(folder: Path) -> None:
    path, _ = foreign(folder)
    (folder / "model").rename(folder / "moved")
    for given, key in (({}, "adapter.start"), ({"merge": True}, "merge")):
        with pytest.raises(InputError, match=rf"its base model, .*/model, is not here.*model=BASE {key}={path}"):
            config.make(settings(folder, "run", model=str(path), **given))
    more = {"model": str(folder / "moved"), "adapter__start": str(path)}
    made = config.make(settings(folder, "run", **more))
    assert made.adapter is not None
    assert (made.adapter.r, made.adapter.target) == (4, ("q_proj",))
    described = path / "adapter_config.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(InputError, match="does not say what its base model is"):
        config.make(settings(folder, "run", model=str(path)))


def test_a_base_of_another_digest_is_refused(folder: Path) -> None:
    first = brief(folder, "first", adapter={"r": 2})
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.lm_head.weight.data += 1.0
    model.save_pretrained(folder / "model")
    for more in ({}, {"merge": True}):
        with pytest.raises(InputError, match=r"was trained on another base than .*/model"):
            brief(folder, "second", model=str(first.folder / "adapter"), **more)


def test_adapters_where_a_model_is_due(folder: Path) -> None:
    path, _ = foreign(folder)
    with pytest.raises(InputError, match=r"this is an adapter, not a model; .*final/.*merge=true merges"):
        generate.load(path)
    shutil.copy(folder / "model" / "config.json", path)
    with pytest.raises(InputError, match="this is an adapter, not a model"):
        models.inspect(str(path))
    shutil.copy(folder / "model" / "model.safetensors", path)
    with pytest.raises(InputError, match=r"a model and an adapter.*a second time.*folder of their own"):
        models.inspect(str(path))
