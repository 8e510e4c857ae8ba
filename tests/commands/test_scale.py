"""`deft check --world`: what a run takes on many GPUs, from its rows and a config.json."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from encoders import chat
from rich.console import Console
from tiny_models import write_llama
from tiny_tokenizers import CHATML
from transformers import AutoConfig

from deft.commands import check, scale
from deft.commands.scale import Scaled
from deft.core.errors import InputError, MemoryShort, Problems
from deft.run import config, scaling

ROWS = [chat(f"What is {n}?", "It is " + "very " * n + "big.") for n in range(24)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """No weights: a tokenizer, and the config of a model that would need 100 GiB and more."""
    folder = write_llama(tmp_path / "model", chat_template=CHATML)
    (folder / "model.safetensors").unlink()
    wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "attention_dropout": 0.0}
    AutoConfig.from_pretrained(folder, **wide, **heads).save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "run.yaml").write_text(f"model: {folder}\ndata: {tmp_path / 'rows.jsonl'}\ndevice: cuda\n")
    return folder


def scaled(folder: Path, ranks: int, kind: str = "h100", **settings: Any) -> tuple[Scaled, str]:
    console = Console(file=io.StringIO(), width=120)
    given = {"model": str(folder), "data__train": str(folder.parent / "rows.jsonl"), **settings}
    found = scale.run(config.make(config.nested(given)), ranks, 8, kind, str(folder.parent / "found.json"), console)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_command_needs_no_gpu_and_no_weights(tmp_path: Path, model: Path) -> None:
    line = [sys.executable, "-m", "deft", "check", "run.yaml", "--world", "64", "--json", "found.json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^GiB of each GPU +shard=1 +\*shard=8 +shard=64$", done.stdout, re.MULTILINE)
    assert re.search(r"^fits +no +yes +yes$", done.stdout, re.MULTILINE)
    assert re.search(r"^shard +(8|64) is the fastest that fits; \d GPUs are the fewest", done.stdout, re.MULTILINE)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [way["layout"]["shard"] for way in found["ways"]] == [1, 8, 64]
    assert found["shard"] in (8, 64)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl", "run.yaml", "found.json"}


def test_its_numbers_are_those_of_the_rows_and_of_the_formulas(tmp_path: Path, model: Path) -> None:
    small, settings = write_llama(tmp_path / "small", chat_template=CHATML), {"batch__examples": 8, "epochs": 1}
    given = {"model": str(small), "data__train": str(tmp_path / "rows.jsonl"), **settings}
    plan = check.run(config.make(config.nested(given)), console=Console(quiet=True)).plan
    found, said = scaled(model, 8, **settings)
    assert plan is not None
    assert found.load.tokens == plan.tokens_per_step.mean
    assert found.load.learnt == pytest.approx(plan.targets_per_step.mean / plan.tokens_per_step.mean)
    assert found.load.tokens / 8 < found.load.attended < found.load.longest
    for way in found.ways:
        assert way.memory == scaling.memory(found.sizes, way.layout)
        assert f"{way.memory.total / 2**30:,.2f}" in said
    written = json.loads((model.parent / "found.json").read_text())
    assert [way["memory"]["total"] for way in written["ways"]] == [way.memory.total for way in found.ways]
    assert written["ways"][0]["layout"]["dtype"] == "torch.bfloat16"


def test_settings_of_the_run_count(model: Path) -> None:
    full, _ = scaled(model, 8)
    lora, said = scaled(model, 1, adapter="lora", microbatch_tokens=64, precision="fp32")
    assert lora.sizes.whole.frozen == full.sizes.whole.trained
    assert (lora.ways[0].layout.tokens, lora.ways[0].memory.low_bits) == (lora.load.longest, 0)
    assert (lora.shard, lora.least) == (1, 1)
    assert "1 GPU is the fewest" in said
    assert "keeps a copy" not in said
    assert "note: kl keeps a copy" in scaled(model, 8, loss="kl")[1]


def test_the_runs_own_shard_is_marked(model: Path) -> None:
    found, said = scaled(model, 8, shard=2)
    assert ([way.layout.shard for way in found.ways], found.own) == ([1, 2, 8], 2)
    assert re.search(r"^GiB of each GPU +shard=1 +\*shard=2 +shard=8$", said, re.MULTILINE)
    found, said = scaled(model, 8, shard=1)
    assert re.search(r"^\* +shard=1 is what this run is set to and does not fit; set shard=8$", said, re.MULTILINE)
    assert "does not fit" not in scaled(model, 8)[1]
    with pytest.raises(Problems, match="there are 8 ranks, which 3 does not divide"):
        scaled(model, 8, shard=3)


def test_what_fits_in_no_way_is_printed_and_then_refused_with_how_many_would_do(model: Path) -> None:
    with pytest.raises(MemoryShort, match=r"on each of 1 h100, which have 79.2; --world 2 is the fewest that fit"):
        scaled(model, 1)
    assert json.loads((model.parent / "found.json").read_text())["shard"] is None
    with pytest.raises(MemoryShort, match=r"1 h100, which have 0.5; take a smaller max_length, or train an adapter"):
        scaled(model, 1, "h100,memory=0.5")


def test_ranks_are_whole_nodes(model: Path) -> None:
    with pytest.raises(InputError, match="--world: 12 GPUs are not whole nodes of 8; take 8 or 16, or say --per-node"):
        scaled(model, 12)


def test_wrong_rows_are_named_as_ever(model: Path) -> None:
    (model.parent / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(Problems, match=r"rows.jsonl:1: messages: no assistant message"):
        scaled(model, 8)
