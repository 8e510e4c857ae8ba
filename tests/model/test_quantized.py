"""A quantised base computes as bitsandbytes and peft do, resumes to the same bits, and final/ is ordinary."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from resumed_runs import differences, folder, settings
from safetensors.torch import load_file
from test_adapters import micro_batch, peft_loss, tiny
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from deft.core import hardware
from deft.core.errors import InputError, Problems
from deft.model import adapters, quantized, security, selftest
from deft.model import load as models
from deft.model.config import AdapterConfig
from deft.model.trainable import Trainable
from deft.run import config, scaling
from deft.run.scaling import Sizes
from deft.run.train import Run, train
from deft.training import objectives

Linear4bit = pytest.importorskip("bitsandbytes").nn.Linear4bit

__all__ = ["folder"]
TOKENS = torch.arange(5, 40)[None]


def run_of(folder: Path, output: str, **more: Any) -> Run:
    chosen = {"adapter": {"r": 4}, "quantize": "nf4", "precision": "fp32", "dropout": "off", "evaluate__prompts": ()}
    return train(config.make(settings(folder, output, **{**chosen, **more})))


def prepared(family: str, kind: Any, name: Any = "lora", dtype: torch.dtype = torch.float32) -> Any:
    """A quantised model with an adapter that moves it."""
    model = tiny(family).to(dtype)
    Trainable(AdapterConfig(name=name, r=4), quantize=kind).apply(model)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.12), ("int8", 0.01)])
def test_linear_layers_of_the_body_alone_are_quantised(kind: Any, error: float) -> None:
    model, plain = tiny("Qwen3"), tiny("Qwen3")
    quantized.quantize(model, kind)
    found = quantized.layers(model)
    linear = [name for name, each in plain.named_modules() if type(each) is torch.nn.Linear]
    assert {*linear} - found.keys() == {"lm_head"}
    for name, layer in found.items():
        meant = plain.get_parameter(f"{name}.weight")
        assert 0 < float((layer.dequantize() - meant).norm() / meant.norm()) < error
    assert quantized.size(model) == sum(each.numel() for each in plain.parameters())


def test_nf4_is_that_of_bitsandbytes_with_double_quantisation() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 300)
    theirs = Linear4bit(128, 300, compute_dtype=torch.float32, quant_type="nf4")
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu").train()  # in evaluation mode it may compute in bf16
    ours, inputs = quantized.NF4Linear(plain), [torch.randn(5, 128).requires_grad_() for _ in range(2)]
    inputs[1].data = inputs[0].data.clone()
    outs = [layer(each) for layer, each in zip((ours, theirs), inputs, strict=True)]
    assert torch.allclose(*outs, atol=1e-5)
    for out in outs:
        out.square().sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-4)
    assert quantized.code_bytes(torch.nn.Sequential(ours)) < 0.6 * 128 * 300 + 2048


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize(("family", "kind"), [("Llama", "nf4"), ("GPTNeoX", "nf4"), ("Qwen3", "int8")])
def test_packed_is_alone_and_gradients_are_those_of_peft(family: str, kind: Any, name: Any) -> None:
    model, batch = prepared(family, kind, name), micro_batch()
    causal_lm = selftest.choose(model)
    assert causal_lm.mode == "packed"
    total = causal_lm(batch, objectives.load("nll")).nll_sum
    total.backward()
    ours = {key: each.grad for key, each in model.named_parameters() if each.requires_grad}
    plain = copy.deepcopy(model)
    quantized.undo(plain)
    plain.zero_grad()
    plain.set_attn_implementation("eager")
    meant = peft_loss(plain, batch)
    meant.backward()
    assert total.item() == pytest.approx(meant.item(), rel=1e-6)
    for key, gradient in ours.items():
        other = plain.get_parameter(key).grad
        assert float((gradient - other).norm() / other.norm()) < 1e-5, key


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_in_bf16_it_packs_as_well(kind: Any) -> None:
    causal_lm = selftest.choose(prepared("Llama", kind, dtype=torch.bfloat16))
    assert (causal_lm.mode, causal_lm.note) == ("packed", "")


def widen(model: Path) -> None:
    """Rows of whole blocks: with others bitsandbytes 0.50 computes something else on CPUs."""
    described = AutoConfig.from_pretrained(model)
    described.hidden_size, described.head_dim, described.intermediate_size = 64, 16, 128
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(described).save_pretrained(model)


def on_quantised_base(folder: Path, adapter: Path) -> Any:
    """What plain transformers, bitsandbytes and peft make of it."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **nf4)
    )
    model = PeftModel.from_pretrained(base, adapter).eval()
    for layer in model.modules():
        layer.training = isinstance(layer, Linear4bit)  # in evaluation mode it may compute in bf16
    return model


def test_final_is_ordinary_and_the_adapter_is_at_home_on_the_quantised_base(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    widen(folder / "model")
    run = run_of(folder, "run", epochs=4, evaluate__every=None)
    losses = [line["loss"] for line in run.metrics]
    assert len(losses) == 20
    assert sum(losses[-4:]) < sum(losses[:4]) - 1.0
    said = " ".join(capsys.readouterr().out.split())
    assert "quantize=nf4: 14 linear layers in" in said
    assert "base dequantised in 14 layers" in said
    assert "quantization_config" not in json.loads((run.folder / "final" / "config.json").read_text())
    stored = load_file(run.folder / "checkpoints" / "step-000020" / "model-00001.safetensors")
    assert all("lora_" in name for name in stored if name.startswith("weight."))
    served = (
        "import sys; sys.modules['bitsandbytes'] = None; import torch, transformers as t; torch.save(t.AutoModelFor"
        "CausalLM.from_pretrained(sys.argv[1])(input_ids=torch.arange(5, 40)[None]).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", served, run.folder / "final", folder / "logits"], check=True)
    ours = torch.load(folder / "logits", weights_only=True)
    with torch.no_grad():
        theirs = on_quantised_base(folder, run.folder / "adapter")(input_ids=TOKENS).logits
        unquantised = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "model"), run.folder / "adapter"
        )(input_ids=TOKENS).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert float((unquantised - theirs).norm() / theirs.norm()) > 1e-2


@pytest.mark.parametrize(("kind", "precision"), [("nf4", "bf16"), ("int8", "fp32")])
def test_killed_and_resumed_is_the_same_run(folder: Path, kind: str, precision: str) -> None:
    more = {"precision": precision, "steps": 4, "evaluate__every": 4, "evaluate__prompts": ["What is 1?"]}
    for name in ("whole", "cut"):
        run_of(folder, name, quantize=kind, **more)
    for part in ("final", "adapter", "checkpoints/step-000004"):
        (folder / "cut" / part).rename(folder / part.replace("/", "_"))
    run_of(folder, "cut", quantize=kind, **more)
    assert differences(folder, "whole", "cut") == []
    (folder / "cut" / "final").rename(folder / "again")
    with pytest.raises(Problems, match=r"quantize: \w+ -> off"):
        run_of(folder, "cut", quantize="off", **more)


def test_an_adapter_is_at_home_on_its_quantised_base_alone(folder: Path) -> None:
    run = run_of(folder, "run", steps=1)
    with pytest.raises(Problems, match=r"was trained over a base in nf4, not off; give quantize=nf4"):
        run_of(folder, "more", adapter=None, quantize="off", model=str(run.folder / "adapter"))
    run_of(folder, "more", adapter=None, steps=1, model=str(run.folder / "adapter"))


def test_what_is_not_trained_is_refused(folder: Path) -> None:
    with pytest.raises(Problems, match=r"quantize: what is quantised cannot be trained itself: give adapter=lora"):
        run_of(folder, "run", adapter=None)
    with pytest.raises(Problems, match=r"load_in_4bit.*quantize \(nf4\)"):
        run_of(folder, "run", load_in_4bit=True)
    described = json.loads((folder / "model" / "config.json").read_text())
    codes = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "model" / "config.json").write_text(json.dumps({**described, "quantization_config": codes}))
    with pytest.raises(
        Problems, match=r"quantized \(bitsandbytes\); name the model that it was made from; quantize=nf4"
    ):
        run_of(folder, "run")


def test_without_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"quantize: nf4 needs bitsandbytes; pip install 'deft-sft\[quant\]'"):
        run_of(folder, "run")
    assert run_of(folder, "run", quantize="int8", steps=1).metrics


def test_memory_is_known_before_weights_are_loaded(folder: Path) -> None:
    base = models.inspect(str(folder / "model"))
    lora = AdapterConfig(r=4)
    whole, codes = (models.summarise(base, Trainable(lora, quantize=kind)) for kind in ("off", "nf4"))
    sizes = [Sizes.of(*models.skeleton(base, Trainable(lora, quantize=kind))).whole for kind in ("off", "nf4")]
    saved = scaling.state(sizes[0], torch.bfloat16).total - scaling.state(sizes[1], torch.bfloat16).total
    assert saved == 2 * codes.quantized - codes.quantized_bytes
    assert (whole.parameters, whole.trained) == (codes.parameters, codes.trained)
    model = tiny("Llama")
    quantized.quantize(model, "nf4")
    real = models.load(base, device="cpu", dtype=torch.float32)
    quantized.quantize(real, "nf4")
    assert codes.quantized_bytes == quantized.code_bytes(real)


def test_the_forecast_is_of_codes(folder: Path) -> None:
    from deft.run import forecast

    wide = tiny("Llama").config
    wide.hidden_size, wide.intermediate_size, wide.num_hidden_layers = 512, 1024, 4
    machine = hardware.resolve("cpu", "bf16", "auto")
    batch, loss = micro_batch(), objectives.load("nll")
    state = {}
    for kind in ("off", "int8", "nf4"):
        trained = Trainable(AdapterConfig(r=2), quantize=kind)
        state[kind] = forecast.trace(wide, batch, loss, machine, True, "none", trained).state_bytes
    codes = 4 * (2 * 512 * 64 + 2 * 512 * 32 + 3 * 512 * 1024)
    assert state["off"] - state["int8"] == pytest.approx(codes, rel=0.1)
    assert state["off"] - state["nf4"] == pytest.approx(1.48 * codes, rel=0.1)


def test_no_package_is_given_kernels_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetching = "try:\n    import kernels\n    fetches = True\nexcept ImportError:\n    fetches = False\n"
    for name, text in (("kernels", ""), ("bitsandbytes", fetching), ("peft", fetching)):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert not quantized.bitsandbytes().fetches
    assert not adapters.imported_peft("adapter").fetches
    with security.without_kernels(), pytest.raises(ImportError):
        __import__("kernels")
    kernels = __import__("kernels")
    with security.without_kernels():
        pass
    assert sys.modules["kernels"] is kernels
