"""New tokens: one token in the texts of rows, rows of their own in embedding and head, all others as they were."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from resumed_runs import CHATML, differences, folder, settings
from safetensors.torch import load_file
from tiny_tokenizers import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer

from deft.commands.show.tokens import TokenTexts
from deft.core.errors import InputError, Problems
from deft.core.types import Encoded, Origin
from deft.encoding import tokenizer as edge
from deft.export.folder import logits
from deft.model import adapters, vocabulary
from deft.model.config import AdapterConfig, FreezeConfig
from deft.model.trainable import Trainable
from deft.run import config
from deft.run.train import Run, train
from deft.training.masters import Masters

__all__ = ["folder"]
NEW = ["<|good|>", "<|bad|>"]


@pytest.fixture
def good_and_bad(folder: Path) -> Path:
    """The rows of `folder`, each with a control token in front of its question."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["messages"][0]["content"] = NEW[number % 2] + row["messages"][0]["content"]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write(path: Path, family: str, is_tied: bool, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
    """A tiny model with the tokenizer of the tests, which has fewer tokens than `vocab_size` where that is more."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    made = getattr(transformers, f"{family}Config")(**sizes, **heads, tie_word_embeddings=is_tied, eos_token_id=1)
    AutoModelForCausalLM.from_config(made).to(dtype).save_pretrained(path)
    tokenizer = byte_level(puts_bos=True)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    tokenizer.chat_template = None


def small(family: str) -> Any:
    """80 tokens, one layer, a head of its own."""
    sizes = {"vocab_size": 80, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    made = getattr(transformers, f"{family}Config")(**sizes, num_attention_heads=2)
    return AutoModelForCausalLM.from_config(made)


def run_with(folder: Path, output: str, **more: Any) -> Run:
    return train(config.make(settings(folder, output, **{"data__add_tokens": NEW, "dropout": "off", **more})))


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def test_a_token_is_one_wherever_it_stands_and_control_tokens_stay_text() -> None:
    held = edge.wrap(byte_level())
    more = held.with_tokens(NEW)
    assert more.new_ids == range(len(held.hf), len(held.hf) + 2)
    for ids in (more.ids, more.continuation, lambda text: more.literal(text, continues=True)):
        assert ids("a<|good|>b<|bad|>") == [*more.ids("a"), more.new_ids[0], *more.ids("b"), more.new_ids[1]]
    assert more.literal("<|im_end|>", continues=False) == held.literal("<|im_end|>", continues=False)
    assert len(more.literal("<|im_end|>", continues=False)) > 1
    assert len(held.ids("<|good|>")) > 1
    assert more.with_tokens(NEW).new_ids == range(0)
    shown = TokenTexts(more).shown(Encoded(Origin("a", 1), np.array(more.ids("a<|good|>")), np.ones(2)))
    assert [(each.text, each.is_special) for each in shown] == [("a", False), ("<|good|>", True)]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["<|im_end|>"], r"'<\|im_end\|>' is a control token of this tokenizer already"),
        (["he"], "'he' is an ordinary token"),
        ([""], "is blank"),
        ([" "], "is blank"),
        (["<a> "], "has white space at an end"),
        (["<a>", "<b>", "<a>"], "'<a>' stands twice"),
    ],
)
def test_what_cannot_be_a_new_token_is_refused(folder: Path, tokens: list[str], said: str) -> None:
    with pytest.raises((InputError, Problems), match=said):
        run_with(folder, "run", data__add_tokens=tokens)


def test_rows_with_it_are_learnt_as_one_token(good_and_bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_with(good_and_bad, "run", steps=1, data__add_tokens=[*NEW, "<|never|>"])
    said = " ".join(capsys.readouterr().out.split())
    size = len(byte_level())
    assert f"3 new tokens: embeddings {size} -> {-(-(size + 3) // 64) * 64}" in said
    assert "new tokens in the rows: <|good|> 13, <|bad|> 13" in said
    assert "<|never|> stands in no row" in said


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Phi"])
def test_new_rows_are_the_mean_of_those_in_use(family: str) -> None:
    torch.manual_seed(0)
    model = small(family)
    parts = [model.get_input_embeddings().weight, *model.get_output_embeddings().parameters()]
    for part in parts:
        torch.nn.init.normal_(part)
    before = [part.detach().clone() for part in parts]
    for ids, size in ((range(70, 72), 80), (range(79, 82), 128)):
        Trainable(new_ids=ids).apply(model)
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == size
        parts = [model.get_input_embeddings().weight, *model.get_output_embeddings().parameters()]
        assert len(parts) == (3 if family == "Phi" else 2)
        for part, old in zip(parts, before, strict=True):
            mean = old[: ids.start].mean(0)
            changed = slice(ids.start, ids.stop if size == 80 else size)
            assert torch.allclose(part[changed], mean.expand_as(part[changed]), atol=1e-6)
            assert torch.equal(part[: ids.start], old[: ids.start])
            assert size > 80 or torch.equal(part[ids.stop :], old[ids.stop :])
        before = [part.detach().clone() for part in parts]


@pytest.mark.parametrize(
    ("family", "is_tied", "free", "precision"),
    [
        ("Llama", True, 0, "fp32"),
        ("Llama", False, 0, "bf16"),
        ("Qwen3", True, 7, "bf16"),
        ("Qwen3", False, 7, "fp32"),
    ],
)
def test_an_adapter_learns_new_rows_and_leaves_the_old_ones(
    good_and_bad: Path, family: str, is_tied: bool, free: int, precision: str
) -> None:
    folder, size = good_and_bad, len(byte_level())
    write(folder / "model", family, is_tied, size + free, torch.bfloat16 if precision == "bf16" else torch.float32)
    more = {"adapter": {"r": 4}, "optimizer__weight_decay": 0.1, "precision": precision, "epochs": 10, "data__eval": 0}
    more |= {"evaluate__every": None, "evaluate__prompts": None, "checkpoint__every": 50}
    run = run_with(folder, "run", **more)
    assert len(run.metrics) == 50
    base, final = loaded(folder / "model"), loaded(run.folder / "final")
    new = range(size, size + 2)
    assert final.config.vocab_size == vocabulary.size_with(new, size + free)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, now = (getattr(model, name)().weight.detach() for model in (base, final))
        assert torch.equal(old[:size], now[:size])
        assert torch.equal(old[new.stop :], now[new.stop : size + free])
        mean = old[:size].float().mean(0)
        assert all(float((now[index].float() - mean).norm() / mean.norm()) > 0.1 for index in new)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "final")
    assert tokenizer.convert_tokens_to_ids(NEW) == [*new]
    stored = load_file(run.folder / "checkpoints" / "step-000050" / "model-00001.safetensors")
    ends = {f"weight.model.embed_tokens.weight[{size}:{size + 2}]", f"weight.lm_head.weight[{size}:{size + 2}]"}
    found = {name for name in stored if name.startswith("weight.") and "lora_" not in name}
    assert found == (ends if not is_tied else {name for name in ends if "embed" in name})
    assert all(len(stored[name]) == 2 for name in found)
    _check_adapter_reloads(folder, run, tokenizer, base, size + free)


def _check_adapter_reloads(folder: Path, run: Run, tokenizer: Any, base: Any, rows: int) -> None:
    """peft gives the base the same logits: resized by hand, and by its own auto class."""
    ids = tokenizer("<|good|>What is 2 + 2?<|bad|>")["input_ids"]
    merged = logits(loaded(run.folder / "final").float(), ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if len(tokenizer) > rows:
            base.resize_token_embeddings(len(tokenizer))
        by_hand = logits(PeftModel.from_pretrained(base.float(), run.folder / "adapter").eval(), ids)
        by_itself = logits(AutoPeftModelForCausalLM.from_pretrained(run.folder / "adapter").float().eval(), ids)
    limit = 2e-6 if base.config.dtype == torch.float32 else 2e-2  # merged weights are rounded to bf16
    for found in (by_hand, by_itself):
        meant = merged[:, : len(tokenizer)]
        assert float((found[:, : len(tokenizer)] - meant).norm() / meant.norm()) < limit


def test_all_is_trained_without_an_adapter(good_and_bad: Path) -> None:
    run = run_with(good_and_bad, "run", epochs=1, precision="fp32")
    base, final = (load_file(each / "model.safetensors") for each in (good_and_bad / "model", run.folder / "final"))
    size = len(byte_level())
    old, now = (each["model.embed_tokens.weight"] for each in (base, final))
    assert len(now) % 64 == 0
    assert not torch.equal(old, now[:size])
    ids = run.tokenizer("<|good|>hello")["input_ids"]
    assert size in ids
    ours, served = logits(run.model.float(), ids), logits(loaded(run.folder / "final"), ids)
    assert float((ours - served).norm() / ours.norm()) < 1e-6


def test_of_a_frozen_embedding_the_new_rows_are_trained(good_and_bad: Path) -> None:
    run = run_with(good_and_bad, "run", epochs=1, freeze={"names": ["embed_tokens"]})
    base, final = (load_file(each / "model.safetensors") for each in (good_and_bad / "model", run.folder / "final"))
    size = len(byte_level())
    old, now = (each["model.embed_tokens.weight"] for each in (base, final))
    assert torch.equal(old, now[:size])
    assert not torch.equal(now[size], now[size + 1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_is_the_same_run(good_and_bad: Path, precision: str) -> None:
    folder, more = good_and_bad, {"adapter": {"r": 4}, "precision": precision}
    for output in ("whole", "cut"):
        run_with(folder, output, **more)
    for part in ("final", "adapter", "checkpoints/step-000008"):
        (folder / "cut" / part).rename(folder / part.replace("/", "_"))
    run_with(folder, "cut", **more)
    assert differences(folder, "whole", "cut") == []
    one, other = (load_file(folder / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_goes_on_with_the_same_tokens_alone(good_and_bad: Path) -> None:
    run = run_with(good_and_bad, "run", adapter={"r": 4}, epochs=1, steps=2)
    (run.folder / "final").rename(good_and_bad / "final")
    with pytest.raises(Problems, match=r"tokenizer: its files changed|tokenizer"):
        run_with(good_and_bad, "run", adapter={"r": 4}, epochs=1, steps=3, data__add_tokens=[*NEW, "<|more|>"])


def test_an_adapter_of_new_tokens_is_not_gone_on_from(good_and_bad: Path) -> None:
    run = run_with(good_and_bad, "run", adapter={"r": 4}, epochs=1, steps=1)
    described = json.loads((run.folder / "adapter" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows
    for more in ({}, {"merge": True}):
        with pytest.raises(InputError, match=r"rows of new tokens.*name the final/ of its run as model"):
            run_with(good_and_bad, "more", model=str(run.folder / "adapter"), data__add_tokens=(), **more)


def test_a_trained_model_has_its_tokens_already(good_and_bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_with(good_and_bad, "first", steps=1)
    second = run_with(good_and_bad, "second", steps=1, model=str(first.folder / "final"))
    assert "<|good|>, <|bad|>: in the vocabulary already" in " ".join(capsys.readouterr().out.split())
    assert len(second.tokenizer) == len(first.tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_of_rows(dtype: torch.dtype) -> None:
    """Their gradient is the sum of what backward passes leave in these rows; the norm knows no other."""
    layer = torch.nn.Embedding(6, 2)
    masters = Masters(layer.named_parameters(), dtype, {"weight": slice(4, 6)})
    assert list(masters) == ["weight"]
    assert list(masters.parameters) == ["weight[4:6]"]
    before = masters["weight"].clone()
    for ids in ([0, 4], [4, 5]):
        masters.collect()
        layer(torch.tensor(ids)).float().sum().backward()
    assert masters.gradient("weight[4:6]").tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert float(masters.squared_norm()) == 10.0
    with torch.no_grad():
        for master_B, gradient_B in masters.updates("weight[4:6]"):
            master_B.sub_(gradient_B, alpha=1e-4)
    after = masters["weight"]
    assert torch.equal(after[:4], before[:4])
    assert torch.allclose(before[4:] - after[4:], torch.tensor([[2e-4, 2e-4], [1e-4, 1e-4]]), atol=1e-6)
    assert layer.weight.grad is None
    layer(torch.tensor([1])).float().sum().backward()
    masters.zero_grad()
    assert layer.weight.grad is None


def test_an_embedding_with_an_adapter_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.embed_tokens cannot have an adapter"):
        Trainable(AdapterConfig(target=("embed_tokens",)), FreezeConfig(), range(80, 82)).apply(small("Llama"))


def test_names_in_files_of_peft_are_those_that_peft_gives(good_and_bad: Path) -> None:
    run = run_with(good_and_bad, "run", adapter={"r": 4}, steps=1)
    stored = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    described = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    size = len(byte_level())
    assert described["trainable_token_indices"] == {"model.embed_tokens": [size, size + 1]}
    assert {name for name in stored if "lora" not in name} == {
        adapters.peft_name(f"model.embed_tokens.weight[{size}:{size + 2}]")
    }
