"""Prompt and prefix tuning: gradients are peft's own, packs are documents alone, and adapter/ is all that is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from resumed_runs import CHATML, folder, lines, settings
from safetensors.torch import load_file
from test_adapters import LENGTHS, micro_batch, tiny
from torch.nn import functional
from transformers import AutoModelForCausalLM

from deft.commands.chat import run_generate
from deft.core.errors import InputError, Problems
from deft.evaluation import generate as generation
from deft.model import load, selftest, virtual_tokens
from deft.model.config import AdapterConfig
from deft.run import config
from deft.run.train import Run, train
from deft.training import objectives
from deft.training.masters import Masters

__all__ = ["folder"]
FAMILIES = ("Llama", "Qwen3", "Gemma3Text", "GPTNeoX")
KINDS: list[Any] = ["prompt", "prefix"]


def with_virtual(family: str, name: Any, tokens: int = 5) -> Any:
    model = tiny(family)
    virtual_tokens.attach(model, AdapterConfig(name=name, tokens=tokens))
    return model


def by_peft(family: str, name: str, model: Any) -> Any:
    """peft's own model on the same base and values."""
    described = virtual_tokens.described(model)
    kind = described.pop("peft_type")
    made = (PromptTuningConfig if kind == "PROMPT_TUNING" else PrefixTuningConfig)(**described)
    wrapped: Any = get_peft_model(tiny(family), made)
    with torch.no_grad():
        wrapped.prompt_encoder.default.embedding.weight.copy_(virtual_tokens.of(model).virtual)
    return wrapped


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_peft(family: str, name: str) -> None:
    model, batch = with_virtual(family, name), micro_batch()
    causal_lm = selftest.choose(model)
    assert causal_lm.mode == ("packed" if name == "prompt" else "alone")
    assert ("one at a time" in causal_lm.note) == (name == "prefix")
    total = causal_lm(batch, objectives.load("nll")).nll_sum
    total.backward()
    trained = [each for each in model.parameters() if each.requires_grad]
    assert len(trained) == 1
    wrapped, parts = by_peft(family, name, model), []
    for document in batch.tokens.split(list(LENGTHS)):
        parts.append(wrapped(input_ids=document[None]).logits[0, -len(document) :].float())
    losses = functional.cross_entropy(torch.cat(parts)[batch.rows], batch.targets, reduction="none")
    meant = (losses * batch.weights).sum()
    meant.backward()
    gradient = wrapped.prompt_encoder.default.embedding.weight.grad
    assert total.item() == pytest.approx(meant.item(), rel=1e-6)
    assert float((trained[0].grad - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_what_layers_keep_does_not_change_gradients(name: str, checkpointing: Any) -> None:
    gradients = []
    for mode in ("none", checkpointing):
        torch.manual_seed(1)
        model = with_virtual("Llama", name)
        causal_lm = selftest.choose(model)
        causal_lm.checkpointing = mode
        causal_lm(micro_batch(), objectives.load("nll")).nll_sum.backward()
        gradients.append(virtual_tokens.of(model).virtual.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_whose_head_is_not_understood_sees_them_too(name: str) -> None:
    model, batch = with_virtual("Llama", name), micro_batch()
    causal_lm = selftest.choose(model)
    meant = causal_lm(batch, objectives.load("nll")).nll_sum
    assert causal_lm.mode != "whole"
    causal_lm.mode = "whole"
    model.set_attn_implementation("sdpa")
    assert causal_lm(batch, objectives.load("nll")).nll_sum.item() == pytest.approx(meant.item(), rel=1e-5)


def test_padding_counts_virtual_tokens() -> None:
    causal_lm = selftest.choose(with_virtual("GPTNeoX", "prompt"))
    assert causal_lm.padding(micro_batch()) == 5 * len(LENGTHS)


def test_a_layer_without_keys_is_refused() -> None:
    made = transformers.MambaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1)
    model: Any = AutoModelForCausalLM.from_config(made)
    with pytest.raises((InputError, TypeError), match="do not all keep keys"):
        virtual_tokens.attach(model, AdapterConfig(name="prefix"))


def run_of(folder: Path, output: str, name: str, **more: Any) -> Run:
    adapter = {"name": name, "tokens": 4}
    return train(config.make(settings(folder, output, **{"adapter": adapter, "dropout": "off", **more})))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_leaves_what_peft_reloads(
    folder: Path, name: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(folder, "run", name, precision=precision, optimizer__lr=0.3)
    said = " ".join(capsys.readouterr().out.split())
    assert "they cannot be merged, so there is no final/" in said
    assert not (run.folder / "final").exists()
    evaluated = [each["loss"] for each in lines(run.folder / "eval.jsonl")]
    assert evaluated[-1] < evaluated[0] - 0.01
    stored = load_file(run.folder / "checkpoints" / "step-000010" / "model-00001.safetensors")
    assert len([key for key in stored if key.startswith("weight.")]) == 1
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = {key: each.clone() for key, each in base.state_dict().items()}
    wrapped = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    ours, held = generation.load(run.folder / "adapter")
    assert held.chat_template == CHATML
    assert all(torch.equal(each, before[key]) for key, each in base.state_dict().items())
    causal_lm = selftest.choose(ours)
    batch = selftest._probe(ours)
    with torch.no_grad():
        hidden, head = causal_lm.hidden_and_head(batch)
        mine = functional.linear(hidden, head.weight)
        documents = batch.tokens.split(list(batch.documents))
        theirs = torch.cat([wrapped(input_ids=each[None]).logits[0, -len(each) :] for each in documents])
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-6
    moved = base(input_ids=batch.tokens[None, :11]).logits[0]
    assert float((theirs[:11] - moved).norm() / moved.norm()) > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_answers_are_those_of_peft(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(folder, "run", name, epochs=1, optimizer__lr=0.3)
    model, held = generation.load(run.result)
    asked, chosen = ["What is 1 + 1?", "What is 14 + 1111?"], generation.resolve({"max_new_tokens": 8})
    found = generation.complete(model, held, asked, generate=chosen)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    wrapped: Any = PeftModel.from_pretrained(base, run.result).eval()
    for question, answer in zip(asked, found, strict=True):
        ids = torch.tensor([held.hf(question)["input_ids"]])
        assert answer == generation.continuation(held, ids[0].tolist(), _greedy(wrapped, ids, 8))
    beams = generation.resolve({"max_new_tokens": 8, "num_beams": 3})
    alone = [generation.complete(model, held, [each], generate=beams)[0] for each in asked]
    assert generation.complete(model, held, asked, generate=beams) == alone
    capsys.readouterr()
    (streamed,) = run_generate(run.result, asked[:1], is_chat=False, generate={"max_new_tokens": 8})
    assert streamed == found[0]


@torch.no_grad()
def _greedy(model: Any, ids: torch.Tensor, length: int) -> list[int]:
    found: list[int] = []
    for _ in range(length):
        index = int(model(input_ids=torch.cat([ids, torch.tensor([found], dtype=ids.dtype)], 1)).logits[0, -1].argmax())
        if index == 1:  # </s>
            return found
        found.append(index)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_killed_and_resumed_is_the_same_run(folder: Path, name: str) -> None:
    for output in ("whole", "cut"):
        run_of(folder, output, name)
    for part in ("adapter", "checkpoints/step-000010"):
        (folder / "cut" / part).rename(folder / part.replace("/", "_"))
    run_of(folder, "cut", name)
    for log in ("metrics", "eval", "samples"):
        assert lines(folder / "whole" / f"{log}.jsonl") == lines(folder / "cut" / f"{log}.jsonl")
    one, other = (load_file(folder / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert torch.equal(one["prompt_embeddings"], other["prompt_embeddings"])


def test_a_finished_run_says_so_and_can_be_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_of(folder, "run", "prompt", epochs=1)
    again = run_of(folder, "run", "prompt", epochs=1)
    assert "finished at step 5" in " ".join(capsys.readouterr().out.split())
    assert again.result == first.folder / "adapter"
    assert virtual_tokens.count(again.model) == 4
    with pytest.raises(Problems, match=r"mv \S+/adapter \S+/adapter-5"):
        run_of(folder, "run", "prompt", epochs=2)
    given = settings(folder, "second", epochs=1, steps=1, optimizer__lr=1e-9) | {"model": str(again.result)}
    made = config.make(given)
    assert made.adapter is not None
    assert (made.model, made.adapter.name, made.adapter.tokens) == (str(folder / "model"), "prompt", 4)
    before, after = (load_file(run.result / "adapter_model.safetensors") for run in (first, train(made)))
    assert torch.allclose(before["prompt_embeddings"], after["prompt_embeddings"], atol=1e-6)


def test_where_a_model_is_due_a_run_names_what_it_has_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(folder, "run", "prompt", epochs=1, steps=1)
    monkeypatch.chdir(folder)
    for final in (str(run.folder / "final"), "run/final"):
        with pytest.raises(InputError, match=r"there is no such folder; this run has left \S+/adapter alone"):
            load.inspect(final)
    with pytest.raises(InputError, match=r"this is a run; what it has left is \S+/adapter"):
        load.inspect(str(run.folder))
    path = run.result / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    (run.result / "manifest.json").unlink()  # as of a folder of peft's
    with pytest.raises(InputError, match="cannot be read"):
        generation.load(run.result)


def test_settings_of_virtual_tokens(folder: Path) -> None:
    made = config.load(None, ["model=a", "data=b", "adapter=prompt"])
    assert made.adapter is not None
    assert (made.adapter.tokens, made.optimizer.lr) == (10, 3e-2)
    assert config.make(json.loads(made.model_dump_json())) == made
    assert config.load(None, ["model=a", "data=b", "adapter.name=prefix"]).optimizer.lr == 1e-2
    with pytest.raises(Problems, match=r"r has no effect with name=prompt"):
        config.load(None, ["model=a", "data=b", "adapter=prompt", "adapter.r=8"])
    with pytest.raises(Problems, match=r"tokens has no effect with name=lora"):
        config.load(None, ["model=a", "data=b", "adapter=lora", "adapter.tokens=8"])
    with pytest.raises(Problems, match=r"max_length: 128 is more than the model's 124 positions"):
        run_of(folder, "run", "prompt", max_length=128)
    with pytest.raises(InputError, match=r"data.add_tokens: has no place in a file of prefix tuning"):
        run_of(folder, "run", "prefix", data__add_tokens=["<x>"])


def test_gradients_of_many_documents_are_summed_in_fp32() -> None:
    """In bf16 the 300th document would add nothing to the sum of the others."""
    torch.manual_seed(0)
    embedding = virtual_tokens.PromptEmbedding(torch.nn.Embedding(4, 2).requires_grad_(False), torch.randn(1, 2))
    embedding.bfloat16()
    masters = Masters(embedding.named_parameters(), torch.bfloat16)
    embedding(torch.full((600,), 4)).sum().backward()
    assert masters.gradient("virtual").tolist() == [[600.0, 600.0]]
