"""The weights of final/ in the bytes of save_pretrained, a tensor at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_writers import model_of, tokenizer_of
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from deft.core import files
from deft.export import weights as room
from deft.export.folder import empty_twin
from deft.export.weights import ExportError, FinalWeights, Shared


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def mixtral(folder: Path) -> Any:
    """As it is after loading: experts fused, which the file has one by one."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=12, **sizes)
    MixtralForCausalLM(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


MODELS: dict[str, Callable[[Path], Any]] = {
    "tied": lambda folder: model_of(tokenizer_of("bytes"), tied=True),
    "untied": lambda folder: model_of(tokenizer_of("bytes")),
    "gpt2": lambda folder: gpt2(),
    "experts": mixtral,
}


def written(folder: Path, weights: FinalWeights) -> Path:
    with files.staged(folder) as staging:
        room.write(staging, weights, empty_twin(weights.model, weights.dtype))
    return folder


@pytest.mark.parametrize("largest", ["50GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_save_pretrained(
    name: str, dtype: torch.dtype, largest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LARGEST", largest)
    torch.manual_seed(0)
    model = MODELS[name](tmp_path / "base").to(dtype)
    if name == "untied":
        model._keep_in_fp32_modules_strict = {"norm"}
        for key, each in model.named_parameters():
            each.data = each.data.float() if "norm" in key else each.data
    model.save_pretrained(tmp_path / "theirs", max_shard_size=largest)
    written(tmp_path / "mine", FinalWeights(model, dtype))
    theirs, mine = (
        {path.name: path.read_bytes() for path in (tmp_path / each).glob("model*")} for each in ("theirs", "mine")
    )
    assert mine.keys() == theirs.keys()
    assert (len(mine) > 2) == (largest != "50GB")
    assert mine == theirs


def test_where_several_parameters_become_one_all_are_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    monkeypatch.setattr(room, "_each_alone", lambda *given: {})
    found, taken = room.layout(FinalWeights(model, torch.float32), empty_twin(model, torch.float32)), []
    whole = FinalWeights.whole
    monkeypatch.setattr(FinalWeights, "whole", lambda self, names: taken.append(names) or whole(self, names))  # type: ignore[func-returns-value]
    (names,) = ([*like] for like in found.files.values())
    assert len([*found.stream(FinalWeights(model, torch.float32), names[:2])]) == 2
    assert len(taken) == len(names)


def test_no_more_than_a_tensor_or_a_layers_experts_are_in_memory(tmp_path: Path) -> None:
    """Counted as they are taken and let go: what is not used any more is gone before the next one is there."""
    for name in ("untied", "experts"):
        model, alive, most = MODELS[name](tmp_path / "base"), [], [0]

        class Counted(FinalWeights):
            def whole(self, names: tuple[str, ...], alive: Any = alive, most: Any = most) -> Any:
                found = super().whole(names).clone()  # type: ignore[union-attr]
                alive.append(_watched(found))
                most[0] = max(most[0], sum(size for size, is_there in alive if is_there()))
                return found

        written(tmp_path / name, Counted(model, torch.float32))
        sizes = [each.nbytes for each in model.parameters()]
        layer = sum(each.nbytes for each in model.model.layers[0].parameters() if each.ndim == 3)
        assert max(sizes) <= most[0] <= max(max(sizes), layer) + (max(sizes) if name == "experts" else 0)
        assert sum(sizes) > 2 * most[0]


def _watched(tensor: torch.Tensor) -> tuple[int, Callable[[], bool]]:
    there = weakref.ref(tensor)
    return tensor.nbytes, lambda: there() is not None


def test_a_changed_byte_is_named(tmp_path: Path) -> None:
    for name in MODELS:
        model = MODELS[name](tmp_path / name / "base")
        weights = FinalWeights(model, torch.bfloat16)
        twin = empty_twin(model, torch.bfloat16)
        path = written(tmp_path / name / "final", weights) / "model.safetensors"
        assert room.difference(path.parent, weights, twin) == ""
        data = path.read_bytes()
        for place in _places(len(data)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert "1 of" in room.difference(path.parent, weights, twin)


def _places(size: int) -> Iterable[int]:
    return (size - 1, size * 2 // 3, size // 2)


def test_a_weight_that_the_architecture_has_not_is_named() -> None:
    model = gpt2()
    model.more = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ExportError, match="more is not a weight of the plain architecture"):
        room.layout(FinalWeights(model, torch.float32), empty_twin(model, torch.float32))


def test_what_is_made_of_several_is_rounded_as_a_masters_copy_is() -> None:
    """A value in the middle of two of bf16: up, as 16+16 has it; to the even one where masters are cast."""
    model, name = gpt2().to(torch.bfloat16), "transformer.ln_f.weight"
    shared = Shared(made={name: lambda: torch.full((32,), 1.0 + 2**-8)})
    for masters, value in ((None, 1.0078125), ({}, 1.0)):
        found = FinalWeights(model, torch.bfloat16, masters, shared).whole((name,))
        assert found is not None
        assert found.tolist() == [value] * 32
