"""Adapters: their gradients are peft's own, the base stays as it is, and what leaves a run is base plus adapter."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from resumed_runs import differences, folder, settings
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from deft.commands import check
from deft.core import hardware
from deft.core.errors import InputError, Problems
from deft.core.types import MicroBatch
from deft.distributed.world import World
from deft.model import adapters, fused_layers, selftest
from deft.model.causal_lm import evaluating
from deft.model.config import AdapterConfig, FreezeConfig
from deft.model.trainable import Trainable
from deft.run import build, config
from deft.run.train import Run, train
from deft.training import objectives
from deft.training.masters import Masters
from deft.training.optim.adamw import AdamW

__all__ = ["folder"]
LENGTHS = (11, 17, 6)
CPU = hardware.resolve("cpu", "fp32", "auto")
FAMILIES = ("Llama", "Qwen3", "Gemma3Text", "GPTNeoX")


def tiny(family: str) -> Any:
    """Three layers with random weights; grouped queries where the family has them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    more = {} if family == "GPTNeoX" else {"num_key_value_heads": 2, "head_dim": 16}
    made = getattr(transformers, f"{family}Config")(**sizes, num_attention_heads=4, max_position_embeddings=256, **more)
    return AutoModelForCausalLM.from_config(made).eval()


def micro_batch() -> MicroBatch:
    tokens = torch.randint(300, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    rows = torch.tensor([row for row in range(len(tokens)) if row not in ends])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(2))
    return MicroBatch(tokens, positions, LENGTHS, rows, tokens[rows + 1], weights)


def peft_loss(model: Any, batch: MicroBatch) -> Tensor:
    """The weighted loss by peft's and transformers' own forward, one document at a time."""
    documents = batch.tokens.split(list(LENGTHS))
    logits = torch.cat([model(input_ids=each[None]).logits[0].float() for each in documents])
    losses = torch.nn.functional.cross_entropy(logits[batch.rows], batch.targets, reduction="none")
    return (losses * batch.weights).sum()


KINDS = [(family, name, "none") for family in FAMILIES for name in ("lora", "rslora", "dora")]


@pytest.mark.parametrize(
    ("family", "name", "checkpointing"), [*KINDS, ("Llama", "lora", "selective"), ("Llama", "lora", "full")]
)
def test_gradients_are_those_of_peft(family: str, name: Any, checkpointing: Any) -> None:
    model = tiny(family)
    adapters.attach(model, AdapterConfig(name=name, r=4))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zero at first, and then A has no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    causal_lm, batch = selftest.choose(model), micro_batch()
    causal_lm.checkpointing = checkpointing
    assert causal_lm.mode == "packed"
    is_folded = any("forward" in each.__dict__ for each in model.modules())
    assert is_folded == (family in ("Llama", "Qwen3") and name != "dora")
    total = causal_lm(batch, objectives.load("nll")).nll_sum
    total.backward()
    ours = {key: each.grad for key, each in model.named_parameters() if each.requires_grad}
    assert all("lora_" in key for key in ours)
    model.zero_grad()
    fused_layers.remove(model)
    model.set_attn_implementation("eager")
    meant = peft_loss(model, batch)
    meant.backward()
    assert total.item() == pytest.approx(meant.item(), rel=1e-6)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (ours[key] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, (key, error)


def test_switched_off_adapters_do_not_count() -> None:
    model = tiny("Llama")
    tokens = micro_batch().tokens[None]
    with torch.no_grad():
        base = model(input_ids=tokens).logits
        adapters.attach(model, AdapterConfig(r=4))
        for layer in adapters.layers(model).values():
            torch.nn.init.normal_(layer.lora_B.default.weight)
        causal_lm = selftest.choose(model)
        with adapters.switched_off(model):
            hidden, head = causal_lm.hidden_and_head(micro_batch())
            off = torch.nn.functional.linear(hidden, head.weight)
            assert torch.allclose(model(input_ids=tokens).logits, base, atol=1e-5)
        on, _ = causal_lm.hidden_and_head(micro_batch())
    assert torch.allclose(off[:10], base[0, :10], atol=1e-5)
    assert not torch.allclose(on[:10], hidden[:10], atol=1e-2)


def test_ranks_by_pattern_and_a_target_by_name() -> None:
    model = tiny("Llama")
    chosen = AdapterConfig(target=("q_proj", "down_proj"), r=4, ranks={"layers.0.mlp.down_proj": 2})
    adapters.attach(model, chosen)
    found = adapters.layers(model)
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "down_proj"}
    ranks = {name: each.lora_A.default.weight.shape[0] for name, each in found.items()}
    assert {name: rank for name, rank in ranks.items() if rank != 4} == {"model.layers.0.mlp.down_proj": 2}
    with pytest.raises(InputError, match=r"adapter.target.*q_proj"):
        adapters.attach(tiny("Llama"), AdapterConfig(target="no_such_layer"))


def adapted_run(folder: Path, output: str, **more: Any) -> Run:
    """A run of ten steps with an adapter, dropout of the adapter's input included."""
    chosen = {"adapter": {"r": 4, "dropout": 0.1}, "optimizer__lr": 1e-2, "dropout": "off"}
    return train(config.make(settings(folder, output, **{**chosen, **more})))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_changes_the_adapter_alone_and_hands_over_both(folder: Path, precision: str) -> None:
    run = adapted_run(folder, "run", precision=precision)
    base, final = (load_file(each / "model.safetensors") for each in (folder / "model", run.folder / "final"))
    assert base.keys() == final.keys()
    changed = {name for name in base if not torch.equal(base[name], final[name])}
    assert changed == {name for name in base if "_proj" in name}
    assert not [each.name for each in (run.folder / "final").iterdir() if "adapter" in each.name]
    stored = load_file(run.folder / "checkpoints" / "step-000010" / "model-00001.safetensors")
    assert {name for name in stored if name.startswith("weight.")} == {
        f"weight.{name}.lora_{side}.default.weight"
        for name in (key.removesuffix(".weight") for key in changed)
        for side in "AB"
    }
    tokens = torch.arange(5, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = PeftModel.from_pretrained(plain, run.folder / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "final")
    with torch.no_grad():
        ours, served = adapted(input_ids=tokens).logits, merged(input_ids=tokens).logits
        with adapted.disable_adapter():
            moved = adapted(input_ids=tokens).logits
    assert float((ours - served).norm() / ours.norm()) < 1e-6
    assert float((ours - moved).norm() / ours.norm()) > 1e-2
    assert run.model.state_dict().keys() == merged.state_dict().keys()


def test_a_base_in_bf16_is_merged_in_fp32(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(folder / "model")
    run = adapted_run(folder, "run", precision="bf16", export__dtype="fp32")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), run.folder / "adapter"
    ).eval()
    merged, tokens = AutoModelForCausalLM.from_pretrained(run.folder / "final"), torch.arange(5, 40)[None]
    with torch.no_grad():
        ours, served = adapted(input_ids=tokens).logits, merged(input_ids=tokens).logits
    assert float((ours - served).norm() / ours.norm()) < 1e-6


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_killed_and_resumed_is_the_same_run(folder: Path, name: str) -> None:
    adapter = {"name": name, "r": 4, "dropout": 0.1}
    adapted_run(folder, "whole", adapter=adapter)
    adapted_run(folder, "cut", adapter=adapter)
    for part in ("final", "adapter", "checkpoints/step-000010"):
        (folder / "cut" / part).rename(folder / part.replace("/", "_"))
    adapted_run(folder, "cut", adapter=adapter)
    assert differences(folder, "whole", "cut") == []
    adapters_of = [load_file(folder / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "cut")]
    assert all(torch.equal(each, adapters_of[1][key]) for key, each in adapters_of[0].items())


def test_dropout_of_an_adapter_is_on_while_it_is_trained_and_off_in_evaluation(folder: Path) -> None:
    more = {"epochs": 1, "steps": 3, "precision": "fp32", "optimizer__lr": 0.1}
    runs = [adapted_run(folder, f"run-{rate}", adapter={"r": 4, "dropout": rate}, **more) for rate in (0.0, 0.9)]
    first, second = ([line["loss"] for line in run.metrics] for run in runs)
    assert first[0] == pytest.approx(second[0], rel=1e-5)  # B is zero yet
    assert all(abs(one - other) > 1e-3 for one, other in zip(first[1:], second[1:], strict=True))
    made = build.build(config.load(str(runs[1].folder / "config.yaml")), lambda: tiny("Llama"), CPU, World())
    tokens = micro_batch().tokens[None]
    for layer in adapters.layers(made.causal_lm.model).values():
        torch.nn.init.normal_(layer.lora_B.default.weight)
    with torch.no_grad(), evaluating(made.causal_lm.model):
        ones, others = (made.causal_lm.model(input_ids=tokens).logits for _ in range(2))
    assert torch.equal(ones, others)


def test_lr_and_names_of_an_adapter() -> None:
    made = config.load(None, ["model=a", "data=b", "adapter=rslora", "adapter.r=8"])
    assert made.adapter is not None
    assert (made.adapter.name, made.adapter.r, made.optimizer.lr) == ("rslora", 8, 2e-4)
    assert config.load(None, ["model=a", "data=b", "adapter=lora", "optimizer.lr=3e-4"]).optimizer.lr == 3e-4
    assert config.load(None, ["model=a", "data=b"]).optimizer.lr == 1e-5
    assert config.make(json.loads(made.model_dump_json())) == made


def test_a_pattern_of_ranks_that_fits_no_layer_is_refused() -> None:
    adapters.attach(tiny("Llama"), AdapterConfig(ranks={r"q_proj": 2, r"layers\.0\..*": 3}))
    for key in ("ranks", "alphas"):
        with pytest.raises(InputError, match=rf"adapter\.{key}: 'nope_proj' is no layer with an adapter; one is model"):
            adapters.attach(tiny("Llama"), AdapterConfig(**{key: {"nope_proj": 2}}))


def test_what_could_not_be_merged_has_no_adapter() -> None:
    experts = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(experts)
    adapters.attach(model, AdapterConfig())
    assert {name.rpartition(".")[2] for name in adapters.layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name in ("lm_head", "embed_tokens"):
        tied = tiny("Llama")
        tied.lm_head.weight = tied.get_input_embeddings().weight
        with pytest.raises(InputError, match=rf"{name} is tied to the other end of the model"):
            adapters.attach(tied, AdapterConfig(target=(name, "q_proj")))


def test_masters_are_renamed_and_assigned_in_bf16() -> None:
    layer = torch.nn.Linear(3, 2)
    wide = torch.tensor([[1.0 + 2**-12, 2.0, 3.0], [4.0, 5.0, 6.0 + 2**-20]])
    masters = Masters([("old.weight", layer.weight.requires_grad_(False))], torch.bfloat16)
    masters.assign("old.weight", wide.clone())
    masters.rename({"new.weight": "old.weight"})
    assert list(masters) == ["new.weight"]
    assert torch.equal(masters["new.weight"], wide)
    assert torch.equal(layer.weight, wide.bfloat16())


def trained(family: str, freeze: FreezeConfig, *, is_tied: bool = False) -> set[str]:
    """The parts of a model of three layers that are trained: layers by number, else names."""
    model = tiny(family)
    if is_tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    Trainable(freeze=freeze).apply(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {number for name in names if (number := re.search(r"layers\.(\d+)", name))}
    return {found[1] for found in layers} | {name for name in names if "layers." not in name}


@pytest.mark.parametrize(
    ("unfrozen", "is_tied", "meant"),
    [
        (1, False, {"2", "model.norm.weight", "lm_head.weight"}),
        (1, True, {"2", "model.norm.weight"}),
        (2, True, {"1", "2", "model.norm.weight"}),
        (0, False, {"model.norm.weight"}),
        (0, True, {"model.norm.weight"}),
    ],
)
def test_layers_from_the_top_as_in_trlx(unfrozen: int, is_tied: bool, meant: set[str]) -> None:
    assert trained("Llama", FreezeConfig(unfrozen_layers=unfrozen), is_tied=is_tied) == meant


def test_frozen_by_name() -> None:
    everything = trained("Llama", FreezeConfig())
    assert trained("Llama", FreezeConfig(names=("embed_tokens", r"layers\.[01]"))) == everything - {
        "0", "1", "model.embed_tokens.weight",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"lm_haed.*lm_head"):
        trained("Llama", FreezeConfig(names=("lm_haed",)))
    with pytest.raises(InputError, match="no parameter is left"):
        trained("Llama", FreezeConfig(names=(".",)))
    with pytest.raises(InputError, match="5 of 3 layers"):
        trained("Llama", FreezeConfig(unfrozen_layers=5))


def test_what_is_frozen_is_served_as_it_was(folder: Path) -> None:
    run = train(config.make(settings(folder, "run", freeze={"unfrozen_layers": 1}, precision="bf16", epochs=1)))
    base, final = (load_file(each / "model.safetensors") for each in (folder / "model", run.folder / "final"))
    changed = {name for name in base if not torch.equal(base[name], final[name])}
    assert changed == {name for name in base if "layers.1" in name or name == "model.norm.weight"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": {"rates": {"lora_C": 2.0}}, "adapter": {"name": "lora"}}, r"optimizer.rates: 'lora_C' is in no"),
        ({"freeze": {"names": ["nonsense"]}}, r"freeze.names: 'nonsense' is in no"),
        ({"adapter": {"target": ["nonsense"]}}, r"adapter.target: "),
    ],
)
def test_names_that_do_not_fit_are_told_with_everything_else(folder: Path, wrong: Any, said: str) -> None:
    """Before a weight is loaded."""
    made = config.make({**settings(folder, "run"), **wrong, "loss": {"name": "null"}})
    with pytest.raises(Problems, match=r"(?s)loss.name: 'null' is not there") as raised:
        check.run(made, console=Console(file=io.StringIO()))
    assert re.search(said, str(raised.value))


def test_rates_by_pattern() -> None:
    pair = [(name, torch.nn.Parameter(torch.ones(2, 2))) for name in ("x.lora_A", "x.lora_B")]
    masters = Masters(pair, torch.float32)
    optimizer = AdamW(masters, rates={"lora_B": 16.0})
    for _, parameter in pair:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    moved = [float((1.0 - parameter.detach())[0, 0]) for _, parameter in pair]
    assert moved[1] == pytest.approx(16 * moved[0], rel=1e-4)
    assert moved[0] == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(InputError, match="lora_C"):
        AdamW(masters, rates={"lora_C": 2.0})
    with pytest.raises(Problems, match="no regular expression"):
        config.load(None, ["model=a", "data=b", "optimizer.rates={'(': 2}"])


def test_a_run_that_is_trained_on_leaves_the_later_adapter(folder: Path) -> None:
    first = adapted_run(folder, "run", adapter={"r": 4}, epochs=1)
    early = load_file(first.folder / "adapter" / "adapter_model.safetensors")
    (first.folder / "final").rename(first.folder / "final-5")
    later = load_file(
        adapted_run(folder, "run", adapter={"r": 4}, epochs=2).folder / "adapter/adapter_model.safetensors"
    )
    assert not any(torch.equal(early[name], later[name]) for name in early)


def test_an_adapter_folder_is_gone_on_from(folder: Path) -> None:
    first = adapted_run(folder, "first", adapter={"name": "rslora", "r": 4}, epochs=1)
    given = settings(folder, "second", epochs=1, steps=1) | {"model": str(first.folder / "adapter")}
    made = config.make(given)
    assert made.adapter is not None
    assert (made.model, made.adapter.name, made.adapter.r) == (str(folder / "model"), "rslora", 4)
    assert config.make({key: each for key, each in given.items() if key != "optimizer"}).optimizer.lr == 2e-4
    second = train(made)
    before, after = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (first, second))
    moved = [float((after[name] - before[name]).norm() / before[name].norm()) for name in before if "lora_A" in name]
    assert 0.0 < max(moved) < 0.5  # a new A would be as far away as it is long
    with pytest.raises(InputError, match="is an adapter itself"):
        config.make(given | {"adapter": "lora"})


def test_an_adapter_of_another_base_or_kind_is_refused(folder: Path) -> None:
    first = adapted_run(folder, "first", adapter={"r": 4}, epochs=1, steps=1)
    described = first.folder / "adapter" / "adapter_config.json"
    values = json.loads(described.read_text())
    (described.parent / "manifest.json").unlink()  # it is changed on purpose
    described.write_text(json.dumps(values | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(InputError, match=r"modules_to_save.*merge=true"):
        config.make(settings(folder, "second") | {"model": str(described.parent)})
    described.write_text(json.dumps(values | {"target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match="is not what this base model"):
        train(config.make(settings(folder, "second") | {"model": str(described.parent)}))
