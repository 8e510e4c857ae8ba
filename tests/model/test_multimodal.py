"""Models that see as well: trained on text alone, all other parts saved back bit for bit, the processor with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_tokenizers import byte_level
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import deft
from deft.core.hardware import Machine
from deft.model import load, multimodal, selftest
from deft.plan import loader
from deft.run import forecast
from deft.training import chunked

TEXT = {
    "vocab_size": 520,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": 28, "patch_size": 14}
QWEN_SIGHT = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
QWEN_MARKS = {"image_token_id": 519, "video_token_id": 518, "vision_start_token_id": 517}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
LINEAR = {f"linear_{part}": 2 if part.startswith("num") else 8 for part in ("num_key_heads", "num_value_heads")}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}


def gemma3() -> Any:
    text = TEXT | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=SIGHT | PATCHES,
        mm_tokens_per_image=4,
        image_token_index=519,
        boi_token_index=518,
        eoi_token_index=517,
    )


def qwen2_5_vl() -> Any:
    text = TEXT | {"rope_parameters": ROPE}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_SIGHT, **QWEN_MARKS)


def qwen3_5() -> Any:
    text = TEXT | LINEAR | {"layer_types": ["linear_attention", "full_attention"], "rope_parameters": ROPE}
    sight = QWEN_SIGHT | {"num_position_embeddings": 16}
    return transformers.Qwen3_5Config(text_config=text, vision_config=sight, **QWEN_MARKS)


def llava() -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**SIGHT, **PATCHES),
        image_token_index=519,
    )


def trained(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


FAMILIES = {"gemma3": gemma3, "qwen2_5_vl": qwen2_5_vl, "qwen3_5": qwen3_5, "llava": llava}


def write(folder: Path, config: Callable[[], Any]) -> Path:
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config()).save_pretrained(folder)
    byte_level(puts_bos=True).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_language_model_learns(tmp_path: Path, name: str) -> None:
    model = load.load(load.inspect(str(write(tmp_path / "m", FAMILIES[name]))), device="cpu", dtype=torch.float32)
    learnt = set(trained(model).values())
    language = {*multimodal.text_body(model).parameters(), *model.get_output_embeddings().parameters()}
    assert learnt == language
    assert len(language) < len(list(model.parameters()))


def test_only_what_learns_counts_in_the_time_foretold(tmp_path: Path) -> None:
    model = load.load(load.inspect(str(write(tmp_path / "m", llava))), device="cpu", dtype=torch.float32)
    batch = loader.build([(np.arange(20), np.ones(20, np.float32))])
    traced = forecast.trace(llava(), batch, chunked.NLL, Machine(torch.device("cpu"), torch.float32, 64), is_alone=True)
    assert traced.parameters == sum(parameter.numel() for parameter in trained(model).values())


@pytest.mark.parametrize(("name", "mode"), [("gemma3", "packed"), ("qwen2_5_vl", "packed"), ("llava", "packed")])
def test_its_documents_are_packed(tmp_path: Path, name: str, mode: str) -> None:
    model = load.load(load.inspect(str(write(tmp_path / "m", FAMILIES[name]))), device="cpu", dtype=torch.float32)
    causal_lm = selftest.choose(model)
    assert (causal_lm.mode, causal_lm.note) == (mode, "")


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "llava"])
def test_other_parts_and_processor_are_in_the_export_as_they_were(tmp_path: Path, name: str) -> None:
    base = write(tmp_path / "model", FAMILIES[name])
    rows = [{"prompt": f"What is {n} + 2?", "completion": f" It is {n + 2}."} for n in range(8)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = deft.train(base, str(data), steps=2, batch=4, lr=1e-3, precision="bf16", output=str(tmp_path / "run"))
    final = run.folder / "final"
    assert AutoConfig.from_pretrained(final).architectures == AutoConfig.from_pretrained(base).architectures
    before, after = (load_file(folder / "model.safetensors") for folder in (base, final))
    learnt = trained(run.model).keys()
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(final)
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    sight = {name for name in before if "visi" in name or "visual" in name or "projector" in name}
    assert sight
    assert sight <= same, "other parts keep their bits, though the run computed in bf16 and they are saved in fp32"
    assert len(same) < len(before)
    assert learnt <= {name for name, _ in model.named_parameters()}
    assert (final / "preprocessor_config.json").read_text() == (base / "preprocessor_config.json").read_text()
