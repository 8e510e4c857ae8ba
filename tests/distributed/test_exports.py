"""A model of which each rank holds rows alone leaves in the bytes that one rank writes, its adapter merged as well."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import peft  # noqa: F401  here, so that no rank has to
import pytest
import torch
from ranks import on_ranks
from tiny_writers import model_of, tokenizer_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from deft.core import files
from deft.distributed.owners import Owners, agree
from deft.distributed.shards import Rows
from deft.distributed.world import World
from deft.encoding import tokenizer as tokenizers
from deft.evaluation.prompt_form import PromptForm
from deft.export import adapter
from deft.export import folder as room
from deft.export import weights as written
from deft.export.weights import ExportError, FinalWeights, Shared
from deft.model import adapters
from deft.model.config import AdapterConfig
from deft.training.masters import Masters

ROWS = [[1, 20, 21, 22, 23, 24], [1, 30]]


def dealt(world: World, size: int, shape: tuple[int, ...]) -> Rows:
    """torch.chunk's rows."""
    each = -(-shape[0] // size)
    start, stop = (min(shape[0], (world.rank % size + more) * each) for more in (0, 1))
    return Rows(shape, start, stop)


def cut(model: Any, world: World, shards: int, name: str = "export") -> Owners:
    """Takes all but this rank's rows from every parameter; who has the others."""
    rows = {}
    for key, parameter in model.named_parameters():
        rows[key] = dealt(world, shards, tuple(parameter.shape))
        parameter.data = parameter.data[rows[key].start : rows[key].stop].clone()
    return agree(name, rows, world)


def llama(dtype: torch.dtype, tied: bool = False) -> Any:
    torch.manual_seed(0)
    model = model_of(tokenizer_of("bytes"), tied=tied, spread=0.1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def exported(folder: Path, model: Any, dtype: torch.dtype, weights: Any, shared: Shared) -> Any:
    """All that `hand_over` does, on every rank."""
    tokenizer = tokenizers.wrap(tokenizer_of("bytes"))
    source, world = FinalWeights(model, dtype, weights, shared), shared.owners.world
    if world.is_first:
        options: dict[str, Any] = {"stop_ids": (), "chat_template": None, "card": "# card\n", "form": PromptForm(None)}
        room.export(model, tokenizer.hf, folder, dtype=dtype, weights=weights, shared=shared, **options)
    else:
        written.write(None, source, room.empty_twin(model, dtype))
    if not shared.owners.rows:
        return room.verify(folder, model, tokenizer.hf, ROWS, None, weights=weights)
    world.from_first("exported", lambda: True)
    return room.verify_shared(folder, source, tokenizer.hf, ROWS, None, ())


def files_of(folder: Path) -> dict[str, str]:
    return {name: each.sha256 for name, each in files.read_manifest(folder).files.items()}


@pytest.mark.parametrize(
    ("size", "shards", "tied", "dtype", "to"),
    [
        (2, 2, False, torch.bfloat16, torch.bfloat16),
        (3, 3, True, torch.float32, torch.bfloat16),
        (4, 2, False, torch.float32, torch.float32),
    ],
)
def test_any_number_of_ranks_writes_the_bytes_of_one(
    size: int, shards: int, tied: bool, dtype: torch.dtype, to: torch.dtype, tmp_path: Path
) -> None:
    """By the model's own parameters where it has their dtype, by masters where not."""

    def job(world: World) -> str:
        model = llama(dtype, tied)
        owners = cut(model, world, shards) if world.size > 1 else Owners()
        weights = None if dtype == to else {name: each.detach().float() for name, each in model.named_parameters()}
        return str(exported(tmp_path / str(world.size), model, to, weights, Shared(owners)))

    assert "reloaded" in job(World())
    first, *others = on_ranks(tmp_path / "said", size, job)
    assert files_of(tmp_path / str(size)) == files_of(tmp_path / "1")
    assert "tensors equal each rank's rows" in first
    assert "logits by the settings in memory within" in first
    assert all("not compared" in each for each in others)


def fsdp_rows(model: Any) -> dict[str, Rows]:
    found = {}
    for name, each in model.named_parameters():
        assert isinstance(each, DTensor)
        chunk = -(-each.shape[0] // each.device_mesh.size())
        start = min(each.shape[0], chunk * each.device_mesh.get_local_rank())
        found[name] = Rows(tuple(each.shape), start, start + each.to_local().shape[0])
    return found


def test_a_model_that_fsdp2_shards_is_exported_as_it_is(tmp_path: Path) -> None:
    def job(world: World) -> str:
        model = llama(torch.float32)
        owners = Owners()
        if world.size > 1:
            mesh = init_device_mesh("cpu", (world.size,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            owners = agree("export", fsdp_rows(model), world)
        return str(exported(tmp_path / str(world.size), model, torch.float32, None, Shared(owners)))

    job(World())
    assert "equal each rank's rows" in on_ranks(tmp_path / "said", 3, job)[0]
    assert files_of(tmp_path / "3") == files_of(tmp_path / "1")


def test_fused_experts_are_gathered_and_written_one_by_one(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    vocab = len(tokenizer_of("bytes"))
    config = MixtralConfig(vocab_size=vocab, num_hidden_layers=2, num_local_experts=4, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")

    def job(world: World) -> str:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        owners = cut(model, world, world.size) if world.size > 1 else Owners()
        return str(exported(tmp_path / str(world.size), model, torch.float32, None, Shared(owners)))

    job(World())
    on_ranks(tmp_path / "said", 3, job)
    assert files_of(tmp_path / "3") == files_of(tmp_path / "1")


@pytest.mark.parametrize(
    ("name", "dtype", "to"),
    [
        ("lora", torch.bfloat16, torch.bfloat16),
        ("dora", torch.float32, torch.float32),
        ("rslora", torch.float32, torch.bfloat16),
    ],
)
def test_an_adapter_is_merged_and_written_as_by_one_rank(
    name: Any, dtype: torch.dtype, to: torch.dtype, tmp_path: Path
) -> None:
    settings = AdapterConfig(name=name, r=4)

    def job(world: World) -> str:
        model = llama(torch.float32)
        torch.manual_seed(1)
        adapters.attach(model, settings)
        for key, each in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(each, std=0.1)
        model.eval()
        owners = Owners()
        if world.size > 1:
            owners = cut(model, world, world.size)
        masters = Masters(model.named_parameters(), dtype)
        place = tmp_path / f"adapter-{world.size}"
        tokenizer = tokenizers.wrap(tokenizer_of("bytes"))
        adapter.write(place, model, masters, settings, "base", tokenizer, {}, owners)
        if world.size > 1:
            shared, _ = adapter.merge_shared(model, masters, owners)
        else:
            shared, _ = Shared(), adapter.merge(model, masters, ROWS, to)
        weights = None if dtype == to else masters
        return str(exported(tmp_path / str(world.size), model, to, weights, shared))

    job(World())
    on_ranks(tmp_path / "said", 2, job)
    assert files_of(tmp_path / "2") == files_of(tmp_path / "1")
    assert files_of(tmp_path / "adapter-2") == files_of(tmp_path / "adapter-1")


def test_rank_0_has_no_more_than_one_whole_tensor_at_a_time(tmp_path: Path) -> None:
    """Counted as they are gathered: what was written is gone before the next one is there."""

    def job(world: World) -> list[int]:
        model = llama(torch.float32)
        owners, gathered, most = cut(model, world, world.size), [], [0]
        plain = FinalWeights.whole

        def whole(self: FinalWeights, names: tuple[str, ...]) -> torch.Tensor | None:
            found = plain(self, names)
            if found is not None:
                gathered.append(weakref.ref(found))
                there = [each for each in (ref() for ref in gathered) if each is not None]
                most[0] = max(most[0], sum(each.nbytes for each in there))
            return found

        FinalWeights.whole = whole  # type: ignore[method-assign]
        exported(tmp_path / "final", model, torch.float32, None, Shared(owners))
        return [most[0], len(gathered)]

    largest = max(each.nbytes for each in llama(torch.float32).parameters())
    count = len([*llama(torch.float32).parameters()])
    assert on_ranks(tmp_path / "said", 2, job) == [[largest, count], [0, 0]]


def test_a_rank_whose_rows_are_others_than_in_the_file_says_so_on_all(tmp_path: Path) -> None:
    def job(world: World) -> list[str]:
        model = llama(torch.float32)
        owners = cut(model, world, world.size)
        source = FinalWeights(model, torch.float32, None, Shared(owners))
        tokenizer = tokenizers.wrap(tokenizer_of("bytes"))
        exported(tmp_path / "final", model, torch.float32, None, Shared(owners))
        if world.rank == 1:
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight[-1, -1] += 1.0
        try:
            room.verify_shared(tmp_path / "final", source, tokenizer.hf, ROWS, None, ())
        except ExportError as error:
            return [str(error)]
        return []

    what = "model.layers.1.mlp.up_proj.weight: 1 of"
    assert all(what in each[0] for each in on_ranks(tmp_path / "said", 2, job))
