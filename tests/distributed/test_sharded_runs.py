"""Whole runs of ranks that share one model: the bytes of one rank, gone on with by any number and in any layout."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from architectures import build
from ranks import run, said
from resumed_runs import ROWS, differences, folder
from rich.console import Console
from safetensors.torch import load_file
from test_runs import job, killed, raising, stopping_after, whole
from test_world import on_ranks
from tiny_tokenizers import CHATML, byte_level
from transformers import BloomConfig, BloomForCausalLM

from deft.core import files
from deft.core.errors import Problems
from deft.distributed import watch
from deft.distributed.world import World
from deft.model import fused_layers
from deft.model import load as models
from deft.model.compiled_layers import smallest
from deft.model.config import of_folder as adapter_of_folder
from deft.run import build as builder
from deft.run import config, reading, spread
from deft.run.reading import Session
from deft.training import badstep, checkpoint, chunked

__all__ = ["folder"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize(
    "more", [{"precision": "bf16", "checkpoint__keep_best": 1}, {"adapter": {"name": "lora", "r": 4}}]
)
def test_two_ranks_then_one_then_three_have_the_bytes_of_one(folder: Path, more: dict[str, Any]) -> None:
    """With held-out loss and samples, ended by signals to a rank that writes nothing."""
    whole(folder, "alone", 1, **more)
    for ranks, until in ((2, 3), (1, 6), (3, 0)):
        place = folder / f"said-{until}"
        codes = run(place, ranks, job(folder, "several", stopping_after(until), shard=ranks, **more))
        assert codes == [75 if until else 0] * ranks, [said(place, rank) for rank in range(ranks)]
        assert ranks == 1 or f"each of 1 copies over {ranks} ranks" in said(place)
        if until:
            done = until if ranks > 1 else until - 1
            assert f"saved step {done}, run the same command again" in said(place)
            assert pieces_of(folder / "several" / "checkpoints" / checkpoint.name(done)) == set(range(ranks))
        if ranks > 1:
            assert said(place, 1) == ""
    assert "equal each rank's rows" in said(folder / "said-0")
    assert differences(folder, "several", "alone") == []
    mine, theirs = (files.read_manifest(folder / name / "final").files for name in ("several", "alone"))
    assert {key: each for key, each in mine.items() if key != files.CARD} == {
        key: each for key, each in theirs.items() if key != files.CARD
    }


def pieces_of(place: Path) -> set[int]:
    """The ranks that have written tensors of a checkpoint."""
    return {int(path.stem.partition("-of-rank-")[2] or 0) for path in place.glob("*.safetensors")}


def test_a_rank_that_is_killed_in_a_save_and_the_next_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 while the fourth step is saved: the second one is there, and two ranks go on from it."""
    monkeypatch.setattr(watch, "SILENCE", 4.0)
    whole(folder, "alone", 1, epochs=1)
    asked = job(folder, "several", epochs=1, shard=2)

    def of_rank(rank: int) -> None:
        plain = checkpoint._write_tensors

        def write(staging: Any, state: Any, *given: Any) -> None:
            if rank == 1 and state.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(staging, state, *given)

        checkpoint._write_tensors = write
        asked(rank)

    assert run(folder / "said-killed", 2, of_rank) == [6, -9], said(folder / "said-killed")
    assert "rank 1 was lost" in said(folder / "said-killed")
    assert checkpoint.steps(folder / "several" / "checkpoints") == [2]
    whole(folder, "several", 2, epochs=1, shard=2)
    assert "resumed step 2 of 5" in said(folder / "several-said")
    assert differences(folder, "several", "alone") == []


def test_a_flipped_bit_in_one_ranks_piece_is_not_trained_on(folder: Path) -> None:
    whole(folder, "alone", 1, epochs=1)
    asked = job(folder, "several", stopping_after(4), epochs=1, shard=2)
    assert run(folder / "said", 2, asked) == [75, 75], said(folder / "said")
    path = folder / "several" / "checkpoints" / "step-000004" / "optimizer-00001-of-rank-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    whole(folder, "several", 2, epochs=1, shard=2)
    told = said(folder / "several-said")
    assert "optimizer-00001-of-rank-00001.safetensors: checksum differs" in told.replace("\n", "")
    assert "Using step-2; 2 steps will be redone" in told
    assert differences(folder, "several", "alone") == []


def test_two_copies_over_four_ranks_then_three_ranks(folder: Path) -> None:
    """Whole runs in two layouts, the best checkpoint of which becomes the model."""
    more: dict[str, Any] = {"checkpoint__keep_best": 1, "precision": "fp32"}
    whole(folder, "alone", 1, **more)
    asked = job(folder, "several", stopping_after(4), shard=2, **more)
    assert run(folder / "said", 4, asked) == [75] * 4, said(folder / "said")
    whole(folder, "several", 3, shard=3, **more)
    assert differences(folder, "several", "alone") == []


def test_state_that_a_rule_makes_in_its_first_update_is_saved_and_found(folder: Path) -> None:
    """SGD's momentum, which is not there when a run goes on, nor in the checkpoint of a first step that was skipped."""
    more: dict[str, Any] = {"optimizer__name": "sgd", "skip_bad_steps": 1, "checkpoint__every": 1, "epochs": 1}

    def spoil(until: int) -> Callable[[int, int], float]:
        def at_step(rank: int, number: int) -> float:
            stopping_after(until)(rank, number)
            return float("nan") if number == 1 else 1.0

        return at_step

    assert run(folder / "said-alone", 1, job(folder, "alone", spoil(0), **more)) == [0], said(folder / "said-alone")
    for ranks, until in ((2, 3), (3, 4), (1, 0)):
        place = folder / f"said-{until}"
        codes = run(place, ranks, job(folder, "several", spoil(until), shard=ranks, **more))
        assert codes == [75 if until else 0] * ranks, [said(place, rank) for rank in range(ranks)]
    assert differences(folder, "several", "alone") == []


def test_a_bad_step_is_taken_apart_by_all(folder: Path) -> None:
    def spoil(rank: int, number: int) -> float:
        return float("nan") if (rank, number) == (1, 2) else 1.0

    more: dict[str, Any] = {"epochs": 1, "shard": 2}
    assert run(folder / "said", 2, job(folder, "run", spoil, skip_bad_steps=1, **more)) == [0, 0], said(folder / "said")
    assert "skipped (1 of 1 at most)" in said(folder / "said")
    assert run(folder / "said", 2, job(folder, "stopped", spoil, **more)) == [5, 5], said(folder / "said")
    assert "loss is not finite at step 2" in said(folder / "said")
    assert "saved step 1, run it again to go on" in said(folder / "said")
    batches, _ = badstep.read(folder / "stopped" / "bad-step-2")
    parts = json.loads((folder / "stopped" / "bad-step-2" / "step.json").read_text())["parts"]
    assert len(batches.micro_batches) == 2
    assert [each["microbatch"] for each in parts] == [1]
    assert all(math.isfinite(float(each["grad_norm"])) for each in parts)
    replayed = {name for file in (folder / "stopped" / "bad-step-2" / "weights").iterdir() for name in load_file(file)}
    assert replayed == {name for name in load_file(folder / "model" / "model.safetensors") if name != "lm_head.weight"}


@pytest.mark.parametrize(("fault", "codes"), [(raising, [6, 70]), (killed, [6, -9])])
def test_a_rank_that_fails_is_named_and_what_was_saved_before_stays(folder: Path, fault: Any, codes: list[int]) -> None:
    assert run(folder / "said", 2, job(folder, "run", fault, shard=2)) == codes, said(folder / "said")
    assert "rank 1" in said(folder / "said")
    assert "at step 3, " in said(folder / "said")
    assert "saved step 2, run it again to go on" in said(folder / "said")
    whole(folder, "run", 2, shard=2)
    whole(folder, "alone", 1)
    assert differences(folder, "run", "alone") == []


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"optimizer__name": "muon"}, "muon may update matrices as a whole"),
        ({"optimizer__name": "torch.optim:NAdam"}, "torch.optim:NAdam may update"),
        ({"adapter": "prompt"}, "prompt tuning"),
        ({"adapter": "lora", "quantize": "int8"}, "codes of int8"),
        (
            {"adapter": "lora", "data": {"train": "train.jsonl", "add_tokens": ["<new>"]}},
            "new tokens alone are trained",
        ),
        ({"loss__name": "kl"}, "the model that the run began with"),
    ],
)
def test_what_needs_the_whole_model_is_refused_by_name_or_has_it(
    more: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    asked = config.nested({"model": "model", "data": "train.jsonl", **more})
    assert spread.ranks(config.make(asked), World(0, 4)) == 1
    with pytest.raises(Problems) as error:
        spread.ranks(config.make({**asked, "shard": 2}), World(0, 4))
    assert what in str(error.value)
    assert "shard=1" in str(error.value)


def test_auto_is_the_ranks_of_a_machine_and_what_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"model": "model", "data": "train.jsonl"}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [spread.ranks(config.make(plain), World(0, size)) for size in (1, 2, 3, 4)] == [1, 2, 1, 2]
    assert spread.ranks(config.make({**plain, "shard": 4}), World(0, 4)) == 4
    assert spread.ranks(config.make({**plain, "shard": 4}), World()) == 1
    with pytest.raises(Problems, match="4 ranks, which 3 does not divide"):
        spread.ranks(config.make({**plain, "shard": 3}), World(0, 4))


ROW_BY_ROW: dict[str, dict[str, Any]] = {
    "bf16": {"name": "llama_tied"},
    "fp32": {"name": "qwen3", "files": "fp32", "precision": "fp32", "freeze__names": ["layers.0"]},
    "fp32 to bf16": {"name": "qwen3", "files": "fp32", "freeze__names": ["layers.0"]},
    "bf16 to fp32": {"name": "qwen3", "precision": "fp32"},
    "both in the files": {"name": "llama", "wide": ["norm", "q_proj"], "adapter": {"name": "dora", "r": 4}},
    "lora": {"name": "llama_tied", "adapter": {"name": "lora", "r": 4}},
    "lora, fp32 to bf16": {"name": "qwen2", "files": "fp32", "adapter": {"name": "rslora", "r": 4, "init": "gaussian"}},
    "dora": {"name": "qwen2", "adapter": {"name": "dora", "r": 4}},
    "dora, fp32 to bf16": {"name": "qwen3", "files": "fp32", "adapter": {"name": "dora", "r": 4, "init": "orthogonal"}},
    "dora, head": {"name": "llama", "files": "fp32", "adapter": {"name": "dora", "r": 4, "target": ["lm_head"]}},
    "gone on with": {"name": "qwen3", "start": {"name": "dora", "r": 4}},
}
WHOLE_FIRST: dict[str, dict[str, Any]] = {
    "experts": {"name": "mixtral", "precision": "fp32"},
    "experts, lora": {"name": "mixtral", "files": "fp32", "adapter": {"name": "lora", "r": 4}},
    "dora of columns": {"name": "gpt2", "adapter": {"name": "dora", "r": 4, "target": ["c_attn"]}},
    "gone on with embeddings": {"name": "llama", "start": {"name": "lora", "r": 4, "target": ["embed_tokens"]}},
}


def written(
    folder: Path, name: str, files: str = "bf16", wide: list[str] | None = None, start: Any = None, **more: Any
) -> Any:
    """The configuration of a run on a model that is written to a folder; wide: what lies in fp32 among others."""
    torch.manual_seed(1)
    model = build(name, DTYPES[files])
    for key, each in model.named_parameters():
        if any(part in key for part in wide or ()):
            each.data = each.data.float() * 1.001
    model.save_pretrained(folder / "model")
    byte_level().save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text(json.dumps({"text": "one and two"}) + "\n")
    if start is not None:
        settings = {"r": start["r"], "use_dora": start["name"] == "dora"}
        target = start.get("target", "all-linear")
        wrapped = peft.get_peft_model(model, peft.LoraConfig("CAUSAL_LM", **settings, target_modules=target))
        for key, each in wrapped.named_parameters():
            if "lora_" in key:
                each.data += torch.randn_like(each) * 0.1
        wrapped.save_pretrained(folder / "adapter")
        more["adapter"] = adapter_of_folder(folder / "adapter")
    plain = {"model": str(folder / "model"), "data": str(folder / "train.jsonl"), "device": "cpu", "shard": 3}
    return config.make(config.nested({"precision": "bf16", **plain, **more}))


def compared(world: World, asked: Any) -> dict[str, Any]:
    """What a rank of several has beside one that is alone; `whole` counts how often it has had all of the model."""
    checked = reading.check(asked, Session(world=world, console=Console(quiet=True)))
    fit: Any = SimpleNamespace(checkpointing="none")
    alone = builder.build(
        asked, lambda: builder.pretrained(checked.base, checked.machine), checked.machine, World(), base=checked.base
    )
    loads, plain = [], models.load
    models.load = lambda *given, **named: loads.append(named["device"]) or plain(*given, **named)  # type: ignore
    state = builder.load(asked, checked, fit, world, owns_process=False)
    shards = state.shards
    assert shards is not None
    mine = {name: shards.whole(each, shards.rows[name]) for name, each in state.masters.items()}
    ways = [(each.mode, fused_layers.trims(each.model)) for each in (state.causal_lm, alone.causal_lm)]
    losses = [float(each.causal_lm(smallest(), chunked.NLL).nll_sum.detach()) for each in (state, alone)]
    return {
        "odd": [name for name, each in alone.masters.items() if not torch.equal(mine[name], each)],
        "names": [*mine] == [*alone.masters] and [*state.masters.parameters] == [*alone.masters.parameters],
        "low": state.masters._low.keys() ^ alone.masters._low.keys(),
        "ways": ways[0] == ways[1],
        "losses": losses[0] == losses[1],
        "whole": [str(each) for each in loads],
    }


@pytest.mark.parametrize("case", [*ROW_BY_ROW, *WHOLE_FIRST])
def test_weights_are_read_row_by_row_where_the_files_have_them_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """On three ranks, the last of which has fewer rows; experts, which transformers makes of several, are whole first,
    on the CPU."""
    asked = written(tmp_path, **{**ROW_BY_ROW, **WHOLE_FIRST}[case])
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("DEFT_CACHE", str(tmp_path / "home"))
    same = {"odd": [], "names": True, "low": set(), "ways": True, "losses": True}
    expected = {**same, "whole": [] if case in ROW_BY_ROW else ["cpu"]}
    assert on_ranks(tmp_path / "said", 3, lambda world: compared(world, asked)) == [expected] * 3


def test_documents_that_are_computed_one_by_one(tmp_path: Path) -> None:
    """Where the body is called once a document ranks would not gather equally often, but for micro-batches of one."""
    config_of_bloom = BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4)
    tokenizer = byte_level(puts_bos=True)
    assert len(tokenizer) <= config_of_bloom.vocab_size
    BloomForCausalLM(config_of_bloom).save_pretrained(tmp_path / "model")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:14]))
    more: dict[str, Any] = {"epochs": 1, "precision": "fp32", "max_length": 128}
    whole(tmp_path, "alone", 1, **more)
    whole(tmp_path, "several", 2, shard=2, **more)
    assert "one at a time" in said(tmp_path / "several-said")
    assert differences(tmp_path, "several", "alone") == []
